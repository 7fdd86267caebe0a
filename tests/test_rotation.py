"""Rotation's views and loss. Values: by hand (specification of the five tasks, §2.4 and §5)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from planners.errors import PlanError
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.method import Step, Target
from pretrain.methods.rotation import Rotation, RotationConfig, RotationSpec
from pretrain.planes import middle_planes
from pretrain.turns import TURNS, TurnableCrop, turns_of
from tests.tiny import Array, dataset_json, tiny_plan

STEP = Step("main", 0, 10, 0)
CUBES = TurnableCrop(TURNS, (0, 1, 2), (8, 8, 8), (8, 8, 8))
SPEC = RotationSpec(CUBES, (1.0, 1.0, 1.0), crops=2, accumulate=1, turns_per_crop=1, intensity=0.0)


def noise(*shape: int) -> Array:
    return Array(np.random.default_rng(0).normal(size=shape))


def test_equal_answers_cost_the_logarithm_of_the_turns() -> None:
    rotation = model()
    nn.init.zeros_(rotation.head[-1].weight)
    nn.init.zeros_(rotation.head[-1].bias)
    samples = [Rotation.sample(SPEC, noise(1, 12, 12, 12), [n], np.random.default_rng(n)) for n in (0, 4)]
    assert float(rotation.loss(rotation.collate(samples), STEP)["loss"]) == pytest.approx(2.302585, abs=1e-6)  # ln 10


def test_crops_that_do_not_count_change_nothing() -> None:
    rotation = model().eval()
    samples = [Rotation.sample(SPEC, noise(1, 12, 12, 12), [n], np.random.default_rng(n)) for n in (0, 4)]
    samples[1]["valid"][:] = False
    both, one = (rotation.loss(rotation.collate(some), STEP) for some in (samples, samples[:1]))
    assert (float(both.pop("shown")), float(one.pop("shown"))) == (0.5, 1.0)
    assert {k: float(v) for k, v in both.items()} == pytest.approx({k: float(v) for k, v in one.items()}, abs=1e-5)


def test_a_view_is_a_turned_crop_and_nothing_else() -> None:
    volume = noise(1, 8, 8, 8)  # as large as the crop, so its place is known
    for number, turn in enumerate(TURNS):
        views = Rotation.sample(SPEC, volume, [number], np.random.default_rng(1))
        assert np.array_equal(views["crops"][0], turn(volume.voxels))
        assert views["turns"].tolist() == [number]
        assert views["valid"].all()


def test_every_turn_is_equally_likely() -> None:
    pool = [noise(1, 8, 8, 8).info] * 3
    counts = np.zeros(10)
    for seed in range(1300):
        for _, (number,) in Rotation.draw(SPEC, pool, np.random.default_rng(seed), STEP):
            counts[number] += 1
    assert np.abs(counts - 260).max() < 4 * math.sqrt(2600 * 0.1 * 0.9)


def test_several_turns_of_a_crop_are_different_turns_of_the_same() -> None:
    spec = dataclasses.replace(SPEC, turns_per_crop=4)
    drawn = Rotation.draw(spec, [noise(1, 9, 9, 9).info], np.random.default_rng(0), STEP)
    assert all(len(set(numbers)) == 4 for _, numbers in drawn)
    views = Rotation.sample(spec, noise(1, 12, 11, 10), drawn[0][1], np.random.default_rng(0))
    back = [TURNS[n](crop, back=True) for n, crop in zip(views["turns"], views["crops"], strict=True)]
    assert all(np.array_equal(back[0], other) for other in back)


def test_contrast_changes_before_the_turn() -> None:
    """Noise drawn after it would be the same for every turn, and so would a brightness that depends on the axis."""
    volume = noise(2, 8, 8, 8)
    spec = dataclasses.replace(SPEC, intensity=1.0, turns_per_crop=2)
    views = Rotation.sample(spec, volume, [0, 7], np.random.default_rng(0))
    assert np.array_equal(TURNS[7](views["crops"][0]), views["crops"][1])
    for changed, plain in zip(views["crops"][0], volume.voxels, strict=True):
        assert np.corrcoef(changed.ravel(), plain.ravel())[0, 1] > 0.99
        assert 0.75 < changed.std() / plain.std() < 1.3
        assert not np.array_equal(changed, plain)


def test_air_does_not_count() -> None:
    voxels = np.zeros((1, 8, 8, 40))
    voxels[..., 36:] = 100 * np.random.default_rng(0).random((1, 8, 8, 4))
    volume = Array(voxels)
    volume.info = dataclasses.replace(volume.info, foreground_box=((0, 8), (0, 8), (0, 20)))
    assert not Rotation.sample(SPEC, volume, [0], np.random.default_rng(0))["valid"].any()
    assert not Rotation.sample(SPEC, Array(np.ones((1, 8, 8, 8))), [0], np.random.default_rng(0))["valid"].any()


def test_a_scan_too_small_for_the_network_does_not_count() -> None:
    assert Rotation.sample(SPEC, noise(1, 4, 8, 8), [0], np.random.default_rng(0))["valid"].all()
    assert not Rotation.sample(SPEC, noise(1, 3, 8, 8), [0], np.random.default_rng(0))["valid"].any()


def target() -> Target:
    plan = tiny_plan()
    return Target(plan, "3d_fullres", encoder_info(plan, "3d_fullres", dataset_json()))


def test_a_small_batch_is_made_up_for_by_several_a_step() -> None:
    pool = [noise(1, 13, 27, 22).info] * 5
    spec = Rotation.plan(target(), pool, RotationConfig())
    assert (spec.crops, spec.accumulate) == (2, 2)
    spec = Rotation.plan(target(), pool, RotationConfig(crops=3))
    assert (spec.crops, spec.accumulate) == (3, 1)
    with pytest.raises(PlanError, match=r"where\s+2d[\s\S]*at most 2: 0°, 180° yx\n\s+to fix\s+.*turns_per_crop=2"):
        stretched = Target(tiny_plan(dims=2), "2d", encoder_info(tiny_plan(dims=2), "2d", dataset_json()))
        stretched.settings["spacing"] = [1.0, 3.0]
        Rotation.plan(stretched, pool, RotationConfig(turns_per_crop=4))


def model(turns: tuple = TURNS) -> Rotation:
    torch.manual_seed(0)
    spec = dataclasses.replace(SPEC, crop=dataclasses.replace(CUBES, turns=turns))
    network = build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json())
    return Rotation(network, spec, RotationConfig(hidden=8))


def test_no_residual_branch_starts_asleep_and_learned_weights_stay() -> None:
    torch.manual_seed(0)
    network = build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json())
    norms = [m.weight for m in network.encoder.modules() if isinstance(m, nn.InstanceNorm3d)]
    asleep = [not weight.any() for weight in norms]
    assert any(asleep)
    nn.init.constant_(norms[0], 0.3)
    Rotation(network, SPEC, RotationConfig(hidden=8))
    assert all(weight.any() for weight in norms)
    assert norms[0].unique().tolist() == pytest.approx([0.3])


def test_a_run_that_learns_nothing_is_told() -> None:
    rotation = model()
    late, stuck = Step("main", 100, 200, 100), {"loss": 2.302, "acc": 0.1}
    assert "no better than guessing" in str(rotation.diagnose(stuck, late))
    assert rotation.diagnose(stuck, Step("main", 5, 200, 5)) is None
    assert rotation.diagnose({**stuck, "loss": 2.1}, late) is None
    assert model(turns_of(3, (1, 2))).chance()["acc"] == pytest.approx(1 / 6)


def test_the_picture_says_what_was_answered() -> None:
    rotation = model().eval()
    batch = rotation.collate(
        [Rotation.sample(SPEC, noise(1, 12, 12, 12), [n], np.random.default_rng(n)) for n in (0, 4)]
    )
    titles = [axis.get_title() for axis in rotation.picture(batch).axes]
    assert sum("true ◂ 0°" in title for title in titles) == 1
    assert sum("true ◂ 90° yx" in title for title in titles) == 1
    assert titles.count("as it was cut") == 2


def test_planes_are_shown_in_the_proportions_of_the_body() -> None:
    image = np.zeros((4, 20, 10))
    picture = middle_planes(image, (5.0, 1.0, 1.0))
    assert picture.shape == (160 + 4 + 160, 80 + 4 + 160)
    assert middle_planes(image[0], (1.0, 1.0)).shape == (160, 80)
