"""nnU-Net in and out: stock nnU-Net predicts our models without us, and we predict its models."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from planners import paths
from planners.preprocessed_case import preprocess_case
from tests.tiny import DATASET, dataset_json, tiny_plan
from tests.trained import Trained, dice, read, train_tiny
from trainers.checkpoint import load_checkpoint
from trainers.predict import predict
from trainers.predictor import AutosegPredictor
from trainers.runs import stock_command

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("planners", "pretrain", "trainers", "autoseg"):
            raise ImportError(name + " is not importable here")

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def session_model(tmp_path_factory) -> Trained:
    """Trained at another spacing than the scans have, so that masks are resampled."""
    return train_tiny(tmp_path_factory.mktemp("model"), spacing=(2.5, 1.3, 1.2))


@pytest.fixture
def trained(session_model):
    paths.configure(session_model.root)
    return session_model


def test_stock_nnunet_predicts_our_model_without_our_packages(trained, tmp_path):
    ours = predict(trained.scans, tmp_path / "ours", dataset=901, device="cpu")

    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    # Spawned workers of nnU-Net start afresh: only the environment reaches them.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("nnUNet", "AUTOSEG", "TORCH_"))
    }
    environment |= {f"nnUNet_{part}": os.environ[f"nnUNet_{part}"] for part in ("raw", "preprocessed", "results")}
    environment["PYTHONPATH"] = str(tmp_path)
    for package in ("planners", "trainers"):
        blocked = subprocess.run(
            [sys.executable, "-c", f"import {package}"], env=environment, cwd=tmp_path, check=False
        )
        assert blocked.returncode == 1
    arguments = stock_command(trained.model, (0,), "cpu").split()[1:]
    arguments = [{"INPUT": str(trained.scans), "OUTPUT": str(tmp_path / "stock")}.get(a, a) for a in arguments]
    start = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    predictor = AutosegPredictor(torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(trained.model)
    for mask in ours.written:
        mine, theirs, reference = (read(f / mask.name) for f in (mask.parent, tmp_path / "stock", trained.references))
        assert all(dice(mine == value, reference == value) >= 0.3 for value in (1, 2))
        equal = mine == theirs
        assert equal.mean() >= 0.999
        clear = margin(predictor, trained.scans / mask.name.replace(".nii", "_0000.nii")) > 1e-2
        assert clear.mean() > 0.9
        assert equal[clear].mean() >= 0.9999


def margin(predictor: AutosegPredictor, scan) -> np.ndarray:
    """Difference of the two best float32 logits on the grid of the scan (z, y, x)."""
    settings = predictor.configuration_manager
    image, _, properties = preprocess_case(
        [scan], None, predictor.plans_manager.plans, predictor.configuration_name, predictor.dataset_json
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    shape = properties["shape_after_cropping_and_before_resampling"]
    assert tuple(shape) == tuple(properties["shape_before_cropping"])
    logits = settings.resampling_fn_probabilities(logits, shape, settings.spacing, properties["spacing"])
    best = np.sort(np.asarray(logits), axis=0)
    return best[-1] - best[-2]


def test_a_stock_nnunet_model_folder_is_predicted(trained, tmp_path, monkeypatch):
    """Trained by nnU-Net's own trainer for a moment; then given weights whose masks are worth comparing."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plan = tiny_plan()
    plan["configurations"]["3d_fullres"]["spacing"] = [2.5, 1.3, 1.2]
    (paths.preprocessed(DATASET) / "dataset_fingerprint.json").write_text("{}")
    stock = nnUNetTrainer({**plan, "continue_training": False}, "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    stock.num_epochs, stock.num_iterations_per_epoch, stock.num_val_iterations_per_epoch = 1, 2, 1
    stock.run_training()
    weights = load_checkpoint(trained.model / "fold_0" / "checkpoint_final.pth")["network_weights"]
    stock.network.load_state_dict(weights)
    stock.save_checkpoint(stock.output_folder + "/checkpoint_final.pth")
    with pytest.raises(Exception, match="weights_only"):
        torch.load(stock.output_folder + "/checkpoint_final.pth", weights_only=True)  # it does hold numpy

    theirs = predict(trained.scans, tmp_path / "stock", model_folder=stock.output_folder_base, device="cpu")
    ours = predict(trained.scans, tmp_path / "ours", model_folder=trained.model, device="cpu")
    assert theirs.model.name == "nnUNetTrainer__tinyPlans__3d_fullres"
    assert all((read(a) == read(b)).all() for a, b in zip(theirs.written, ours.written, strict=True))


def test_nnunet_finds_our_trainer_through_the_shim(trained, tmp_path, monkeypatch):
    import trainers.nnunet_ext.autoseg_trainers as shim
    from trainers.base import AutosegTrainer

    monkeypatch.setenv("nnUNet_extTrainer", os.path.dirname(shim.__file__))  # noqa: PTH120
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    assert recursive_find_trainer_class_by_name("AutosegTrainer") is AutosegTrainer
