"""Configurations added to a plan: by rule, for somebody else's network, kept when the plan is made again."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch

from autoseg import commands
from autoseg.console import print_plans
from planners import paths
from planners.configurations import (
    carried_over,
    configuration_like,
    derivable,
    ensure_configuration,
    with_configuration,
)
from planners.dataset import load_dataset
from planners.errors import PlanError
from planners.fingerprint import fingerprint
from planners.intensity import parse_scheme
from planners.planner import Overrides, plan_dataset
from planners.plans import load_plan, plan_hash, plan_path, preprocessing_hash, resolved
from planners.swin import training_gb
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.loop import pretrain
from tests.test_swin import PRIMUS, SWIN
from tests.tiny import DATASET, dataset_json, tiny_plan, write_tiny_dataset, write_tiny_plan

UNET = tiny_plan()["configurations"]["3d_fullres"]["architecture"]


def plan_for(median=(100, 300, 300), spacing=(2.5, 1.1, 1.0), *, budget="full", memory=8.0, **options) -> dict:
    plan = tiny_plan(**options)
    plan["autoseg"] = {"budget": budget, "gpu_memory_gb": memory, "labels": 3}
    for configuration in plan["configurations"].values():
        dims = len(configuration["spacing"])
        configuration["median_image_size_in_voxels"] = list(median)[3 - dims :]
        configuration["spacing"] = list(spacing)[3 - dims :]
    return plan


def swin(name="3d_fullres_swin", **options) -> dict:
    return resolved(with_configuration(plan_for(**options), name), name)


def rows(configuration) -> dict[str, str]:
    return {row["name"]: row["because"] for row in configuration["autoseg"]["decisions"]}


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("3d_fullres_swin", True),
        ("3d_fullres_swin_96", True),
        ("3d_fullres_swin1", True),
        ("3d_fullres_swin1_24", True),
        ("3d_fullres_swin_50", False),  # no multiple of 12
        ("3d_fullres_swin_0", False),
        ("3d_fullres_swin_", False),
        ("3d_fullres", False),
        ("2d_swin", False),
        ("3d_fullres_swin2", False),
        ("3d_fullres_sac", True),
        ("3d_fullres_sac_l", True),
        ("3d_fullres_sac_96", False),
        ("3d_fullres_swin_b", False),
    ],
)
def test_only_names_of_the_table_are_derivable(name, yes):
    assert derivable(name) == yes


@pytest.mark.parametrize(
    ("budget", "name", "features", "use_v2", "use_checkpoint", "patch"),
    [
        ("full", "3d_fullres_swin", 48, True, True, [96, 96, 96]),
        ("full", "3d_fullres_swin_12", 12, True, True, [96, 96, 96]),
        ("full", "3d_fullres_swin1", 48, False, True, [96, 96, 96]),
        ("cpu", "3d_fullres_swin", 12, True, False, [64, 64, 64]),
        ("cpu", "3d_fullres_swin1_24", 24, False, False, [64, 64, 64]),
    ],
)
def test_swin_follows_from_its_name_and_the_budget(budget, name, features, use_v2, use_checkpoint, patch):
    configuration = swin(name, budget=budget)
    arguments = configuration["architecture"]["arch_kwargs"]
    assert (arguments["feature_size"], arguments["use_v2"]) == (features, use_v2)
    assert arguments["use_checkpoint"] == use_checkpoint
    assert (configuration["patch_size"], configuration["batch_size"]) == (patch, 2)


def test_the_patch_ends_where_the_median_case_does():
    assert swin(median=(20, 70, 300))["patch_size"] == [32, 96, 96]


def test_the_deepest_map_keeps_two_voxels_in_scans_of_one_block():
    """Instance normalisation of one voxel is an error, in training and in prediction."""
    configuration = swin(median=(13, 27, 22), budget="cpu")
    assert configuration["patch_size"] == [32, 64, 32]
    plan = with_configuration(plan_for(median=(13, 27, 22), budget="cpu"), "3d_fullres_swin")
    network = build_segmentation_network(plan, "3d_fullres_swin", dataset_json())
    assert network(torch.zeros(1, 1, *configuration["patch_size"])).shape == (1, 3, 32, 64, 32)


def test_the_patch_shrinks_with_the_memory_and_says_so():
    configuration = swin("3d_fullres_swin_48", memory=4)
    patch = configuration["patch_size"]
    assert patch == [64, 96, 96]  # equal numbers of voxels: the slice axis is the longest in mm, so it goes first
    assert training_gb(patch, 48, 2, checkpointing=True, labels=3) <= 4
    assert "shrunk from 96×96×96 to fit into 4 GB" in rows(configuration)["patch, voxels"]
    assert "not measured on a GPU" in rows(configuration)["patch, voxels"]


def test_a_batch_of_one_where_two_do_not_fit_and_an_error_where_none_does():
    one = (
        training_gb((64, 32, 32), 48, 1, checkpointing=True) + training_gb((64, 32, 32), 48, 2, checkpointing=True)
    ) / 2
    configuration = swin(memory=one)
    assert configuration["batch_size"] == 1
    assert "two do not fit" in rows(configuration)["batch"]
    with pytest.raises(PlanError, match=r"--gpu-memory 22"):
        swin("3d_fullres_swin_192")


@pytest.mark.parametrize(
    ("patch", "features", "checkpointing", "measured"),
    [((96, 96, 96), 48, True, 5.03), ((64, 64, 64), 12, False, 2.01), ((32, 96, 96), 24, True, 1.73)],
)
def test_the_memory_estimate_is_what_was_measured(patch, features, checkpointing, measured):
    assert training_gb(patch, features, 2, checkpointing=checkpointing) == pytest.approx(measured, rel=0.09)


def test_an_added_configuration_uses_its_parents_data_and_changes_nothing_else():
    plan = plan_for()
    before = copy.deepcopy(plan)
    added = with_configuration(plan, "3d_fullres_swin")
    assert plan == before
    assert json.loads(json.dumps(added)) == added
    assert preprocessing_hash(added, "3d_fullres_swin") == preprocessing_hash(plan, "3d_fullres")
    assert plan_hash(added, "3d_fullres") == plan_hash(plan, "3d_fullres")
    content = added["configurations"]["3d_fullres_swin"]
    assert set(content) == {"inherits_from", "patch_size", "batch_size", "architecture", "batch_dice", "autoseg"}
    assert content["autoseg"]["DA"] == 1
    assert content["autoseg"]["DA_per_stage"] == [1] * 5
    info = encoder_info(added, "3d_fullres_swin", dataset_json())
    assert info.features == (48, 48, 96, 192, 768)
    assert info.total_stride == (32, 32, 32)


def test_the_same_again_is_no_change_and_another_content_is_refused():
    added = with_configuration(plan_for(), "3d_fullres_swin")
    content = added["configurations"]["3d_fullres_swin"]
    assert with_configuration(added, "3d_fullres_swin") == added
    assert with_configuration(added, "3d_fullres_swin", content) == added
    with pytest.raises(PlanError, match="another configuration"):
        with_configuration(added, "3d_fullres_swin", {**content, "batch_size": 7})


def test_what_does_not_exist_is_refused_with_what_could_be_made():
    with pytest.raises(PlanError, match=r"no configuration nonsense(.|\n)*3d_fullres_swin\[_SIZE\]"):
        with_configuration(plan_for(), "nonsense")
    with pytest.raises(PlanError, match="no configuration 3d_fullres_swin"):
        with_configuration(plan_for(dims=2), "3d_fullres_swin")


def test_ensuring_writes_once_and_says_so(tmp_path, caplog):
    paths.configure(tmp_path)
    write_tiny_plan(plan_for())
    caplog.set_level(logging.INFO, "autoseg")
    assert (
        "3d_fullres_swin"
        in ensure_configuration(DATASET, "tinyPlans", "3d_fullres_swin", write=False)["configurations"]
    )
    assert "3d_fullres_swin" not in load_plan(DATASET, "tinyPlans")["configurations"]
    plan = ensure_configuration(DATASET, "tinyPlans", "3d_fullres_swin")
    assert load_plan(DATASET, "tinyPlans") == plan
    written = plan_path(DATASET, "tinyPlans").stat().st_mtime_ns
    assert ensure_configuration(DATASET, "tinyPlans", "3d_fullres_swin") == plan
    assert plan_path(DATASET, "tinyPlans").stat().st_mtime_ns == written
    assert caplog.text.count("Added the configuration 3d_fullres_swin to tinyPlans") == 1
    with pytest.raises(PlanError, match="no configuration 2d"):
        ensure_configuration(DATASET, "tinyPlans", "2d")


@pytest.fixture
def planned(tmp_path):
    write_tiny_dataset(tmp_path, cases=2)
    dataset = load_dataset(DATASET)
    measured = fingerprint(dataset)

    def plan(**overrides):
        return plan_dataset(dataset, measured, Overrides(**overrides))

    return plan


def test_planning_again_keeps_what_was_added(planned):
    planned()
    plan = ensure_configuration(DATASET, "autosegPlans", "3d_fullres_swin")
    own = configuration_like(plan, PRIMUS)
    plan_path(DATASET, "autosegPlans").write_text(json.dumps(with_configuration(plan, "3d_mine", own)))
    assert planned().written == []
    assert plan["configurations"]["3d_fullres_swin"]["batch_size"] == 2
    pair = planned(gpu_memory_gb=1.6)
    assert pair.full["configurations"]["3d_mine"] == own
    assert pair.full["autoseg"]["gpu_memory_gb"] == 1.6
    assert pair.full["configurations"]["3d_fullres_swin"]["batch_size"] == 1  # derived again
    other = planned(spacing=(3.0, 1.5, 1.5)).full["configurations"]
    assert "3d_fullres_swin" in other
    assert "3d_mine" not in other


@pytest.mark.parametrize("name", ["3d_fullres_swin", "3d_mine"])
def test_an_added_configuration_something_was_trained_from_is_immutable(planned, name):
    planned()
    plan = ensure_configuration(DATASET, "autosegPlans", "3d_fullres_swin")
    content = with_configuration(plan, "3d_mine", configuration_like(plan, PRIMUS))
    plan_path(DATASET, "autosegPlans").write_text(json.dumps(content))
    fold = paths.results(DATASET) / f"AutosegTrainer__autosegPlans__{name}" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_bytes(b"")
    assert planned().written == []
    with pytest.raises(PlanError, match=f"(?s)changes in.*{name}.*--plan-name"):
        planned(intensity=(parse_scheme("minmax"),))
    assert load_plan(DATASET, "autosegPlans") == content


def test_planning_for_a_derivable_configuration_adds_it_to_both_plans(tmp_path):
    root = write_tiny_dataset(tmp_path, cases=2)
    shown = []
    pair = commands.plan_and_preprocess(
        901, configurations=["3d_fullres_swin"], workers=1, root=root, on_planned=shown.append
    )
    assert shown == [pair]
    for plan, features in ((pair.full, 48), (pair.cpu, 12)):
        written = load_plan(DATASET, plan["plans_name"])["configurations"]["3d_fullres_swin"]
        assert written == plan["configurations"]["3d_fullres_swin"]
        assert written["architecture"]["arch_kwargs"]["feature_size"] == features
    print_plans(pair)  # a child has no spacing of its own
    data = paths.preprocessed(DATASET) / pair.full["configurations"]["3d_fullres"]["data_identifier"]
    assert len(list(data.glob("*.b2nd"))) == 4
    with pytest.raises(PlanError, match="no configuration nonsense"):
        commands.plan_and_preprocess(901, configurations=["nonsense"], workers=1, root=root)


def test_pretraining_makes_a_missing_configuration_but_showing_it_does_not(tmp_path):
    write_tiny_dataset(tmp_path, cases=2)
    write_tiny_plan(plan_for(median=(13, 27, 22), budget="cpu"))
    options = {"method": "voco", "plan": "tinyPlans", "configuration": "3d_fullres_swin", "device": "cpu", "workers": 0}
    pretrain(DATASET, show_config=True, **options)
    assert "3d_fullres_swin" not in load_plan(DATASET, "tinyPlans")["configurations"]
    with pytest.raises(PlanError, match="too small for VoCo"):  # VoCo cannot cut these scans for a network of stride 32
        pretrain(DATASET, **options)
    assert "3d_fullres_swin" in load_plan(DATASET, "tinyPlans")["configurations"]


def test_stages_a_plan_no_longer_has_are_not_carried_over():
    old = with_configuration(plan_for(), "3d_fullres_swin")
    old["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    assert set(carried_over(old, plan_for())) == {"3d_fullres_swin"}
    assert carried_over(old, plan_for(dims=2)) == {}


@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_a_unet_takes_the_plans_strides_and_kernels(network):
    theirs = copy.deepcopy(UNET)
    theirs["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{network}"
    blocks = "n_conv_per_stage" if network == "PlainConvUNet" else "n_blocks_per_stage"
    theirs["arch_kwargs"] |= {
        "n_stages": 6,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
        "kernel_sizes": [[3, 3, 3]] * 6,
        "n_conv_per_stage_decoder": [2] * 5,
        "nonlin": "torch.nn.ReLU",
    }
    del theirs["arch_kwargs"]["n_blocks_per_stage"]
    theirs["arch_kwargs"][blocks] = [1, 2, 2, 2, 2, 2]
    plan = plan_for(median=(24, 100, 100), spacing=(4.0, 1.0, 1.0))
    content = configuration_like(plan, theirs, patch_size=(64, 96, 96))
    arguments = content["architecture"]["arch_kwargs"]
    assert content["patch_size"] == [24, 96, 96]
    assert arguments["strides"] == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert arguments["kernel_sizes"][:3] == [[1, 3, 3], [1, 3, 3], [3, 3, 3]]
    assert arguments["features_per_stage"] == [32, 64, 128, 256, 320]
    assert arguments[blocks] == [1, 2, 2, 2, 2]
    assert (arguments["nonlin"], arguments["n_conv_per_stage_decoder"]) == ("torch.nn.ReLU", [2] * 4)
    assert content["autoseg"]["DA"] == 2
    assert content["autoseg"]["DA_per_stage"] == [2, 1, 0, 0, 0]
    name = "3d_fullres_theirs"
    network = build_segmentation_network(with_configuration(plan, name, content), name, dataset_json())
    assert len(network(torch.zeros(1, 1, *content["patch_size"]))) == 4


def test_a_unets_patch_shrinks_with_the_memory():
    wanted = {"patch_size": (96, 288, 288)}
    large, small = (configuration_like(plan_for(memory=memory), UNET, **wanted)["patch_size"] for memory in (24, 0.5))
    assert all(a <= b for a, b in zip(small, large, strict=True))
    assert torch.tensor(small).prod() < torch.tensor(large).prod() / 3
    cpu = configuration_like(plan_for(budget="cpu", memory=24), UNET, **wanted)["patch_size"]
    assert torch.tensor(cpu).prod() <= 48**3
    with pytest.raises(PlanError, match="--gpu-memory"):
        configuration_like(plan_for(memory=1e-5), UNET)


def test_a_volume_network_becomes_a_slice_network_on_a_plan_of_slices():
    plan = plan_for(dims=2)
    content = configuration_like(plan, UNET, patch_size=(16, 64, 64))
    assert content["inherits_from"] == "2d"
    assert content["architecture"]["arch_kwargs"]["norm_op"].endswith("InstanceNorm2d")
    network = build_segmentation_network(with_configuration(plan, "2d_theirs", content), "2d_theirs", dataset_json())
    assert network(torch.zeros(1, 1, *content["patch_size"]))[0].shape[1] == 3


def test_primus_gets_a_patch_of_whole_tokens():
    plan = plan_for(median=(10, 50, 40))
    content = configuration_like(plan, PRIMUS, patch_size=(16, 64, 33))
    arguments = content["architecture"]["arch_kwargs"]
    assert content["patch_size"] == arguments["input_shape"] == [10, 52, 32]
    assert PRIMUS["arch_kwargs"]["input_shape"] == [4, 12, 16]
    assert encoder_info(with_configuration(plan, "p", content), "p", dataset_json()).total_stride == (2, 4, 8)
    tight = configuration_like(plan_for(memory=0.005), PRIMUS, patch_size=(96, 96, 96))
    assert torch.tensor(tight["patch_size"]).prod() < 96**3 / 8
    assert "shrunk" in rows(tight)["patch, voxels"]


def test_swin_like_weights_keeps_their_sizes_and_the_rules_patch():
    theirs = {**SWIN, "arch_kwargs": {**SWIN["arch_kwargs"], "depths": [2, 2, 6, 2], "use_v2": False}}
    content = configuration_like(plan_for(), theirs, patch_size=(64, 80, 128))
    arguments = content["architecture"]["arch_kwargs"]
    assert content["patch_size"] == [64, 64, 128]
    assert (arguments["depths"], arguments["use_v2"], arguments["use_checkpoint"]) == ([2, 2, 6, 2], False, True)


def test_a_network_without_a_rule_is_refused():
    with pytest.raises(PlanError, match="No rule"):
        configuration_like(plan_for(), {"network_class_name": "a.b.UMamba", "arch_kwargs": {}})
