"""A small stand-in for the Hugging Face Hub's HTTP API, which the real library talks to: models only, small files only."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_write"


@dataclass
class Repository:
    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """(commit hash, files), oldest first."""

    def commit(self, files: dict[str, bytes]) -> str:
        """Make `files` the content of a new commit."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((found for found in self.commits if found[0] == revision), None)


@dataclass
class StandIn:
    """The server's state: what tests prepare and look at."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def make(self, name: str, files: dict[str, bytes], *, private: bool = False) -> Repository:
        repository = Repository(private)
        repository.commit({".gitattributes": b"", **files})
        self.repositories[name] = repository
        return repository


@contextmanager
def hub() -> Iterator[StandIn]:
    """Run the stand-in on a free port of this machine."""
    state = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(state: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(b"")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                self._answer(b"".join(iter(self._chunk, b"")))
            else:
                self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def _chunk(self) -> bytes:
            content = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return content

        def _answer(self, body: bytes) -> None:
            path = self.path.split("?")[0]
            state.requests.append(f"{self.command} {path}")
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            for pattern, action in _ROUTES:
                if match := re.fullmatch(pattern, path):
                    repository = state.repositories.get(match["repo"])
                    if repository is None or (repository.private and not self._may_write()):
                        return self._error(401, "RepoNotFound", "Repository not found")
                    found = repository.at(match["revision"] or "main")
                    if found is None:
                        return self._error(404, "RevisionNotFound", "Invalid rev id")
                    return getattr(self, action)(match, repository, found, body)
            return self._error(404, "RepoNotFound", f"no such page {path}")

        def _create(self, asked: dict) -> None:
            if not self._may_write():
                return self._error(401, "", "Invalid username or password.")
            name = f"{asked['organization']}/{asked['name']}"
            if name in state.repositories:
                return self._json({"error": "You already created this model repo", "url": f"{state.url}/{name}"}, 409)
            state.make(name, {}, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            return self._json({"url": f"{state.url}/{name}", "id": name, "name": name})

        def _info(self, match: re.Match, repository: Repository, found: tuple, _: bytes) -> None:
            siblings = [{"rfilename": name} for name in found[1]]
            name = match["repo"]
            self._json({"id": name, "modelId": name, "sha": found[0], "private": repository.private,
                        "siblings": siblings, "tags": []})  # fmt: skip

        def _tree(self, _: re.Match, __: Repository, found: tuple, ___: bytes) -> None:
            self._json([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in found[1].items()])

        def _preupload(self, _: re.Match, __: Repository, ___: tuple, body: bytes) -> None:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})

        def _commit(self, match: re.Match, repository: Repository, found: tuple, body: bytes) -> None:
            if not self._may_write():
                return self._error(403, "", "You need write access")
            files = dict(found[1])
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repository.commit(files)
            return self._json(
                {"success": True, "commitOid": sha, "commitUrl": f"{state.url}/{match['repo']}/commit/{sha}"}
            )

        def _resolve(self, match: re.Match, _: Repository, found: tuple, __: bytes) -> None:
            if match["file"] not in found[1]:
                return self._error(404, "EntryNotFound", "Entry not found")
            content = found[1][match["file"]]
            etag = hashlib.sha256(content).hexdigest()
            return self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})

        def _may_write(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def _json(self, content: Any, status: int = 200) -> None:
            self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Message": message, "Content-Type": "application/json"}
            self._send(
                status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {})
            )

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    (rf"/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?", "_info"),
    (rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", "_tree"),
    (rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "_preupload"),
    (rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "_commit"),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "_resolve"),
)
