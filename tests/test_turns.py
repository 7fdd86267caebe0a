"""Turns, and the crops they leave in shape. Values: counted, or by hand (specification of the five tasks, §2.4, §5)."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from planners.errors import PlanError
from pretrain.encoders import EncoderInfo
from pretrain.method import Target
from pretrain.turns import MAX_ZOOM, TURNS, TurnableCrop, turnable_crop, turns_of
from pretrain.volumes import CaseInfo
from tests.tiny import Array, tiny_plan

INVERSE = [0, 3, 2, 1, 6, 5, 4, 9, 8, 7]
CUBE = np.random.default_rng(0).normal(size=(1, 5, 5, 5))


def number_of(image: np.ndarray, among: tuple = TURNS, source: np.ndarray = CUBE) -> int | None:
    """Which turn of the source an image is."""
    for number, turn in enumerate(among):
        turned = turn(source)
        if turned.shape == image.shape and np.array_equal(turned, image):
            return number
    return None


def test_ten_turns_are_ten_arrays_of_the_same_voxels() -> None:
    turned = [turn(CUBE) for turn in TURNS]
    assert len({t.tobytes() for t in turned}) == 10
    assert all(np.array_equal(np.sort(t.ravel()), np.sort(CUBE.ravel())) for t in turned)


def test_turns_are_those_of_torch_in_the_order_of_the_classes() -> None:
    """0 none; 1 + 3 p + (k - 1): k quarters in plane p of (0, 1), (1, 2), (0, 2)."""
    tensor = torch.from_numpy(CUBE[0])
    planes = [(0, 1), (1, 2), (0, 2)]
    expected = [tensor, *(torch.rot90(tensor, k, plane) for plane in planes for k in (1, 2, 3))]
    assert all(np.array_equal(turn(CUBE)[0], e.numpy()) for turn, e in zip(TURNS, expected, strict=True))


def test_the_ten_are_closed_under_inverse() -> None:
    assert [number_of(TURNS[INVERSE[y]](turn(CUBE)), TURNS) for y, turn in enumerate(TURNS)] == [0] * 10
    assert all(np.array_equal(turn(turn(CUBE), back=True), CUBE) for turn in TURNS)


def test_the_ten_are_no_group_but_generate_all_turns_of_a_cube() -> None:
    inside = [number_of(a(b(CUBE))) is not None for a, b in itertools.product(TURNS, TURNS)]
    assert sum(inside) == 52
    known = {CUBE.tobytes(): CUBE}
    while True:
        found = {turn(image).tobytes(): turn(image) for image in known.values() for turn in TURNS}
        if found.keys() <= known.keys():
            break
        known |= found
    assert len(known) == 24


def test_two_mirrors_are_a_half_turn_and_one_is_no_turn() -> None:
    assert number_of(CUBE[:, ::-1, ::-1]) == 2
    assert all(number_of(np.flip(CUBE, 1 + axis)) is None for axis in range(3))


def test_six_turns_leave_a_square_slab_in_shape() -> None:
    slab = np.random.default_rng(0).normal(size=(1, 3, 6, 6))
    six = turns_of(3, (1, 2))
    assert [TURNS.index(turn) for turn in six] == [0, 4, 5, 6, 2, 8]
    assert all(turn(slab).shape == slab.shape for turn in six)


def test_four_half_turns_leave_any_box_in_shape_and_form_a_group() -> None:
    box = np.random.default_rng(0).normal(size=(1, 3, 4, 5))
    four = turns_of(3, ())
    assert [TURNS.index(turn) for turn in four] == [0, 2, 5, 8]
    assert all(turn(box).shape == box.shape for turn in four)
    assert sum(number_of(a(b(box)), four, box) is not None for a, b in itertools.product(four, four)) == 16


def test_turns_of_a_plane() -> None:
    assert [turn.quarters for turn in turns_of(2, (0, 1))] == [0, 1, 2, 3]
    assert [turn.quarters for turn in turns_of(2, ())] == [0, 2]


def target_of(patch: tuple, stride: tuple, spacing: tuple) -> Target:
    plan = tiny_plan(dims=len(patch))
    name = "3d_fullres" if len(patch) == 3 else "2d"
    plan["configurations"][name] |= {"patch_size": list(patch), "spacing": list(spacing)}
    info = EncoderInfo(1, (8,), (stride,), stride, len(patch))
    return Target(plan, name, info)


def scans(shape: tuple, original: tuple, number: int = 10) -> list[CaseInfo]:
    one = Array(np.zeros((1, 2, 2, 2))).info
    return [dataclasses.replace(one, id=str(i), shape=shape, original_spacing=original) for i in range(number)]


@pytest.mark.parametrize(
    ("patch", "stride", "spacing", "shape", "original", "turns", "size"),
    [
        ((40, 56, 40), (8, 8, 8), (1, 1, 1), (60, 60, 60), (1, 1, 1), 10, (40, 40, 40)),
        ((40, 56, 40), (8, 8, 8), (1, 1, 1), (36, 50, 36), (1, 1, 1), 10, (32, 32, 32)),
        ((40, 56, 40), (8, 8, 8), (1, 1, 1), (60, 60, 60), (3, 1, 1), 6, (40, 40, 40)),  # made of thick slices
        ((20, 320, 256), (4, 64, 64), (5, 0.6, 0.6), (20, 320, 256), (5, 0.6, 0.6), 6, (20, 256, 256)),
        ((48, 64, 64), (8, 16, 16), (1.2, 1, 1), (90, 90, 90), (1.2, 1, 1), 6, (48, 64, 64)),  # unequal strides
        ((40, 56, 40), (8, 8, 8), (1, 2, 4), (60, 60, 60), (1, 2, 4), 4, (40, 56, 40)),
        ((16, 96, 96), (4, 8, 8), (1, 1, 1), (16, 200, 200), (1, 1, 1), 6, (16, 96, 96)),
        ((40, 40, 40), (8, 8, 8), (1, 1, 1), (12, 60, 60), (1, 1, 1), 6, (16, 40, 40)),  # a cube of 12 shows little
        ((320, 256), (64, 64), (0.6, 0.6), (9, 400, 400), (5, 0.6, 0.6), 4, (256, 256)),
        ((320, 256), (64, 32), (0.6, 0.6), (9, 400, 400), (5, 0.6, 0.6), 4, (256, 256)),
        ((64, 64), (16, 16), (1, 2), (9, 100, 100), (1, 1, 2), 2, (64, 64)),
    ],
)
def test_class_sets_and_crops_follow_the_geometry(
    patch: tuple, stride: tuple, spacing: tuple, shape: tuple, original: tuple, turns: int, size: tuple
) -> None:
    crop = turnable_crop(target_of(patch, stride, spacing), scans(shape, original), method="rotation")
    assert (len(crop.turns), crop.size) == (turns, size)
    assert all(n % s == 0 and n >= 2 * s for n, s in zip(crop.size, stride, strict=True))
    image = np.zeros((1, *crop.size))
    assert all(turn(image).shape == image.shape for turn in crop.turns)


def test_one_thick_scan_in_ten_does_not_take_quarter_turns_away_but_two_do() -> None:
    target = target_of((40, 40, 40), (8, 8, 8), (1, 1, 1))
    for thick, turns in ((1, 10), (2, 6)):
        pool = [*scans((60, 60, 60), (1, 1, 1), 11 - thick), *scans((60, 60, 60), (4, 1, 1), thick)]
        assert len(turnable_crop(target, pool, method="rotation").turns) == turns


def test_small_scans_are_enlarged_at_most_two_and_a_half_times() -> None:
    target = target_of((32, 32, 32), (8, 8, 8), (1, 1, 1))
    crop = turnable_crop(target, scans((10, 10, 10), (1, 1, 1)), method="rotation")
    assert (crop.cut, crop.size, crop.zoom) == ((10, 10, 10), (16, 16, 16), 1.6)
    with pytest.raises(PlanError, match="too small for rotation") as error:
        turnable_crop(target, scans((6, 30, 30), (1, 1, 1)), method="rotation")
    assert "7×7×7" in str(error.value)
    assert "--patch-size" in str(error.value)


@pytest.mark.parametrize("stride", [(4, 8, 8), (8, 8, 8), (16, 16, 16), (64, 64, 64)])
@pytest.mark.parametrize("room", [(1.0, 1.0, 1.0), (1.0, 1.53, 1.53)])
def test_scans_of_the_size_that_a_refusal_asks_for_are_accepted(stride: tuple, room: tuple) -> None:
    target = target_of((64, 64, 64), stride, (1, 1, 1))
    with pytest.raises(PlanError) as error:
        turnable_crop(target, scans((2, 2, 2), (1, 1, 1)), room=room, method="exemplar")
    asked = tuple(map(int, re.search(r"at least (\d+)×(\d+)×(\d+)", str(error.value)).groups()))
    assert turnable_crop(target, scans(asked, (1, 1, 1)), room=room, method="exemplar").zoom <= MAX_ZOOM
    with pytest.raises(PlanError):
        turnable_crop(target, scans(tuple(n - 1 for n in asked), (1, 1, 1)), room=room, method="exemplar")


def test_crops_come_from_inside_the_scan() -> None:
    crop = TurnableCrop(TURNS, (0, 1, 2), (4, 4, 4), (4, 4, 4))
    volume = Array(np.indices((9, 6, 7)).astype(float))
    starts = set()
    for seed in range(300):
        image, enough = crop.read(volume, np.random.default_rng(seed))  # the volume refuses to be read outside
        assert image.shape == (3, 4, 4, 4)
        assert enough
        starts.add(tuple(image[:, 0, 0, 0].astype(int).tolist()))
    assert starts == set(itertools.product(range(6), range(3), range(4)))


def test_less_is_cut_from_a_smaller_scan_and_equally_from_exchanged_axes() -> None:
    crop = TurnableCrop(turns_of(3, (1, 2)), (1, 2), (4, 8, 8), (4, 8, 8))
    ramp = np.indices((3, 5, 20)).astype(float)
    image, enough = crop.read(Array(ramp), np.random.default_rng(0))
    assert image.shape == (3, 4, 8, 8)
    assert enough
    assert np.ptp(image[1]) == pytest.approx(np.ptp(image[2]))
    assert not crop.read(Array(ramp[:, :1]), np.random.default_rng(0))[1]


def test_resizing_commutes_with_turning() -> None:
    """Else an enlarged crop would tell its turn."""
    crop = TurnableCrop(TURNS, (0, 1, 2), (5, 5, 5), (8, 8, 8))
    enlarged = crop.read(Array(CUBE), np.random.default_rng(0))[0]
    for turn in TURNS:
        other = crop.read(Array(turn(CUBE).copy()), np.random.default_rng(0))[0]
        assert np.allclose(other, turn(enlarged), atol=1e-5)
