"""The configuration `2d_vit[_SIZE]`: its resolution, own data, sizes, patch and batch by memory (meddinov3.md 2.4)."""

from __future__ import annotations

import math

import pytest
import torch

from planners.configurations import carried_over, configuration_like, derivable, with_configuration
from planners.errors import PlanError
from planners.plans import preprocessing_hash, resolved
from planners.vit import SIZES, training_gb
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.networks.dino import MedDINOv3
from tests.test_configurations import plan_for, rows
from tests.tiny import dataset_json


def vit_plan(name="2d_vit", *, patch=(512, 512), spacing=(5, 0.78125, 0.78125), memory=80.0, **options) -> dict:
    plan = plan_for(dims=2, median=(1, *patch), spacing=spacing, memory=memory, **options)
    plan["configurations"]["2d"] |= {"patch_size": list(patch), "batch_size": 12}
    return with_configuration(plan, name)


def vit(name="2d_vit", **options) -> dict:
    return resolved(vit_plan(name, **options), name)


@pytest.mark.parametrize(
    ("budget", "name", "size"),
    [
        ("full", "2d_vit", (768, 12, 12)),
        ("full", "2d_vit_base", (768, 12, 12)),
        ("full", "2d_vit_small", (384, 12, 6)),
        ("full", "2d_vit_tiny", (192, 12, 3)),
        ("cpu", "2d_vit", (96, 4, 3)),
        ("cpu", "2d_vit_small", (384, 12, 6)),
    ],
)
def test_the_size_follows_from_the_name_and_the_budget(budget, name, size):
    arguments = vit(name, budget=budget)["architecture"]["arch_kwargs"]
    assert tuple(arguments[key] for key in ("embed_dim", "depth", "num_heads")) == size
    assert arguments["use_checkpoint"] == (budget == "full")
    assert derivable(name)
    assert not derivable("2d_vit_large")


@pytest.mark.parametrize(("name", "width", "taken"), [("2d_vit_last", 768, [11]), ("2d_vit_small_last", 384, [11])])
def test_the_last_block_alone_is_a_choice(name, width, taken):
    """For the paper's ablation: a decoder of 1.57 M parameters at base size and one class (meddinov3.md 2.2)."""
    arguments = vit(name)["architecture"]["arch_kwargs"]
    assert (arguments["embed_dim"], arguments["taken"]) == (width, taken)
    assert not derivable("2d_vit_last_small")
    if width == 768:
        with torch.device("meta"):
            decoder = MedDINOv3(1, 1, **arguments).decoder
        assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(1.57, abs=0.01)


def test_the_papers_slices_are_enlarged_as_in_the_paper():
    """README of ricklisz/MedDINOv3: 512² of 0.78125 mm become 896² of 0.4464 mm."""
    configuration = vit()
    assert configuration["patch_size"] == [896, 896]
    assert configuration["spacing"] == pytest.approx([0.4464] * 2, abs=5e-5)
    assert configuration["median_image_size_in_voxels"] == pytest.approx([896] * 2)
    assert "1.75 times as many" in rows(configuration)["patch, voxels"]
    assert "0.781×0.781" in rows(configuration)["spacing, mm"]


@pytest.mark.parametrize(
    ("shown", "patch"),
    [
        ((512, 512), [896, 896]),
        ((256, 224), [896, 784]),
        ((100, 92), [400, 368]),  # at most 4 times
        ((56, 40), [320, 224]),  # but at least 224
        ((1024, 512), [896, 448]),  # shrunk
        ((1024, 32), [5008, 160]),  # 224 on the shorter side would be 6272 tokens
    ],
)
def test_the_patch_is_in_multiples_of_a_token_between_its_limits(shown, patch):
    configuration = vit(patch=shown)
    assert configuration["patch_size"] == patch
    assert math.prod(patch) <= 56 * 56 * 256


@pytest.mark.parametrize(
    ("shown", "patch"), [((256, 256), [224, 224]), ((320, 200), [352, 224]), ((40, 56), [224, 320])]
)
def test_the_small_plan_has_224_pixels_on_its_shorter_side(shown, patch):
    configuration = vit(patch=shown, budget="cpu")
    assert (configuration["patch_size"], configuration["batch_size"]) == (patch, 2)


def test_the_patch_shows_the_same_on_each_axis():
    configuration = vit(patch=(250, 171), spacing=(5, 0.7, 0.9))
    seen = [n * s for n, s in zip(configuration["patch_size"], configuration["spacing"], strict=True)]
    assert seen == pytest.approx([250 * 0.7, 171 * 0.9], rel=1e-9)


def test_its_data_are_its_own_and_those_of_all_sizes():
    plan = with_configuration(vit_plan("2d_vit"), "2d_vit_small")
    identifiers = [resolved(plan, name)["data_identifier"] for name in ("2d", "2d_vit", "2d_vit_small")]
    assert identifiers[1] == identifiers[2] != identifiers[0]
    assert identifiers[1].startswith("autoseg_")
    assert preprocessing_hash(plan, "2d_vit") != preprocessing_hash(plan, "2d")
    other = vit_plan(patch=(256, 256))
    assert resolved(other, "2d_vit")["data_identifier"] != identifiers[1]
    assert set(carried_over(plan, plan_for(dims=2))) == {"2d_vit", "2d_vit_small"}


def test_the_patch_shrinks_with_the_memory_and_says_so():
    configuration = vit(memory=8)
    patch, arguments = configuration["patch_size"], configuration["architecture"]["arch_kwargs"]
    assert configuration["batch_size"] == 2
    assert patch[0] == patch[1] < 896
    needed, more = (training_gb([n, n], arguments, 2, half=True, labels=3) for n in (patch[0], patch[0] + 16))
    assert needed <= 8 < more
    assert "896×896 would be too many for 8 GB" in rows(configuration)["patch, voxels"]
    with pytest.raises(PlanError, match=r"2d_vit_small"):
        vit(memory=0.5)


def test_the_batch_grows_with_the_memory_up_to_that_of_2d():
    batches = [vit("2d_vit_small", memory=memory)["batch_size"] for memory in (6, 12, 1000)]
    assert 2 <= batches[0] < batches[1] < batches[2] == 12


@pytest.mark.parametrize(
    ("size", "patch", "batch", "labels", "measured"),
    [
        ("base", (896, 896), 2, 14, 9.13),
        ("base", (640, 320), 4, 3, 4.596),
        ("small", (512, 512), 2, 40, 1.684),
        ("tiny", (224, 224), 2, 14, 0.307),
    ],
)
def test_the_memory_estimate_is_what_was_measured_or_a_little_more(size, patch, batch, labels, measured):
    estimate = training_gb(patch, {**SIZES[size], "taken": None}, batch, half=size != "tiny", labels=labels)
    assert 1 <= estimate / measured <= 1.12


def test_plan_and_network_agree():
    plan = vit_plan(budget="cpu", patch=(40, 56))
    info = encoder_info(plan, "2d_vit", dataset_json())
    assert (info.spatial_dims, info.total_stride, info.features) == (2, (16, 16), (96,) * 4)
    network = build_segmentation_network(plan, "2d_vit", dataset_json())
    assert network.encoder.blocks[3].drop_path2.drop_prob == 0.2


def test_weights_bring_their_network_and_the_rule_the_patch():
    theirs = {
        "network_class_name": "pretrain.networks.MedDINOv3",
        "arch_kwargs": {"embed_dim": 96, "depth": 4, "num_heads": 3, "taken": [3], "eps": 1e-6, "qkv_bias": True,
                        "drop_path": 0.1, "use_checkpoint": False},
        "_kw_requires_import": [],
    }  # fmt: skip
    plan = vit_plan(patch=(256, 256))
    content = configuration_like(plan, theirs)
    assert content["inherits_from"] == "2d"
    assert content["architecture"]["arch_kwargs"] == {**theirs["arch_kwargs"], "use_checkpoint": True}
    assert content["data_identifier"] == resolved(plan, "2d_vit")["data_identifier"]


def test_sizes_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(PlanError, match=r"2d_vit\[_SIZE\] \(SIZE: tiny, small, base, last, tiny_last"):
        vit("2d_vit_large")
