"""The configuration `3d_fullres_sac[_SIZE]`: patch, sizes and strides by the plan's spacing."""

from __future__ import annotations

import pytest

from planners.anisotropy import strides_of_degree
from planners.configurations import configuration_like, with_configuration
from planners.errors import PlanError
from planners.plans import resolved
from planners.sac import training_gb
from pretrain.encoders import build_segmentation_network, encoder_info
from tests.test_configurations import plan_for, rows
from tests.tiny import dataset_json

SPACINGS = {
    0: (1.0, 1.0, 1.0),
    1: (2.5, 1.1, 1.0),
    2: (5.0, 0.7, 0.7),
    3: (8.0, 1.0, 1.0),
    4: (16.0, 1, 1),
    5: (40.0, 1, 1),
}


def sac(name="3d_fullres_sac", *, patch=(8, 24, 20), **options) -> dict:
    plan = plan_for(**options)
    plan["configurations"]["3d_fullres"]["patch_size"] = list(patch)
    return resolved(with_configuration(plan, name), name)


def size_of(configuration) -> tuple[int, ...]:
    arguments = configuration["architecture"]["arch_kwargs"]
    return tuple(arguments[key] for key in ("embed_dim", "depth", "num_heads"))


@pytest.mark.parametrize(
    ("budget", "name", "size", "width"),
    [
        ("full", "3d_fullres_sac", (384, 12, 6), 32),
        ("full", "3d_fullres_sac_s", (384, 12, 6), 32),
        ("full", "3d_fullres_sac_b", (768, 12, 12), 32),
        ("full", "3d_fullres_sac_l", (1024, 24, 16), 32),
        ("cpu", "3d_fullres_sac", (96, 4, 3), 8),
        ("cpu", "3d_fullres_sac_s", (384, 12, 6), 8),
    ],
)
def test_the_size_follows_from_the_name_and_the_budget(budget, name, size, width):
    configuration = sac(name, budget=budget)
    assert size_of(configuration) == size
    features = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
    assert features == [width * w for w in (1, 2, 4, 8, 16, 16)]


@pytest.mark.parametrize(
    ("degree", "patch", "rounded"),
    [
        (0, (40, 56, 33), [64, 64, 64]),
        (1, (40, 56, 33), [48, 64, 64]),
        (2, (41, 96, 100), [48, 96, 128]),
        (3, (13, 96, 100), [16, 96, 128]),
        (4, (13, 96, 100), [14, 96, 128]),
        (5, (13, 96, 100), [13, 96, 128]),
    ],
)
def test_the_planned_patch_is_rounded_up(degree, patch, rounded):
    configuration = sac(spacing=SPACINGS[degree], patch=patch, memory=24)
    assert configuration["patch_size"] == rounded
    assert configuration["architecture"]["arch_kwargs"]["strides"] == strides_of_degree(degree, 6)
    assert configuration["autoseg"]["DA"] == degree
    because = rows(configuration)["patch, voxels"]
    assert "rounded up to multiples of" in because
    assert "not measured on a GPU" in because


def test_the_coarsest_map_keeps_two_voxels():
    """Along the axis with the most voxels beside its multiple."""
    assert sac(median=(13, 27, 22))["patch_size"] == [16, 64, 32]
    assert sac(median=(60, 27, 22))["patch_size"] == [32, 32, 32]


@pytest.mark.parametrize("degree", SPACINGS)
def test_the_small_plan_has_one_multiple_an_axis_and_one_more(degree):
    configuration = sac(spacing=SPACINGS[degree], patch=(40, 160, 160), median=(1, 200, 100), budget="cpu")
    assert configuration["patch_size"] == [max(32 >> degree, 1), 64, 32]
    assert configuration["batch_size"] == 2


def test_the_patch_shrinks_with_the_memory_and_says_so():
    configuration = sac(patch=(128, 128, 128), spacing=SPACINGS[0], memory=5)
    patch, arguments = configuration["patch_size"], configuration["architecture"]["arch_kwargs"]
    assert patch == [96, 128, 128]  # equal numbers of steps and lengths: the slice axis goes first
    assert training_gb(patch, arguments["strides"], arguments, 2, half=True, labels=3) <= 5
    assert "shrunk from 128×128×128 to fit into 5 GB" in rows(configuration)["patch, voxels"]


def test_a_batch_of_one_where_two_do_not_fit_and_an_error_where_none_does():
    arguments = sac("3d_fullres_sac_l")["architecture"]["arch_kwargs"]
    one, two = (training_gb((16, 64, 32), arguments["strides"], arguments, n, half=True, labels=3) for n in (1, 2))
    configuration = sac("3d_fullres_sac_l", memory=(one + two) / 2, median=(13, 27, 22))
    assert configuration["batch_size"] == 1
    with pytest.raises(PlanError, match=r"--gpu-memory 7"):
        sac("3d_fullres_sac_l", memory=2)


@pytest.mark.parametrize(
    ("budget", "name", "patch", "degree", "measured"),
    [
        ("full", "3d_fullres_sac_s", (64, 64, 64), 0, 1.68),
        ("full", "3d_fullres_sac_s", (40, 160, 160), 2, 4.56),
        ("full", "3d_fullres_sac_b", (32, 64, 64), 1, 2.867),
        ("cpu", "3d_fullres_sac", (32, 64, 32), 0, 0.144),
    ],
)
def test_the_memory_estimate_is_what_was_measured(budget, name, patch, degree, measured):
    arguments = sac(name, budget=budget)["architecture"]["arch_kwargs"]
    estimate = training_gb(patch, strides_of_degree(degree, 6), arguments, 2, half=budget == "full")
    assert estimate == pytest.approx(measured, rel=0.09)


def test_plan_and_network_agree():
    plan = with_configuration(plan_for(spacing=SPACINGS[2], budget="cpu"), "3d_fullres_sac")
    info = encoder_info(plan, "3d_fullres_sac", dataset_json())
    assert (info.total_stride, info.features) == ((4, 16, 16), (96,) * 4)
    network = build_segmentation_network(plan, "3d_fullres_sac", dataset_json())
    patch = plan["configurations"]["3d_fullres_sac"]["patch_size"]
    assert network.decoder.total_stride == [8, 32, 32]
    assert all(n % s == 0 for n, s in zip(patch, network.decoder.total_stride, strict=True))


def test_weights_bring_their_size_and_the_data_the_strides():
    theirs = {
        "network_class_name": "pretrain.networks.PUMIT",
        "arch_kwargs": {
            "strides": strides_of_degree(0, 6),
            "features_per_stage": [4, 8, 16, 32, 64, 64],
            "embed_dim": 48,
            "depth": 6,
            "num_heads": 4,
        },
        "_kw_requires_import": [],
    }
    content = configuration_like(plan_for(spacing=SPACINGS[2]), theirs, patch_size=(41, 96, 100))
    assert content["patch_size"] == [48, 96, 128]
    assert size_of(content) == (48, 6, 4)
    assert content["architecture"]["arch_kwargs"]["strides"] == strides_of_degree(2, 6)


def test_sizes_that_do_not_exist_are_refused_with_those_that_do():
    with pytest.raises(PlanError, match=r"3d_fullres_sac\[_SIZE\] \(SIZE: s, b, l\)"):
        sac("3d_fullres_sac_xl")
