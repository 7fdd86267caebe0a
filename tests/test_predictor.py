"""Prediction: the same answers as nnU-Net's own predictor, on the grid of the scan, and nothing unsafe on the way."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from planners import paths
from planners.errors import CasesFailed, DatasetError, PlanError, SettingsError, UnsafeFile
from tests.tiny import DATASET, SPACING_MM
from tests.trained import Trained, dice, read, train_tiny
from trainers.label_names import mask_values
from trainers.predict import predict
from trainers.predictor import AutosegPredictor
from trainers.runs import choose_model, stock_command


@pytest.fixture(scope="module")
def session_model(tmp_path_factory) -> Trained:
    return train_tiny(tmp_path_factory.mktemp("model"), folds=(0, 1), spacing=(2.5, 1.3, 1.2))


@pytest.fixture
def trained(session_model):
    paths.configure(session_model.root)
    return session_model


@pytest.fixture
def copied(trained, tmp_path):
    """A model folder that may be spoiled."""
    return shutil.copytree(trained.model, tmp_path / "Dataset901_Tiny" / trained.model.name)


def test_masks_lie_on_the_grid_of_the_scan_and_find_every_label(trained, tmp_path):
    summary = predict(trained.scans, tmp_path, dataset=901, device="cpu")
    assert summary.folds == (0, 1)
    assert [mask.name for mask in summary.written] == ["case_06.nii.gz", "case_07.nii.gz"]
    for mask in summary.written:
        image = SimpleITK.ReadImage(str(mask))
        scan = SimpleITK.ReadImage(str(trained.scans / mask.name.replace(".nii", "_0000.nii")))
        assert (image.GetSize(), image.GetOrigin(), image.GetDirection()) == (
            scan.GetSize(), scan.GetOrigin(), scan.GetDirection(),
        )  # fmt: skip
        assert image.GetSpacing() == pytest.approx(SPACING_MM[::-1])
        reference = read(trained.references / mask.name)
        assert all(dice(read(mask) == value, reference == value) > 0.7 for value in (1, 2))


def test_logits_are_those_of_nnunet_up_to_its_half_precision(trained):
    ours = AutosegPredictor(torch.device("cpu"))
    ours.initialize_from_trained_model_folder(trained.model)
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(trained.model), (0, 1), "checkpoint_final.pth")
    data = torch.randn(1, 13, 29, 31, generator=torch.Generator().manual_seed(0))
    mine, theirs = (p.predict_logits_from_preprocessed_data(data) for p in (ours, stock))
    assert mine.dtype == torch.float32
    assert mine.shape == (3, 13, 29, 31)
    # Near the border only the edges of windows reach, where nnU-Net's weights are too small for half precision.
    inside = (slice(None), slice(2, -2), slice(5, -5), slice(5, -5))
    assert torch.allclose(mine[inside], theirs[inside].float(), atol=0.02)
    assert (mine - theirs.float()).abs().median() < 1e-3


def test_windows_and_flips_together_or_one_by_one_are_the_same(trained, monkeypatch):
    predictor = AutosegPredictor(torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trained.model, (0,))
    data = torch.randn(1, 16, 24, 20, generator=torch.Generator().manual_seed(0))  # three windows
    sizes = []
    predictor.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    together = predictor.predict_logits_from_preprocessed_data(data)
    monkeypatch.setattr("trainers.predictor._VOXELS_PER_FORWARD", {"cpu": 1})
    one_by_one = predictor.predict_logits_from_preprocessed_data(data)
    assert sizes == [24] + [1] * 24
    assert torch.allclose(together, one_by_one, atol=1e-5)


def test_a_batch_that_does_not_fit_is_halved(trained):
    predictor = AutosegPredictor(torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trained.model, (0,))
    data = torch.randn(1, 8, 24, 20, generator=torch.Generator().manual_seed(0))
    expected = predictor.predict_logits_from_preprocessed_data(data)

    def refuse(_, inputs):
        if len(inputs[0]) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")

    predictor.network.register_forward_pre_hook(refuse)
    assert torch.allclose(predictor.predict_logits_from_preprocessed_data(data), expected, atol=1e-5)


def test_folds_are_averaged(trained):
    data = torch.randn(1, 9, 24, 20, generator=torch.Generator().manual_seed(0))
    logits = []
    for folds in ((0,), (1,), (0, 1)):
        predictor = AutosegPredictor(torch.device("cpu"))
        predictor.initialize_from_trained_model_folder(trained.model, folds)
        logits.append(predictor.predict_logits_from_preprocessed_data(data))
    assert torch.allclose((logits[0] + logits[1]) / 2, logits[2], atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2)


def test_finished_masks_are_kept_and_lost_ones_made_again(trained, tmp_path):
    first = predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(0,))
    first.written[1].unlink()
    stamp = first.written[0].stat().st_mtime_ns
    again = predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(0,))
    assert (again.skipped, again.written) == (first.written[:1], first.written[1:])
    assert first.written[0].stat().st_mtime_ns == stamp


def test_masks_of_two_models_are_not_mixed(trained, tmp_path):
    predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(0,))
    with pytest.raises(SettingsError, match=r"folds \[0\] there"):
        predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(1,))
    predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(1,), overwrite=True)


def test_masks_of_two_precisions_are_not_mixed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.predictor.cpu_has_bfloat16", lambda: True)
    predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(0,))
    record = json.loads((tmp_path / "prediction.json").read_text())
    record.pop("precision")  # as written before there was a choice
    (tmp_path / "prediction.json").write_text(json.dumps(record))
    predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(0,))
    with pytest.raises(SettingsError, match="precision float32 there, bfloat16 asked"):
        predict(trained.scans, tmp_path, dataset=901, device="cpu", folds=(0,), precision="bfloat16")


def test_a_bad_scan_is_reported_at_the_end_and_the_others_finish(trained, tmp_path):
    scans = shutil.copytree(trained.scans, tmp_path / "scans")
    (scans / "aaa_0000.nii.gz").write_bytes(b"not an image")
    with pytest.raises(CasesFailed, match=r"1 of 3[\s\S]*aaa") as caught:
        predict(scans, tmp_path / "masks", dataset=901, device="cpu", folds=(0,))
    assert caught.value.exit_code == 1
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 2


def test_a_scan_that_was_cut_off_is_not_predicted_as_if_the_rest_were_air(trained, tmp_path):
    scans = shutil.copytree(trained.scans, tmp_path / "scans")
    whole = (scans / "case_06_0000.nii.gz").read_bytes()
    (scans / "case_06_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CasesFailed, match="case_06"):
        predict(scans, tmp_path / "masks", dataset=901, device="cpu", folds=(0,))
    assert not (tmp_path / "masks" / "case_06.nii.gz").exists()


def test_one_file_can_be_predicted_and_probabilities_kept(trained, tmp_path):
    scan = trained.scans / "case_06_0000.nii.gz"
    summary = predict(scan, tmp_path, dataset=901, device="cpu", folds=(0,), save_probabilities=True)
    probabilities = np.load(tmp_path / "case_06.npz")["probabilities"]
    assert probabilities.dtype == np.float16
    assert np.allclose(probabilities.astype(np.float32).sum(0), 1, atol=2e-3)
    best = np.sort(probabilities.astype(np.float32), axis=0)
    clear = best[-1] - best[-2] > 2e-3
    assert (probabilities.argmax(0) == read(summary.written[0]))[clear].all()
    assert clear.mean() > 0.99


def test_remapping_is_undone_and_viewers_get_names(trained, copied, tmp_path):
    dataset_json = json.loads((copied / "dataset.json").read_text())
    dataset_json["autoseg"] = {"remap": {"205": 2, "850": 1}}
    (copied / "dataset.json").write_text(json.dumps(dataset_json))
    plain = predict(trained.scans, tmp_path / "plain", model_folder=trained.model, device="cpu", folds=(0,))
    back = predict(trained.scans, tmp_path / "back", model_folder=copied, device="cpu", folds=(0,))
    mask, original = read(plain.written[0]), read(back.written[0])
    assert set(np.unique(original)) == {0, 205, 850}
    assert ((original == 850) == (mask == 1)).all()
    assert mask_values(dataset_json) == {0: "background", 850: "organ", 205: "core"}
    assert "850" in (tmp_path / "back" / "labels.ctbl").read_text()
    snap = (tmp_path / "back" / "labels.label.txt").read_text().splitlines()
    assert [line.split()[0] for line in snap if not line.startswith("#")] == ["0", "205", "850"]


def test_the_model_must_be_clear(trained, tmp_path):
    other = trained.model.with_name("AutosegTrainer-more__tinyPlans__3d_fullres")
    shutil.copytree(trained.model, other)
    try:
        with pytest.raises(
            SettingsError, match=r"--run scratch[\s\S]*--run more|--run more[\s\S]*--run scratch"
        ) as caught:
            predict(trained.scans, tmp_path, dataset=901, device="cpu")
        assert caught.value.exit_code == 2
        assert choose_model(DATASET, run="more") == other
        assert choose_model(DATASET, run="scratch") == trained.model
    finally:
        shutil.rmtree(other)
    with pytest.raises(PlanError, match="no trained model"):
        choose_model(DATASET, folds=(4,))
    with pytest.raises(SettingsError, match="either -d or -m"):
        predict(trained.scans, tmp_path, device="cpu")
    with pytest.raises(DatasetError, match="Not a model folder"):
        predict(trained.scans, tmp_path, model_folder=tmp_path, device="cpu")


def test_the_line_for_nnunet_names_the_folder_and_the_folds(trained):
    line = stock_command(trained.model, (0, 1), "cpu")
    assert line.endswith("-d 901 -p tinyPlans -c 3d_fullres -tr AutosegTrainer -f 0 1 -device cpu")


@pytest.mark.parametrize("place", ["network_class_name", "nonlin"])
@pytest.mark.parametrize(
    "name",
    ["torch.nn.functional.torch.hub.os.system", "dynamic_network_architectures.architectures.unet.torch.hub.os.system"],
)
def test_a_model_that_names_other_code_is_refused_and_nothing_runs(trained, copied, tmp_path, monkeypatch, place, name):
    ran = []
    monkeypatch.setattr(os, "system", lambda *a, **k: ran.append(a))
    plan = json.loads((copied / "plans.json").read_text())
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    if place == "nonlin":
        architecture["arch_kwargs"]["nonlin"] = name
    else:
        architecture["network_class_name"] = name
    (copied / "plans.json").write_text(json.dumps(plan))
    with pytest.raises(UnsafeFile) as caught:
        predict(trained.scans, tmp_path / "masks", model_folder=copied, device="cpu")
    assert caught.value.exit_code == 2
    assert not ran
    assert not (tmp_path / "masks").exists()


class _Attack:
    def __reduce__(self):
        return (os.system, ("touch attacked",))


def test_a_checkpoint_that_runs_code_is_refused(trained, copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)  # the loader alone must refuse
    file = copied / "fold_0" / "checkpoint_final.pth"
    for write in (
        lambda: torch.save({"network_weights": _Attack()}, file),
        lambda: file.write_bytes(pickle.dumps(_Attack())),
    ):
        write()
        with pytest.raises(UnsafeFile):
            predict(trained.scans, tmp_path / "masks", model_folder=copied, device="cpu", folds=(0,))
        assert not (tmp_path / "attacked").exists()


def test_a_broken_checkpoint_is_named(trained, copied, tmp_path):
    file = copied / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(DatasetError, match="checkpoint cannot be read"):
        predict(trained.scans, tmp_path / "masks", model_folder=copied, device="cpu", folds=(0,))


def test_weights_of_another_network_are_refused(trained, copied, tmp_path):
    plan = json.loads((copied / "plans.json").read_text())
    plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [8, 16, 24]
    (copied / "plans.json").write_text(json.dumps(plan))
    with pytest.raises(PlanError, match="does not describe the network"):
        predict(trained.scans, tmp_path / "masks", model_folder=copied, device="cpu")


@pytest.mark.parametrize(
    ("options", "learned"), [({"dims": 2}, (1,)), ({"channels": 2}, (1, 2)), ({"regions": True}, (1, 2))], ids=str
)
def test_other_kinds_of_data_are_trained_and_predicted(tmp_path, options, learned):
    model = train_tiny(tmp_path, **options)
    summary = predict(model.scans, tmp_path / "masks", dataset=901, device="cpu")
    for mask in summary.written:
        reference = read(model.references / mask.name)
        assert all(dice(read(mask) >= value, reference >= value) > 0.7 for value in learned)
