"""What is exported comes back as it was, and carries nothing that should have stayed."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

import autoseg
from autoseg.contents import Fold, Model, Validation
from autoseg.model_card import model_card_text
from autoseg.share import choose, export
from planners import paths
from planners.errors import DatasetError, PlanError, PretrainedMismatch, SettingsError
from planners.files import read_json, write_json
from pretrain.checkpoint import EncoderCard, hidden_case, load_encoder, seen_cases
from tests.shared import entries, manifest_of, tree, use, write_tiny_encoder
from tests.test_nnunet_roundtrip import BLOCKER
from tests.tiny import DATASET, dataset_json, tiny_plan, write_tiny_dataset, write_tiny_plan
from tests.trained import read, train_tiny
from trainers.predict import predict
from trainers.predictor import AutosegPredictor
from trainers.runs import stock_command

RUN = "AutosegTrainer-voco__tinyPlans__3d_fullres"


@pytest.fixture(scope="module")
def session_root(tmp_path_factory):
    """A dataset with an encoder that has seen all cases but one, and a model trained from it."""
    root = use(tmp_path_factory.mktemp("home"))
    write_tiny_encoder()
    train_tiny(root, pretrained="voco")
    return root


@pytest.fixture
def home(session_root):
    return use(session_root)


@pytest.fixture
def model_zip(home, tmp_path):
    return export(901, output=tmp_path / "model.zip")


@pytest.fixture
def encoder_zip(home, tmp_path):
    return export(901, encoder="voco", output=tmp_path / "encoder.zip")


def logits(model) -> torch.Tensor:
    predictor = AutosegPredictor(torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(model)
    noise = torch.randn((1, 11, 29, 23), generator=torch.Generator().manual_seed(5))
    return predictor.predict_logits_from_preprocessed_data(noise)


def test_a_model_comes_back_with_bit_identical_logits_and_its_numbers(home, model_zip, tmp_path):
    own = paths.results(DATASET) / RUN
    expected, summary = logits(own), read_json(own / "fold_0" / "validation" / "summary.json")
    installed = autoseg.import_(model_zip, root=tmp_path / "elsewhere")
    assert installed == tmp_path / "elsewhere" / "results" / DATASET / RUN
    assert torch.equal(logits(installed), expected)
    assert choose(901).folder == installed  # as predict -d finds it
    came = read_json(installed / "fold_0" / "validation" / "summary.json")
    assert came["mean"] == summary["mean"] and came["foreground_mean"] == summary["foreground_mean"]
    assert read_json(installed / "origin.json")["archive"] == "model.zip"


def test_stock_nnunet_predicts_an_imported_model_without_our_packages(home, model_zip, tmp_path):
    scans = paths.raw(DATASET) / "imagesTs"
    ours = predict(scans, tmp_path / "ours", dataset=901, device="cpu", mirroring=False)
    installed = autoseg.import_(model_zip, root=tmp_path / "elsewhere")
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    folders = {f"nnUNet_{part}": str(tmp_path / "elsewhere" / part) for part in ("raw", "preprocessed", "results")}
    arguments = [*stock_command(installed, (0,), "cpu").split()[1:], "-npp", "0", "-nps", "0", "--disable_tta"]
    arguments = [{"INPUT": str(scans), "OUTPUT": str(tmp_path / "stock")}.get(a, a) for a in arguments]
    start = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env={"PATH": "", "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1", **folders},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(ours.written) == 2
    for mask in ours.written:
        assert (read(mask) == read(tmp_path / "stock" / mask.name)).mean() >= 0.999


def test_a_model_of_stock_nnunet_is_exported_and_imported(home, tmp_path, monkeypatch):
    """Trained by nnU-Net's own trainer for a moment."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    (paths.preprocessed(DATASET) / "dataset_fingerprint.json").write_text("{}")
    plan = {**tiny_plan(), "continue_training": False}
    stock = nnUNetTrainer(plan, "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    stock.num_epochs, stock.num_iterations_per_epoch, stock.num_val_iterations_per_epoch = 1, 2, 1
    stock.run_training()
    archive = export(model_folder=stock.output_folder_base, output=tmp_path / "stock.zip")
    assert b"case_0" not in archive.read_bytes()
    expected = logits(stock.output_folder_base)
    installed = autoseg.import_(archive, root=tmp_path / "elsewhere")
    assert installed.name == "nnUNetTrainer__tinyPlans__3d_fullres"
    assert torch.equal(logits(installed), expected)
    shutil.rmtree(stock.output_folder_base)


def test_the_same_model_gives_the_same_bytes_here_and_after_an_import(home, model_zip, encoder_zip, tmp_path):
    again = export(901, output=tmp_path / "again.zip").read_bytes()
    assert again == model_zip.read_bytes()
    for archive, choice in ((model_zip, {}), (encoder_zip, {"encoder": "voco"})):
        autoseg.import_(archive, root=tmp_path / "elsewhere")
        back = export(901, output=tmp_path / f"back_{archive.name}", **choice)
        assert back.read_bytes() == archive.read_bytes()


def test_an_encoder_comes_back_and_trains_by_its_name(home, encoder_zip, tmp_path):
    tensors, card = load_encoder(choose(901, encoder="voco").folder)
    write_tiny_dataset(tmp_path / "elsewhere", cases=4)
    write_tiny_plan(tiny_plan())
    installed = autoseg.import_(encoder_zip, root=tmp_path / "elsewhere")
    assert installed == paths.results(DATASET) / "pretrained" / "tinyPlans__3d_fullres" / "voco"
    came, came_card = load_encoder(installed)
    assert came.keys() == tensors.keys() and all(torch.equal(came[name], tensors[name]) for name in tensors)
    assert came_card.plan_hash == card.plan_hash
    assert came_card.task == card.task != {}
    folder = autoseg.train(
        901, pretrained="voco", plan="tinyPlans", device="cpu", settings={"epochs": 1, "iterations": 1}
    )[0]
    assert read_json(folder.parent / "transfer.json")["encoder_share"] == 1.0


SWIN = {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4, "use_v2": True}
PRIMUS = {
    "embed_dim": 36,
    "eva_depth": 1,
    "eva_numheads": 2,
    "patch_embed_size": [8, 8, 8],
    "input_shape": [32, 32, 32],
}


@pytest.mark.parametrize(("network", "arguments"), [("SwinUNETR", SWIN), ("Primus", PRIMUS)])
def test_encoders_of_transformers_are_shared_too(tmp_path, network, arguments):
    use(tmp_path / "home")
    plan = tiny_plan()
    architecture = {
        "network_class_name": f"pretrain.networks.{network}", "arch_kwargs": arguments, "_kw_requires_import": [],
    }  # fmt: skip
    plan["configurations"]["3d_fullres"] |= {"architecture": architecture, "patch_size": [32, 32, 32]}
    own, _ = load_encoder(write_tiny_encoder(plan))
    archive = export(901, encoder="voco", output=tmp_path / "e.zip")
    came, _ = load_encoder(autoseg.import_(archive, root=tmp_path / "elsewhere"))
    assert came.keys() == own.keys() and all(torch.equal(came[name], own[name]) for name in own)
    weights = export(901, encoder="voco", format="nnunet", output=tmp_path / "w.pth")
    state = torch.load(weights, weights_only=True)["network_weights"]
    assert all(torch.equal(state[name], own[name]) for name in own) and len(state) > len(own)


def test_case_ids_are_hashed_and_still_answer_whether_a_case_was_seen(home, encoder_zip):
    inside = entries(encoder_zip)
    assert not any(b"case_0" in content for content in inside.values())
    sha256 = manifest_of(encoder_zip)["files"]["encoder.safetensors"]["sha256"]
    card = EncoderCard.from_json(json.loads(inside["encoder.json"]))
    assert len(card.cases) == 5 and len(set(card.cases)) == 5
    assert seen_cases(card, sha256, DATASET, ["case_00", "case_05", "case_99"]) == ["case_00"]
    assert hidden_case(card.cases[0], sha256) == card.cases[0]
    assert hidden_case(f"{DATASET}/case_00", "0" * 64) not in card.cases


def test_an_archive_names_no_case_no_place_and_holds_no_pickle(home, model_zip, encoder_zip):
    for archive in (model_zip, encoder_zip):
        raw = archive.read_bytes()
        assert b"case_0" not in raw
        assert str(home).encode() not in raw and b"/home/" not in raw and b"/tmp/" not in raw
        assert {name.rsplit(".", 1)[1] for name in entries(archive)} == {"json", "md", "safetensors"}
    assert sorted(entries(model_zip)) == [
        "README.md", "dataset.json", "fold_0/fold.json", "fold_0/weights.safetensors", "manifest.json", "plans.json",
        "transfer.json",
    ]  # fmt: skip


def test_dataset_json_leaves_without_the_files_it_lists(home, tmp_path):
    model = paths.results(DATASET) / RUN
    own = (model / "dataset.json").read_text()
    listed = {"training": [{"image": "./imagesTr/meier_anna.nii.gz"}], "dataset": {"meier_anna": {"images": []}}}
    try:
        write_json(model / "dataset.json", {**json.loads(own), **listed})
        assert b"meier" not in export(901, output=tmp_path / "a.zip").read_bytes()
        write_json(model / "dataset.json", {**json.loads(own), "description": "copied from /home/anna/scans"})
        with pytest.raises(DatasetError, match="a place on this machine"):
            export(901, output=tmp_path / "b.zip")
        assert not (tmp_path / "b.zip").exists()
    finally:
        (model / "dataset.json").write_text(own)


def test_the_card_of_a_model_says_what_it_is_and_how_it_was_measured(home, model_zip):
    card = entries(model_zip)["README.md"].decode()
    dice = read_json(paths.results(DATASET) / RUN / "fold_0" / "validation" / "summary.json")["mean"]["1"]["Dice"]
    for text in (
        "organ",
        "core",
        "2.5×1.1×1 mm",
        "8×24×20 voxels",
        "ResidualEncoderUNet",
        "voco",
        "MR0",
        f"{dice:.3f}",
    ):
        assert text in card
    assert re.search(r"autoseg predict .*-p tinyPlans -c 3d_fullres --run voco", card)
    fold = json.loads(entries(model_zip)["fold_0/fold.json"])
    held_out = read_json(paths.preprocessed(DATASET) / "splits_final.json")[0]["val"]
    expected = sum(case != "case_05" for case in held_out)
    assert fold["validation"]["seen_in_pretraining"] == expected
    assert f"{expected} of {len(held_out)}, without labels" in card
    assert "Research software" in card and card.startswith("---\nlicense: unknown\nlibrary_name: autoseg\n")


def test_the_card_of_an_encoder_has_its_licence_for_the_hub(home, encoder_zip):
    card = entries(encoder_zip)["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    for text in ("Wu et al. 2024", "| placement | 0.500 | 0.250 |", "no fold was left out", "--pretrained voco"):
        assert text in card


def test_an_existing_model_is_kept_and_another_name_installs_beside_it(home, model_zip):
    before = tree(home)
    with pytest.raises(SettingsError, match=r"installed already.*(.|\n)*--as NAME"):
        autoseg.import_(model_zip, root=home)
    assert tree(home) == before
    installed = autoseg.import_(model_zip, name="theirs", root=home)
    assert installed.name == RUN.replace("voco", "theirs")
    assert choose(901, run="theirs").folder == installed
    with pytest.raises(SettingsError, match="2 trained models"):
        choose(901)
    shutil.rmtree(installed)


def test_an_id_that_is_another_dataset_here_is_explained(model_zip, tmp_path):
    write_tiny_dataset(tmp_path / "other", cases=1, name="Dataset901_Knee")
    with pytest.raises(SettingsError, match=r"(?s)901 is another dataset.*Dataset901_Knee.*-d 1 "):
        autoseg.import_(model_zip, root=tmp_path / "other")
    installed = autoseg.import_(model_zip, 902, root=tmp_path / "other")
    assert installed.parent.name == "Dataset902_Tiny"
    assert read_json(installed / "plans.json")["dataset_name"] == "Dataset902_Tiny"
    assert autoseg.import_(model_zip, 901, root=tmp_path / "other").parent.name == "Dataset901_Knee"


def test_what_is_not_there_is_listed(home):
    with pytest.raises(SettingsError, match=r"(?s)no encoder mae.*voco \(tinyPlans__3d_fullres\)"):
        choose(901, encoder="mae")
    with pytest.raises(PlanError, match="no trained model"):
        choose(901, run="other")
    with pytest.raises(DatasetError, match=r"no fold_3/checkpoint_final\.pth"):
        choose(None, model_folder=paths.results(DATASET) / RUN, folds=[3])


def test_an_unfinished_encoder_is_not_shared(tmp_path):
    use(tmp_path)
    write_tiny_encoder(steps_done=3)
    with pytest.raises(PretrainedMismatch, match="3 of 10"):
        export(None, encoder=paths.results(DATASET) / "pretrained" / "tinyPlans__3d_fullres" / "voco")


def test_an_existing_file_is_not_replaced_unasked(home, tmp_path):
    (tmp_path / "model.zip").write_text("mine")
    with pytest.raises(SettingsError, match="exists already"):
        export(901, output=tmp_path / "model.zip")
    assert (tmp_path / "model.zip").read_text() == "mine"
    assert export(901, output=tmp_path / "model.zip", overwrite=True).stat().st_size > 1000


def test_the_commands_export_and_import(home, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "autoseg", *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
        )

    out = run("export", "-d", "901", "--encoder", "voco", "--root", str(home))
    name = f"{DATASET}__tinyPlans__3d_fullres__voco.zip"
    assert out.returncode == 0 and f"autoseg import {name}" in out.stdout, out.stderr
    back = run("import", name, "--root", str(tmp_path / "data"))
    assert back.returncode == 0 and "Next: autoseg train -d 901 --pretrained voco" in back.stdout, back.stderr


@pytest.mark.parametrize(
    ("labels", "means"),
    [
        ({f"s{i}": i for i in range(1, 12)}, {f"s{i}": i / 100 for i in range(1, 12)}),
        ({"whole": [1, 2], "core": 2}, {"whole": 0.75, "core": 0.5}),
    ],
    ids=["eleven labels", "regions"],
)
def test_the_card_gives_each_structure_its_own_number(labels, means):
    """nnU-Net's summary has labels as texts, so that 10 comes before 2."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in labels.items()}
    by_key = {str(values[name]): {"Dice": mean} for name, mean in means.items()}
    validation = Validation(3, None, {"Dice": 0.5}, dict(sorted(by_key.items())))
    dataset = {**dataset_json(), "labels": {"background": 0, **labels}}
    if any(isinstance(value, tuple) for value in values.values()):
        dataset["regions_class_order"] = [1, 2]
    fold = Fold("3d_fullres", "nnUNetTrainer", "AutosegTrainer", [0], 1, validation)
    lines = model_card_text(Model(tiny_plan(), dataset, {"0": fold})).splitlines()
    heading, numbers = (
        [cell.strip() for cell in next(line for line in lines if line.startswith(start)).strip("|").split("|")]
        for start in ("| fold | cases", "| 0 | 3")
    )
    table = dict(zip(heading, numbers, strict=True))
    assert {name: float(table[name]) for name in means} == means
