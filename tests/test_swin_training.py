"""SwinUNETR from end to end: VoCo, training from it, prediction by autoseg and by stock nnU-Net."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from planners import paths
from planners.configurations import ensure_configuration, with_configuration
from planners.plans import load_plan
from pretrain.catalog import entry
from pretrain.checkpoint import load_encoder
from pretrain.encoders import build_segmentation_network, encoder_info, encoder_of
from pretrain.loop import pretrain
from pretrain.method import Target
from pretrain.methods.voco import VoCo, VoCoConfig
from pretrain.transfer import transfer
from pretrain.volumes import CaseInfo
from tests.test_nnunet_roundtrip import margin
from tests.tiny import DATASET, dataset_json, tiny_plan, write_tiny_dataset, write_tiny_plan
from tests.trained import predict_with_nnunet, read
from trainers.base import AutosegTrainer
from trainers.checkpoint import load_checkpoint
from trainers.predict import predict
from trainers.predictor import AutosegPredictor
from trainers.train import train

NAME = "3d_fullres_swin_12"
SETTINGS = {"epochs": 1, "iterations": 2}
# Enough for masks that are more than ties, which nnU-Net's half precision decides otherwise.
DECIDED = {"epochs": 1, "iterations": 8, "lr": 2e-3}


def swin_plan(spacing=(2.5, 1.1, 1.0), median=(13.0, 27.0, 22.0)) -> dict:
    plan = tiny_plan()
    plan["autoseg"] = {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}
    plan["configurations"]["3d_fullres"] |= {
        "spacing": list(spacing),
        "median_image_size_in_voxels": list(median),
    }
    return plan


@pytest.fixture
def tiny(tmp_path):
    write_tiny_dataset(tmp_path, cases=5, test_cases=1)
    return tmp_path


def trainer_of(plan) -> AutosegTrainer:
    return AutosegTrainer(plan, NAME, 0, dataset_json(), torch.device("cpu"))


def test_the_trainer_takes_the_recipe_and_no_deep_supervision(tiny):
    plan = with_configuration(swin_plan(), NAME)
    trainer = trainer_of(plan)
    assert not trainer.enable_deep_supervision
    assert (trainer.settings.optimizer, trainer.settings.lr, trainer.settings.schedule) == ("adamw", 3e-4, "cosine")
    trainer.set_deep_supervision_enabled(True)  # there is nothing to switch
    unet = AutosegTrainer(swin_plan(), "3d_fullres", 0, dataset_json(), torch.device("cpu"))
    assert unet.enable_deep_supervision
    assert unet.settings.schedule == "poly"


def test_the_encoder_is_a_group_of_the_optimiser(tiny):
    trainer = trainer_of(with_configuration(swin_plan(), NAME))
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, trainer.enable_deep_supervision
    )
    optimiser, _ = trainer.configure_optimizers()
    encoder, others = ({id(p) for p in group["params"]} for group in optimiser.param_groups)
    assert encoder == {id(p) for p in trainer.network.encoder.parameters()}
    assert encoder | others == {id(p) for p in trainer.network.parameters()}
    assert not encoder & others
    assert others


@pytest.mark.parametrize(("budget", "crop", "warned"), [("full", (64, 64, 64), False), ("cpu", (64, 64, 32), True)])
def test_vocos_crops_are_64_voxels_or_it_warns(budget, crop, warned, caplog):
    median = (128.0, 140.0, 150.0)
    plan = swin_plan((1.0, 1.0, 1.0), median)
    plan["autoseg"]["budget"] = budget
    plan = with_configuration(plan, NAME)
    target = Target(plan, NAME, encoder_info(plan, NAME, dataset_json()))
    shape = tuple(int(n) for n in median)
    case = CaseInfo(
        "case", "memory", shape, (1.0,) * 3, (1.0,) * 3, 1, tuple((0, n) for n in shape), 0.0, (0.0, 1.0), 1.0
    )
    caplog.set_level(logging.WARNING, "autoseg")
    assert VoCo.plan(target, [case], VoCoConfig()).layout.crop == crop
    assert ("deepest map" in caplog.text) == warned


def test_voco_can_pretrain_swin_but_not_primus():
    assert "SwinUNETR" in entry("voco").networks
    assert "Primus" not in entry("voco").networks


def test_vocos_first_version_averages_a_second_swin_encoder():
    plan = with_configuration(swin_plan((1.0, 1.0, 1.0), (128.0, 140.0, 150.0)), NAME)
    target = Target(plan, NAME, encoder_info(plan, NAME, dataset_json()))
    case = CaseInfo("case", "memory", (128,) * 3, (1.0,) * 3, (1.0,) * 3, 1, ((0, 128),) * 3, 0.0, (0.0, 1.0), 1.0)
    config = VoCoConfig(variant="v1", hidden=16, export_teacher=True)
    network = build_segmentation_network(plan, NAME, dataset_json())
    method = VoCo(network, VoCo.plan(target, [case], config), config)
    teacher = method.export().module
    assert teacher.state_dict().keys() == network.encoder.state_dict().keys()
    own, averaged = ({id(p) for p in module.parameters()} for module in (network, teacher))
    assert not own & averaged
    assert any(pair.average is teacher for pair in method.momentum_pairs())
    assert {id(p) for p in method.encoder.parameters()} < own


def test_an_encoder_saved_under_the_published_names_fills_a_new_network(tiny):
    plan = with_configuration(swin_plan(), NAME)
    torch.manual_seed(1)
    tensors = encoder_of(build_segmentation_network(plan, NAME, dataset_json())).state_dict()
    other = build_segmentation_network(plan, NAME, dataset_json())
    before = {name: t.clone() for name, t in other.state_dict().items()}
    report = transfer(tensors, encoder_of(other))
    assert report.encoder_share == 1
    after = other.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    untouched = [name for name in after if name not in tensors]
    assert len(untouched) == 22
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_training_makes_the_configuration_resumes_and_predicts(tiny, caplog):
    write_tiny_plan(swin_plan())
    caplog.set_level(logging.INFO, "autoseg")
    ensure_configuration(DATASET, "tinyPlans", NAME)
    fold = train(901, plan="tinyPlans", configuration=NAME, settings=SETTINGS, device="cpu")[0]
    content = load_checkpoint(fold / "checkpoint_final.pth")
    plan = load_plan(DATASET, "tinyPlans")
    network = build_segmentation_network(plan, NAME, dataset_json())
    assert content["network_weights"].keys() == network.state_dict().keys()
    assert content["trainer_name"] == "nnUNetTrainer"
    assert (fold / "validation" / "summary.json").is_file()
    resumed = trainer_of({**plan, "autoseg": {**plan["autoseg"]}})
    resumed.load_checkpoint(str(fold / "checkpoint_final.pth"))
    assert resumed.current_epoch == 1


@pytest.mark.slow
def test_voco_training_and_both_ways_to_predict(tiny, tmp_path):
    """About two minutes on one core: the crops of VoCo are 32×64×64 voxels."""
    write_tiny_plan(swin_plan((1.25, 0.4, 0.33), (26.0, 74.0, 66.0)))
    encoder = pretrain(
        DATASET, method="voco", plan="tinyPlans", configuration=NAME, device="cpu", steps=2, workers=0,
        settings={"voco.hidden": "16", "voco.grid": "1,2,1", "voco.volumes": "1", "voco.random_crops": "1"},
    )  # fmt: skip
    tensors, card = load_encoder(encoder)
    assert card.architecture["network_class_name"] == "pretrain.networks.SwinUNETR"
    assert len(tensors) == 145
    fold = train(901, plan="tinyPlans", configuration=NAME, pretrained="voco", settings=DECIDED, device="cpu")[0]
    scans = paths.raw(DATASET) / "imagesTs"
    ours = predict(scans, tmp_path / "ours", model_folder=fold.parent, device="cpu")

    predict_with_nnunet(fold.parent, scans, tmp_path / "stock")
    predictor = AutosegPredictor(torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(fold.parent)
    for mask in ours.written:
        mine = read(mask)
        equal = mine == read(tmp_path / "stock" / mask.name)
        clear = margin(predictor, scans / mask.name.replace(".nii", "_0000.nii")) > 1e-2
        assert clear.mean() > 0.9
        assert equal[clear].mean() >= 0.9999
        assert equal.mean() >= 0.999
        assert len(np.unique(mine)) > 1  # a mask without structures would agree whatever the weights are
