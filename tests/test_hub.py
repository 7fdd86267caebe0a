"""Push and pull through the real huggingface_hub, which talks to a stand-in on this machine."""

import json

import pytest
import torch
from safetensors.torch import save

from autoseg.hub import Address, fetch, parse_address, pull, push
from autoseg.share import export
from planners.errors import AutosegError, DatasetError, SettingsError
from planners.files import read_json
from pretrain.checkpoint import load_encoder
from tests.hub_stand_in import TOKEN, StandIn, hub
from tests.shared import entries, tree, use, write_tiny_encoder
from tests.tiny import DATASET

REPO = "anna/voco-tiny"
ENCODER = f"results/{DATASET}/pretrained/tinyPlans__3d_fullres/voco"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("autoseg.hub._cache", lambda: tmp_path / "cache")
    with hub() as running:
        yield running


@pytest.fixture
def home(tmp_path):
    root = use(tmp_path / "home")
    write_tiny_encoder()
    return root


def content(server: StandIn, repo: str = REPO) -> dict[str, bytes]:
    return server.repositories[repo].commits[-1][1]


def test_a_push_uploads_the_files_of_the_export_and_nothing_else_in_one_commit(server, home, tmp_path):
    (home / ENCODER / "state.pt").write_text("private")
    (home / ENCODER / "notes.txt").write_text("private")
    address = push(f"hf:{REPO}", 901, encoder="voco", endpoint=server.url)
    exported = entries(export(901, encoder="voco", output=tmp_path / "e.zip"))
    assert content(server) == {".gitattributes": b"", **exported}
    repository = server.repositories[REPO]
    assert repository.private and len(repository.commits) == 2
    assert address == f"{server.url}/{REPO}/commit/{repository.commits[-1][0]}"


def test_a_public_repository_has_to_be_asked_for(server, home):
    push(f"hf:{REPO}", 901, encoder="voco", public=True, endpoint=server.url)
    assert not server.repositories[REPO].private


def test_a_second_push_removes_what_it_no_longer_has_and_keeps_what_is_not_ours(server, home):
    server.make(REPO, {"transfer.json": b"{}", "LICENSE": b"text"})
    push(f"hf:{REPO}", 901, encoder="voco", endpoint=server.url)
    assert "transfer.json" not in content(server) and content(server)["LICENSE"] == b"text"


def test_a_pull_installs_what_was_pushed_and_records_the_commit(server, home, tmp_path):
    push(f"hf:{REPO}", 901, encoder="voco", endpoint=server.url)
    tensors, _ = load_encoder(home / ENCODER)
    use(tmp_path / "elsewhere")
    folder = pull(f"hf:{REPO}", endpoint=server.url)
    assert folder == tmp_path / "elsewhere" / ENCODER
    came, _ = load_encoder(folder)
    assert came.keys() == tensors.keys() and all(torch.equal(came[name], tensors[name]) for name in tensors)
    assert read_json(folder / "origin.json") == {"repository": REPO, "commit": server.repositories[REPO].commits[-1][0]}


def test_a_pull_takes_an_older_revision(server, home, tmp_path):
    push(f"hf:{REPO}", 901, encoder="voco", endpoint=server.url)
    older = server.repositories[REPO].commits[-1][0]
    server.repositories[REPO].commit({"README.md": b"empty now"})
    for asked in ({"revision": older}, {}):
        use(tmp_path / f"elsewhere{len(asked)}")
        if asked:
            assert (pull(f"hf:{REPO}", **asked, endpoint=server.url) / "encoder.json").is_file()
        else:
            assert (pull(f"hf:{REPO}@{older}", endpoint=server.url) / "encoder.json").is_file()
            with pytest.raises(DatasetError, match=r"lacks a file"):
                pull(f"hf:{REPO}", name="newest", endpoint=server.url)


def test_an_edited_card_does_not_matter_but_other_weights_are_refused(server, home, tmp_path):
    push(f"hf:{REPO}", 901, encoder="voco", endpoint=server.url)
    files = {**content(server), "README.md": b"better words"}
    server.repositories[REPO].commit(files)
    root = use(tmp_path / "elsewhere")
    before = tree(root)
    server.repositories[REPO].commit({**files, "encoder.safetensors": save({"a": torch.zeros(2)})})
    with pytest.raises(DatasetError, match=r"encoder\.safetensors with another size or SHA-256"):
        pull(f"hf:{REPO}", endpoint=server.url)
    assert tree(root) == before
    assert pull(f"hf:{REPO}@{server.repositories[REPO].commits[-2][0]}", endpoint=server.url).is_dir()


def test_a_manifest_that_names_files_outside_is_refused_before_they_are_downloaded(server, tmp_path):
    manifest = {"schema": 1, "kind": "encoder", "name": "x", "autoseg": "0", "files": {}}
    manifest["files"] = {"../../evil": {"sha256": "0" * 64, "size": 1}}
    server.make(REPO, {"manifest.json": json.dumps(manifest).encode(), "modeling.py": b"import os"})
    use(tmp_path / "elsewhere")
    with pytest.raises(AutosegError, match="manifest lists a file"):
        pull(f"hf:{REPO}", endpoint=server.url)
    assert not any("evil" in request or "modeling" in request for request in server.requests)


def test_fetch_gives_the_folder_of_our_encoder_named_after_the_repository(server, home):
    push(f"hf:{REPO}", 901, encoder="voco", endpoint=server.url)
    folder = fetch(f"hf:{REPO}", endpoint=server.url)
    assert folder.name == "voco-tiny"
    assert load_encoder(folder)[1].method == "voco"


def test_fetch_downloads_other_peoples_weights_and_no_code(server):
    nnssl = {"checkpoint_final.pth": b"weights", "adaptation_plan.json": b"{}", "config.json": b"{}", "run.py": b"evil"}
    server.make("lab/nnssl", nnssl)
    folder = fetch("hf:lab/nnssl", endpoint=server.url)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "adaptation_plan.json",
        "checkpoint_final.pth",
    ]
    server.make("lab/one", {"VoCo_10k.pt": b"weights", "README.md": b"", "model.py": b"evil"})
    file = fetch("hf:lab/one", endpoint=server.url)
    assert file.name == "VoCo_10k.pt" and file.read_bytes() == b"weights"
    assert not any(request.endswith(".py") for request in server.requests)


def test_fetch_downloads_a_commit_once(server):
    server.make("lab/one", {"VoCo_10k.pt": b"weights"})
    first = fetch("hf:lab/one", endpoint=server.url)
    server.requests.clear()
    assert fetch("hf:lab/one", endpoint=server.url) == first
    assert not any("VoCo_10k" in request for request in server.requests)
    server.repositories["lab/one"].commit({"VoCo_10k.pt": b"better"})
    assert fetch("hf:lab/one", endpoint=server.url).read_bytes() == b"better"


def test_fetch_lists_several_candidates_and_takes_the_one_that_is_named(server):
    server.make("lab/many", {"VoCo_B.pt": b"b", "large/VoCo_L.pt": b"l", "train.py": b""})
    with pytest.raises(
        SettingsError, match=r"(?s)2 weight files.*VoCo_B\.pt\n.*large/VoCo_L\.pt.*hf:lab/many/VoCo_B\.pt"
    ):
        fetch("hf:lab/many", endpoint=server.url)
    assert fetch("hf:lab/many/large/VoCo_L.pt", endpoint=server.url).read_bytes() == b"l"
    with pytest.raises(SettingsError, match="no such weights"):
        fetch("hf:lab/many/train.py", endpoint=server.url)


def test_what_is_missing_or_private_is_explained(server, monkeypatch, tmp_path):
    use(tmp_path / "elsewhere")
    server.make("lab/private", {"a.pt": b"a"}, private=True)
    assert fetch("hf:lab/private", endpoint=server.url).is_file()
    server.make("lab/open", {"a.pt": b"a"})
    with pytest.raises(SettingsError, match="no such revision"):
        fetch("hf:lab/open@v9", endpoint=server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    for repo in ("lab/private", "lab/nothing"):
        with pytest.raises(SettingsError, match=r"(?s)No such repository, or a private one.*hf auth login.*HF_TOKEN"):
            pull(f"hf:{repo}", endpoint=server.url)


def test_a_push_without_the_right_to_write_says_so(server, home, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(SettingsError, match=r"(?s)hf auth login.*write to"):
        push(f"hf:{REPO}", 901, encoder="voco", endpoint=server.url)


def test_without_a_network_the_message_says_so(home, tmp_path, monkeypatch):
    monkeypatch.setattr("autoseg.hub._cache", lambda: tmp_path / "cache")
    for action in (fetch, pull):
        with pytest.raises(SettingsError, match=r"(?s)cannot be reached.*check the network"):
            action(f"hf:{REPO}", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "text", ["hf:", "hf:voco", "anna/voco", "hf:a/b@", "hf:../..", "hf:a/b/../../c", "hf:a b/c", "HF:a/b"]
)
def test_another_spelling_is_refused(text):
    with pytest.raises(SettingsError, match="hf:owner/repo"):
        parse_address(text)


def test_addresses_are_read():
    assert parse_address("hf:a/b") == Address("a/b")
    assert parse_address("hf:a/b@v1.0/x/y.pt") == Address("a/b", "v1.0", "x/y.pt")


def test_a_model_is_not_taken_for_weights_to_start_from(server, tmp_path):
    manifest = {"schema": 1, "kind": "model", "name": "scratch", "autoseg": "0", "files": {}}
    server.make("lab/model", {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(SettingsError, match="autoseg pull hf:lab/model"):
        fetch("hf:lab/model", endpoint=server.url)
