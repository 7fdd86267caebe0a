"""Archives that are hostile or broken are refused, say why, and leave everything as it was."""

import json
import stat
import zipfile
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from autoseg.archive import SCHEMA, parse_json, write_zip
from autoseg.install import import_
from autoseg.share import export
from planners.errors import AutosegError, DatasetError, PlanError, PretrainedMismatch, UnsafeFile
from tests.shared import entries, tree, use, write_tiny_encoder
from tests.tiny import dataset_json, tiny_plan


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The files of a sound model archive, of a network that was never trained."""
    from planners.paths import results
    from pretrain.encoders import build_segmentation_network
    from trainers.checkpoint import save_checkpoint

    root = use(tmp_path_factory.mktemp("home"))
    model = results("Dataset901_Tiny") / "AutosegTrainer__tinyPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    plan = tiny_plan()
    (model / "plans.json").write_text(json.dumps(plan))
    (model / "dataset.json").write_text(json.dumps(dataset_json()))
    torch.manual_seed(1)
    checkpoint = {
        "network_weights": build_segmentation_network(plan, "3d_fullres", dataset_json()).state_dict(),
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "3d_fullres"},
        "inference_allowed_mirroring_axes": (0, 1, 2),
        "current_epoch": 4,
        "autoseg": {"trainer_name": "AutosegTrainer"},
    }
    save_checkpoint(model / "fold_0" / "checkpoint_final.pth", checkpoint)
    return entries(export(901, output=root / "model.zip"))


@pytest.fixture
def data(tmp_path) -> Path:
    """A data root with something in it."""
    root = use(tmp_path / "data")
    write_tiny_encoder()
    return root


def sealed(files: dict[str, bytes], **changes: bytes | None) -> dict[str, bytes]:
    """The files with some changed (None: removed), and a manifest that agrees with them again."""
    changed = {**files, **changes}
    changed = {name: content for name, content in changed.items() if content is not None and name != "manifest.json"}
    listed = {n: {"sha256": sha256(c).hexdigest(), "size": len(c)} for n, c in changed.items()}
    manifest = {**json.loads(files["manifest.json"]), "files": listed}
    return {**changed, "manifest.json": json.dumps(manifest).encode()}


def with_json(files: dict[str, bytes], name: str, change) -> dict[str, bytes]:
    content = json.loads(files[name])
    change(content)
    return sealed(files, **{name: json.dumps(content).encode()})


def written(path: Path, files: dict[str, bytes], *more: tuple[zipfile.ZipInfo | str, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in [*files.items(), *more]:
            archive.writestr(name, content)
    return path


def refused(archive: Path, data: Path, kind: type[AutosegError], match: str) -> None:
    before = tree(data)
    with pytest.raises(kind, match=match):
        import_(archive)
    assert tree(data) == before
    assert not [path for path in data.rglob("*") if "importing" in path.name]


def test_the_sound_archive_is_installed(files, data, tmp_path):
    assert (import_(written(tmp_path / "a.zip", files)) / "fold_0" / "checkpoint_final.pth").is_file()


def test_a_folder_zipped_again_with_compression_is_installed(files, data, tmp_path):
    import_(written(tmp_path / "a.zip", files, compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.pth", "/etc/evil", "fold_0/../../../evil", "fold_0\\weights.safetensors", "C:evil", "CON", "PLANS.json",
        "fold_00/fold.json", "notes.txt", "fold_0/checkpoint_final.pth", "fold_0/", "plans.json\x00.txt", "~/evil",
    ],
)  # fmt: skip
def test_a_name_outside_the_table_is_refused(files, data, tmp_path, name):
    entry = zipfile.ZipInfo()
    entry.filename = entry.orig_filename = name
    refused(written(tmp_path / "a.zip", files, (entry, b"x")), data, UnsafeFile, "no place in")
    assert not list(tmp_path.glob("evil*"))


def test_a_name_outside_the_table_is_refused_in_the_manifest_too(files, data, tmp_path):
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["../evil"] = {"sha256": "0" * 64, "size": 1}
    bad = {**files, "manifest.json": json.dumps(manifest).encode()}
    refused(written(tmp_path / "a.zip", bad), data, UnsafeFile, "manifest lists a file")


def test_a_symbolic_link_is_refused(files, data, tmp_path):
    link = zipfile.ZipInfo("transfer.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(written(tmp_path / "a.zip", files, (link, b"/etc/passwd")), data, UnsafeFile, "a link or a device")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(files, data, tmp_path):
    refused(written(tmp_path / "a.zip", files, ("plans.json", b"{}")), data, UnsafeFile, "two files of one name")


def test_a_file_the_manifest_does_not_list_is_refused(files, data, tmp_path):
    refused(written(tmp_path / "a.zip", files, ("transfer.json", b"{}")), data, UnsafeFile, "does not list")


def test_another_content_than_the_manifest_has_is_refused(files, data, tmp_path):
    same_size = files["plans.json"].replace(b"tinyPlans", b"tonyPlans")
    for content in (same_size, files["plans.json"] + b" "):
        refused(written(tmp_path / "a.zip", {**files, "plans.json": content}), data, DatasetError, "SHA-256")


def test_a_missing_file_is_named(files, data, tmp_path):
    left = {name: content for name, content in files.items() if name != "fold_0/weights.safetensors"}
    refused(written(tmp_path / "a.zip", left), data, DatasetError, r"no fold_0/weights\.safetensors")
    bad = sealed(files, **{"dataset.json": None})
    refused(written(tmp_path / "a.zip", bad), data, DatasetError, r"no dataset\.json")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_archive_is_refused(files, data, tmp_path, share):
    archive = written(tmp_path / "a.zip", files)
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    refused(archive, data, DatasetError, "cannot be read")


def test_a_flipped_bit_is_refused(files, data, tmp_path):
    archive = written(tmp_path / "a.zip", files)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    refused(archive, data, DatasetError, "cannot be read")


def test_a_compression_bomb_is_refused_before_it_is_unpacked(files, data, tmp_path):
    bomb = sealed(files, **{"fold_0/weights.safetensors": bytes(200 * 2**20)})
    archive = written(tmp_path / "a.zip", bomb, compression=zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 2**20
    refused(archive, data, UnsafeFile, "unpack to far more")


def test_an_entry_that_lies_about_its_size_is_refused(files, data, tmp_path):
    """The directory says what the manifest says; the stream holds more."""
    archive = written(tmp_path / "a.zip", files, compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(archive) as file:
        entry = file.getinfo("plans.json")
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["plans.json"]["size"] = 10
    bad = {**files, "manifest.json": json.dumps(manifest).encode()}
    content = written(archive, bad, compression=zipfile.ZIP_DEFLATED).read_bytes()
    size = entry.file_size.to_bytes(4, "little")
    archive.write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    refused(archive, data, DatasetError, "cannot be read|SHA-256")


def test_a_pickle_in_place_of_weights_is_refused_and_never_loaded(files, data, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    buffer = BytesIO()
    torch.save({"network_weights": Trap()}, buffer)
    bad = sealed(files, **{"fold_0/weights.safetensors": buffer.getvalue()})
    refused(written(tmp_path / "a.zip", bad), data, DatasetError, "safetensors")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_archive_of_ours_says_what_to_do(files, data, tmp_path):
    left = {name: content for name, content in files.items() if name != "manifest.json"}
    refused(written(tmp_path / "a.zip", left), data, DatasetError, "nnUNetv2_install_pretrained_model_from_zip")
    (tmp_path / "b.zip").write_bytes(b"not a zip")
    refused(tmp_path / "b.zip", data, DatasetError, "cannot be read")
    refused(tmp_path / "c.zip", data, DatasetError, "No such archive")


def test_a_newer_schema_is_refused_with_the_remedy(files, data, tmp_path):
    manifest = {**json.loads(files["manifest.json"]), "schema": SCHEMA + 1, "kind": "universe"}
    bad = {**files, "manifest.json": json.dumps(manifest).encode()}
    refused(written(tmp_path / "a.zip", bad), data, DatasetError, "update autoseg")


@pytest.mark.parametrize("change", [{"kind": "universe"}, {"schema": "1"}, {"files": []}, {"name": None}], ids=str)
def test_a_manifest_of_other_types_is_refused(files, data, tmp_path, change):
    bad = {**files, "manifest.json": json.dumps({**json.loads(files["manifest.json"]), **change}).encode()}
    refused(written(tmp_path / "a.zip", bad), data, DatasetError, f"(?s)manifest is not.*{next(iter(change))}")


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"a": NaN}', b"\xff", b"[" * 100000], ids=lambda c: repr(c[:9]))
def test_broken_json_is_named(files, data, tmp_path, content):
    with pytest.raises(DatasetError, match=r"plans\.json is not"):
        parse_json(content, "plans.json", tmp_path)
    refused(
        written(tmp_path / "a.zip", sealed(files, **{"plans.json": content})), data, DatasetError, r"plans\.json is"
    )


def set_in(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


SETTINGS = ("configurations", "3d_fullres")
ARCHITECTURE = (*SETTINGS, "architecture")


@pytest.mark.parametrize(
    ("keys", "value", "kind"),
    [
        ((*ARCHITECTURE, "network_class_name"), "torch.nn.functional.torch.hub.os.system", UnsafeFile),
        ((*ARCHITECTURE, "arch_kwargs", "nonlin"), "os.system", UnsafeFile),
        ((*ARCHITECTURE, "_kw_requires_import"), ["features_per_stage"], UnsafeFile),
        ((*ARCHITECTURE, "arch_kwargs", "n_stages"), "many", PlanError),
        ((*ARCHITECTURE, "arch_kwargs", "surprise"), 1, PlanError),
        ((*SETTINGS, "resampling_fn_data"), "system", UnsafeFile),
        ((*SETTINGS, "preprocessor_name"), "subprocess", UnsafeFile),
        ((*SETTINGS, "normalization_schemes"), ["np"], UnsafeFile),
        ((*SETTINGS, "data_identifier"), "../../x", UnsafeFile),
        (("image_reader_writer",), "os", UnsafeFile),
        (("label_manager",), "Popen", UnsafeFile),
        (("plans_name",), "../../x", UnsafeFile),
        (("dataset_name",), "../../x", DatasetError),
        (("dataset_name",), 7, PlanError),
        (("configurations",), [], AutosegError),
        (("autoseg", "train"), {"run": "../../x"}, AutosegError),
    ],
    ids=lambda v: str(v)[-40:],
)  # fmt: skip
def test_a_plan_that_names_code_or_paths_is_refused(files, data, tmp_path, keys, value, kind):
    files = with_json(files, "plans.json", lambda plan: plan.setdefault("autoseg", {}))
    bad = with_json(files, "plans.json", set_in(*keys, value=value))
    refused(written(tmp_path / "a.zip", bad), data, kind, "")


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("dataset.json", ("file_ending",), "/../../../evil.nii.gz"),
        ("dataset.json", ("labels",), {"organ": 1}),
        ("dataset.json", ("channel_names",), None),
        ("fold_0/fold.json", ("configuration",), "../x"),
        ("fold_0/fold.json", ("autoseg_trainer",), "../x"),
        ("fold_0/fold.json", ("trainer_name",), 3),
        ("fold_0/fold.json", ("mirroring_axes",), [0, 7]),
        ("fold_0/fold.json", ("epochs",), "4"),
        ("fold_0/fold.json", ("validation",), {"cases": 3}),
    ],
)
def test_descriptions_that_are_not_as_they_must_be_are_refused(files, data, tmp_path, name, keys, value):
    bad = with_json(files, name, set_in(*keys, value=value))
    refused(written(tmp_path / "a.zip", bad), data, AutosegError, "")


def test_a_transfer_report_that_is_no_json_is_refused(files, data, tmp_path):
    bad = sealed(files, **{"transfer.json": b"not at all"})
    refused(written(tmp_path / "a.zip", bad), data, DatasetError, r"transfer\.json is not")


def other_shape(tensors):
    name = "encoder.stem.convs.0.conv.weight"
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, *tensors[name].shape[1:])


def other_type(tensors):
    name = "encoder.stem.convs.0.conv.weight"
    tensors[name] = tensors[name].half()


def one_more(tensors):
    tensors["encoder.extra"] = torch.zeros(2)


def one_less(tensors):
    del tensors["encoder.stem.convs.0.conv.weight"]


def not_finite(tensors):
    tensors["encoder.stem.convs.0.conv.weight"][0] = torch.inf


@pytest.mark.parametrize("change", [other_shape, other_type, one_more, one_less, not_finite])
def test_weights_of_another_network_are_refused(files, data, tmp_path, change):
    tensors = load(files["fold_0/weights.safetensors"])
    change(tensors)
    bad = sealed(files, **{"fold_0/weights.safetensors": save(tensors)})
    refused(written(tmp_path / "a.zip", bad), data, PretrainedMismatch, "encoder")


def test_an_encoder_with_another_networks_weights_is_refused(data, tmp_path):
    encoder = entries(export(901, encoder="voco", output=tmp_path / "e.zip"))
    bad = with_json(
        encoder, "encoder.json", set_in("architecture", "arch_kwargs", "features_per_stage", value=[8, 16, 24])
    )
    refused(written(tmp_path / "a.zip", bad), data, PretrainedMismatch, "network has")
    bad = with_json(encoder, "encoder.json", set_in("configuration", value="../../x"))
    refused(written(tmp_path / "a.zip", bad), data, UnsafeFile, "more than a name")


def test_a_failure_while_writing_leaves_nothing(files, data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autoseg.install.save_checkpoint", full)
    before = tree(data)
    with pytest.raises(OSError, match="No space"):
        import_(written(tmp_path / "a.zip", files))
    assert tree(data) == before
    assert [path.name for path in (data / "results" / "Dataset901_Tiny").iterdir()] == ["pretrained"]


def test_a_zip_written_twice_is_equal(tmp_path):
    for name in ("b/two.json", "a.json"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    write_zip(tmp_path / "in", tmp_path / "1.zip")
    (tmp_path / "in" / "a.json").touch()
    write_zip(tmp_path / "in", tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert list(entries(tmp_path / "1.zip")) == ["a.json", "b/two.json"]
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
