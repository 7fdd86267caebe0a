"""The Hugging Face Hub: the files of an export in a repository, and other people's weights out of one.

A repository holds what the zip holds, unpacked. Only files that the manifest lists are uploaded, and only data files are
downloaded, of one commit, which is written down.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from autoseg.archive import CARD, MANIFEST, check_folder, is_ours, parse_manifest
from autoseg.hub_address import Address, parse_address
from autoseg.install import install
from autoseg.share import choose, pack
from planners.errors import DatasetError, SettingsError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger("autoseg")

_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt")
_NNSSL = {"checkpoint_final.pth", "adaptation_plan.json"}
"""What nnssl's repositories hold: weights and what they are."""


def push(
    to: str, dataset: int | str | None = None, *, public: bool = False, endpoint: str | None = None, **choice: Any
) -> str:
    """Upload a model or an encoder as one commit; returns the commit's address.

    Args:
        to: `hf:owner/repo`; made if it does not exist, private unless `public`. An existing one keeps its visibility.
        choice: as for `autoseg.share.choose`.
        endpoint: of another Hub; default: HF_ENDPOINT, else huggingface.co.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    address = parse_address(to)
    if address.revision or address.file:
        raise SettingsError(
            "A push goes to a repository, not to a revision or a file", found=to, expected="hf:owner/repo"
        )
    chosen = choose(dataset, **choice)
    with tempfile.TemporaryDirectory(prefix="autoseg-") as temporary, _hub_errors(address):
        packed = Path(temporary) / "packed"
        manifest = pack(chosen, packed)
        api = _api(endpoint)
        api.create_repo(address.repo, private=not public, exist_ok=True)
        names = [*manifest.files, MANIFEST]
        # Files of an earlier push that this one does not have would be taken for part of it.
        old = [name for name in api.list_repo_files(address.repo) if name not in names and is_ours(name)]
        operations: list[Any] = [
            *(CommitOperationDelete(path_in_repo=name) for name in old),
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=packed / name) for name in names),
        ]
        commit = api.create_commit(address.repo, operations, commit_message=f"autoseg {manifest.kind} {manifest.name}")
        visibility = "private" if api.model_info(address.repo).private else "public"
    logger.info("Pushed %d files to %s (%s)", len(names), commit.commit_url, visibility)
    logger.info("Next: autoseg pull hf:%s@%s", address.repo, commit.oid)
    return str(commit.commit_url)


def pull(
    source: str,
    dataset: int | str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download what `push` uploaded and install it exactly as `import_` does; returns its folder.

    The card is not downloaded: people edit it on the Hub, and then it is not the file that was checked.
    """
    address = parse_address(source)
    if address.file or (address.revision and revision):
        raise SettingsError("A pull takes a whole repository and one revision", found=source, expected="hf:owner/repo")
    with tempfile.TemporaryDirectory(prefix="autoseg-") as temporary:
        folder = Path(temporary) / address.repo
        with _hub_errors(address):
            commit, _ = _listing(address, revision or address.revision, endpoint)
            _download_export(address.repo, commit, folder, endpoint)
        manifest = check_folder(folder, without=(CARD,))
        origin = {"repository": address.repo, "commit": commit}
        logger.info("Downloaded hf:%s@%s", address.repo, commit)
        return install(folder, manifest, origin, dataset, name=name)


def fetch(text: str, *, endpoint: str | None = None) -> Path:
    """Weights to start a training from: the local folder of one of our encoders or of nnssl's, else one weight file.

    Raises SettingsError where it is not clear which file is meant, and for whole models, which `pull` installs.
    """
    address = parse_address(text)
    with _hub_errors(address):
        commit, names = _listing(address, address.revision, endpoint)
        folder = _cache() / commit[:12] / address.repo
        if address.file is None and MANIFEST in names:
            _download_export(address.repo, commit, folder, endpoint)
            if check_folder(folder, without=(CARD,)).kind == "model":
                raise SettingsError(
                    "The repository holds a trained model, not weights to start from",
                    found=text,
                    remedy=f"autoseg pull hf:{address.repo}, then predict with it",
                )
            return folder
        if address.file is None and set(names) >= _NNSSL:
            _download(address.repo, commit, sorted(_NNSSL), folder, endpoint)
            return folder
        file = _chosen_file(address, names)
        _download(address.repo, commit, [file], folder, endpoint)
        return folder / file


def _chosen_file(address: Address, names: list[str]) -> str:
    candidates = [name for name in names if PurePosixPath(name).suffix in _WEIGHTS]
    if address.file is not None and address.file in candidates:
        return address.file
    if address.file is None and len(candidates) == 1:
        return candidates[0]
    raise SettingsError(
        f"hf:{address.repo} has no such weights"
        if address.file
        else f"hf:{address.repo} has {len(candidates) or 'no'} weight files",
        found="\n            ".join(candidates) or ", ".join(names[:10]) or "no file at all",
        expected=f"one of them, ending in {', '.join(_WEIGHTS)}",
        remedy=f"choose with hf:{address.repo}/{candidates[0]}" if candidates else "choose another repository",
    )


def _listing(address: Address, revision: str | None, endpoint: str | None) -> tuple[str, list[str]]:
    """The commit that a revision (default: the newest) is, and the files in it."""
    info = _api(endpoint).model_info(address.repo, revision=revision)
    return str(info.sha), [file.rfilename for file in info.siblings or ()]


def _download_export(repo: str, commit: str, folder: Path, endpoint: str | None) -> None:
    """The manifest, then what it lists but for the card."""
    _download(repo, commit, [MANIFEST], folder, endpoint)
    manifest = parse_manifest((folder / MANIFEST).read_bytes(), f"hf:{repo}@{commit}")
    _download(repo, commit, [name for name in manifest.files if name != CARD], folder, endpoint)


def _download(repo: str, commit: str, names: list[str], folder: Path, endpoint: str | None) -> None:
    from huggingface_hub import hf_hub_download

    for name in names:
        hf_hub_download(repo, name, revision=commit, local_dir=folder, endpoint=endpoint)


def _api(endpoint: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, library_name="autoseg")


def _cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "autoseg"


@contextmanager
def _hub_errors(address: Address) -> Iterator[None]:
    """What the library raises, in words that say what to do."""
    from huggingface_hub import errors

    where = f"hf:{address.repo}" + (f"@{address.revision}" if address.revision else "")
    log_in = "log in with `hf auth login`, or set HF_TOKEN to a token that may {} it"
    try:
        yield
    except errors.GatedRepoError as error:
        raise SettingsError(
            "The repository asks for its conditions to be accepted first",
            where=where,
            remedy=f"accept them on its page, then {log_in.format('read')}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SettingsError(
            "No such repository, or a private one that you may not see",
            where=where,
            remedy=f"check the spelling of owner/repo; for a private one {log_in.format('read')}",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SettingsError("The repository has no such revision", where=where, found=address.revision) from error
    except errors.RemoteEntryNotFoundError as error:
        raise DatasetError("The repository lacks a file", where=where, found=str(error).splitlines()[0]) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        refused = status in (401, 403)
        raise SettingsError(
            "The Hub refuses this" if refused else "The Hub answers with an error",
            where=where,
            found=str(error).splitlines()[0],
            remedy=log_in.format("write to") if refused else "try again later",
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise SettingsError("Nobody is logged in", where=where, remedy=log_in.format("write to")) from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise SettingsError(
            "The Hub cannot be reached",
            where=where,
            found=f"{type(error).__name__}: {error}",
            remedy="check the network; without one, download the files elsewhere and give their folder",
        ) from error
