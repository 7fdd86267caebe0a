"""PCRL's windows, contexts and corruptions. Values: by hand (specification of PCRL, §1.2, §1.3, §4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.methods import pcrl_corruption, pcrl_views
from pretrain.methods.pcrl import local_size
from pretrain.methods.pcrl_contexts import code, contexts_of
from pretrain.methods.pcrl_corruption import Corruption, blurred, corrupt, disturb, painted, shuffled, swapped
from pretrain.methods.pcrl_views import Window, cut, draw_around, draw_pair, jitter, overlap
from tests.test_voco import Array

ZOOMS = (0.75, 1.0, 1.25, 1.5)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Contexts -------------------------------------------------------------------------------------------------------------


def test_the_indicator_holds_mirrors_and_one_hot_turns() -> None:
    assert code((1, 0, 1), 3).tolist() == [1, 0, 1, 0, 0, 0, 1]
    assert code((1, 0), 1).tolist() == [1, 0, 0, 1, 0, 0]


def test_mirrors_come_before_turns() -> None:
    """[[1, 2], [3, 4]] mirrored on the first axis and turned once: [[4, 2], [3, 1]]."""
    contexts = contexts_of((2, 2), (1, 1), 0)
    image = torch.tensor([[[[1, 2], [3, 4]]]])
    assert contexts.apply(image, torch.tensor(code((1, 0), 1))[None])[0, 0].tolist() == [[4, 2], [3, 1]]
    both, half = (contexts.apply(image, torch.tensor(code(*c))[None]) for c in (((1, 1), 0), ((0, 0), 2)))
    assert torch.equal(both, half)
    assert contexts.name(code((1, 0), 1).tolist()) == "mirrored y, turned 90°"
    assert contexts.name(code((0, 0), 0).tolist()) == "as it is"


def test_turns_agree_with_numpy_in_the_plane_of_small_spacing() -> None:
    contexts = contexts_of((8, 4, 8), (1.0, 3.0, 1.0), 0)
    assert (contexts.plane, contexts.turns) == ((0, 2), (0, 1, 2, 3))
    image = np.random.default_rng(0).normal(size=(1, 2, 8, 4, 8))
    turned = contexts.apply(torch.from_numpy(image), torch.tensor(code((0, 1, 0), 3))[None])
    assert np.array_equal(turned.numpy()[0], np.rot90(np.flip(image[0], 2), 3, (1, 3)))


@pytest.mark.parametrize(
    ("patch", "spacing", "turns"),
    [
        ((8, 24, 16), (1, 1, 1), {0, 2}),
        ((16, 16, 16), (1, 1, 1), {0, 1, 2, 3}),
        ((16, 16, 16), (5, 1, 1.005), {0, 1, 2, 3}),
        ((16, 16, 16), (5, 1, 1.1), {0, 2}),
        ((24, 16), (1, 1), {0, 2}),
    ],
)
def test_quarter_turns_need_an_even_plane(patch: tuple, spacing: tuple, turns: set[int]) -> None:
    contexts = contexts_of(patch, spacing, 0.0)
    generator = rng()
    drawn = np.stack([contexts.draw(generator) for _ in range(300)])
    assert set(drawn[:, len(patch) :].argmax(1).tolist()) == turns
    assert set(drawn[:, : len(patch)].mean(0).round(1).tolist()) <= {0.4, 0.5, 0.6}
    images = torch.zeros(1, 2, *patch)
    assert contexts.apply(images, torch.from_numpy(drawn[:1])).shape == images.shape


def test_the_identity_is_drawn_more_often() -> None:
    contexts = contexts_of((8, 24, 16), (1, 1, 1), 0.5)
    generator = rng()
    same = np.mean([contexts.draw(generator).tolist() == [0, 0, 0, 1, 0, 0, 0] for _ in range(2000)])
    assert same == pytest.approx(0.5 + 0.5 / 16, abs=0.03)


# Windows --------------------------------------------------------------------------------------------------------------


def test_overlap_of_boxes() -> None:
    a = Window((0, 0), (4, 4))
    assert overlap(a, a) == 1
    assert overlap(a, Window((2, 0), (4, 4))) == pytest.approx(8 / 24)
    assert overlap(a, Window((4, 0), (4, 4))) == 0


@pytest.mark.parametrize("shape", [(40, 50, 45), (13, 27, 22), (5, 60, 60), (200, 210, 190)])
def test_pairs_overlap_and_fit(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = rng(1)
    patch = (16, 24, 20)
    for tries in (50, 0):  # 0: always the fallback
        monkeypatch.setattr(pcrl_views, "_TRIES", tries)
        for _ in range(1000):
            pair = draw_pair(shape, patch, ZOOMS, 0.25, generator)
            assert overlap(*pair) > 0.25
            for window in pair:
                for n, p, s, w in zip(shape, patch, window.start, window.size, strict=True):
                    assert round(0.75 * p) <= w <= max(round(1.5 * p), 1)
                    assert (0 <= s <= n - w) if w <= n else s <= 0
                    assert w <= max(n, p)


@pytest.mark.parametrize(
    ("shape", "patch", "stride"), [((60, 70, 50), (16, 24, 20), (4, 4, 4)), ((300,) * 3, (96,) * 3, (32,) * 3)]
)
def test_small_views_lie_around_the_large_ones_and_inside_the_scan(
    shape: tuple[int, ...], patch: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    generator = rng(2)
    for _ in range(500):
        pair = draw_pair(shape, patch, ZOOMS, 0.3, generator)
        inner = draw_around(pair, shape, local_size(patch, stride), (0.5, 1.0, 1.5, 2.0), generator)
        for axis in range(3):
            assert inner.size[axis] <= min(window.size[axis] for window in pair) / 2
            low = min(w.start[axis] for w in pair) - 3
            high = max(w.start[axis] + w.size[axis] for w in pair) + 3
            assert max(0, low) <= inner.start[axis]
            assert inner.start[axis] + inner.size[axis] <= min(shape[axis], high)


def test_a_window_is_cut_without_moving_when_nothing_is_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcrl_views, "jitter", lambda extent, rng: np.eye(3))
    voxels = rng().normal(size=(2, 9, 12, 11)).astype(np.float32)
    crop, shown = cut(Array(voxels), Window((1, 2, 3), (4, 6, 5)), (4, 6, 5), rng())  # type: ignore[arg-type]
    assert np.allclose(crop, voxels[:, 1:5, 2:8, 3:8], atol=1e-5)
    assert shown > 0.9
    monkeypatch.setattr(pcrl_views, "jitter", lambda extent, rng: np.diag([1.0, 1.0, -1.0]))
    crop, _ = cut(Array(voxels), Window((1, 2, 3), (4, 6, 5)), (4, 6, 5), rng())  # type: ignore[arg-type]
    assert np.allclose(crop, voxels[:, 1:5, 2:8, 3:8][..., ::-1], atol=1e-5)


def test_what_lies_outside_is_the_smallest_value() -> None:
    voxels = np.full((1, 6, 6, 6), 5.0)
    voxels[0, 0] = 2.0
    crop, _ = cut(Array(voxels), Window((-3, 0, 0), (12, 6, 6)), (12, 6, 6), rng(3))  # type: ignore[arg-type]
    assert crop.min() == pytest.approx(2.0)
    assert crop[0, :2].max() < 3


def test_only_the_part_inside_the_scan_decides_whether_there_is_something_to_see() -> None:
    """A quarter of the scan differs from its lowest level, as the body of a PET scan: dark beside a few bright spots."""
    voxels = np.zeros((1, 8, 8, 8))
    voxels[0, :, :4, :4] = 1.0
    voxels[0, 2, :2, :2] = 20.0
    scan = Array(voxels)
    for window in (Window((0, 0, 0), (8, 8, 8)), Window((-12, -12, -12), (32, 32, 32))):
        assert cut(scan, window, (8, 8, 8), rng())[1] == 0.25  # type: ignore[arg-type]
    assert cut(scan, Window((0, 4, 0), (8, 4, 8)), (8, 8, 8), rng())[1] == 0  # type: ignore[arg-type]
    assert cut(Array(np.zeros((1, 8, 8, 8))), Window((0, 0, 0), (8, 8, 8)), (8, 8, 8), rng())[1] == 0  # type: ignore[arg-type]


def test_turns_are_turns_in_mm() -> None:
    """In mm the jitter is a rotation times scales, whatever the voxels; a thin slab is not turned out of its plane."""
    extent = np.array([60.0, 90.0, 120.0])
    matrix = jitter(extent, rng(4))
    in_mm = matrix * extent[:, None] / extent
    assert np.allclose(in_mm.T @ in_mm, np.diag(np.diag(in_mm.T @ in_mm)), atol=1e-9)
    assert np.all(np.abs(np.sqrt(np.diag(in_mm.T @ in_mm)) - 1) <= 0.1)
    assert np.abs(in_mm - np.diag(np.diag(in_mm))).max() > 0.01
    thin = jitter([20.0, 90.0, 120.0], rng(4))
    assert np.all(thin[0, 1:] == 0)
    assert np.all(thin[1:, 0] == 0)
    assert thin[1, 2] != 0


# Corruption -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["blur", "shuffle", "paint"])
def test_each_corruption_has_its_own_probability(which: str) -> None:
    crop = rng(1).normal(size=(1, 20, 20, 20)).astype(np.float32)
    never = dict.fromkeys(("blur", "shuffle", "paint"), 0.0)
    changed = corrupt(crop, Corruption(**{**never, which: 1.0}, outward=0.0), (1, 1, 1), rng(2))
    assert not np.array_equal(changed, crop)
    assert np.isin(changed, crop).all() == (which == "shuffle")


def test_nothing_happens_at_probability_zero_and_the_crop_is_never_changed() -> None:
    crop = rng().normal(size=(2, 11, 24, 20)).astype(np.float32)
    kept = crop.copy()
    same = corrupt(crop, Corruption(0, 0, 0, 0.8), (5, 1, 1), rng())
    assert np.array_equal(same, crop)
    for seed in range(20):
        changed = corrupt(crop, Corruption(0.5, 1, 1, 0.5), (5, 1, 1), rng(seed))
        disturb(crop, (5, 1, 1), rng(seed), swap=True)
        assert changed.shape == crop.shape
        assert changed.dtype == np.float32
        assert not np.array_equal(changed, crop)
        assert np.array_equal(crop, kept)


def test_blur_is_the_same_in_mm() -> None:
    crop = np.zeros((1, 21, 21, 21), np.float32)
    crop[0, 10, 10, 10] = 1
    result = blurred(crop, (5.0, 0.5, 0.5), rng(1))[0]
    assert result[10, 10, 12] > result[11, 10, 10]
    assert result.sum() == pytest.approx(1, abs=1e-3)


def test_shuffling_keeps_every_voxel_near_its_place() -> None:
    crop = np.broadcast_to(np.arange(40.0)[:, None, None], (40, 41, 42))[None].astype(np.float32).copy()
    result = shuffled(crop, rng())
    assert 0 < np.abs(result - crop).max() <= 3  # blocks are at most 4 long
    assert (result != crop).mean() > 0.05
    two = shuffled(np.concatenate([crop, 2 * crop]), rng())
    assert np.array_equal(2 * two[0], two[1])  # channels move together


@pytest.mark.parametrize("shape", [(32, 64, 64), (96, 96, 96)])
def test_shuffling_covers_crops_of_any_size_alike(shape: tuple[int, ...]) -> None:
    crop = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    assert 0.6 < np.mean([(shuffled(crop, rng(seed)) != crop).mean() for seed in range(3)]) < 0.92


def test_gamma_keeps_every_channel_in_its_own_range(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LARGEST_BLUR", "_LARGEST_NOISE"):
        monkeypatch.setattr(pcrl_corruption, name, 1e-9)
    crop = rng().uniform(size=(1, 8, 12, 10)).astype(np.float32)
    both = disturb(np.concatenate([crop, 100 * crop - 7, 0 * crop + 3]), (1, 1, 1), rng(1), swap=False)
    assert np.abs(both[0] - crop[0]).max() > 0.01
    assert np.allclose(both[1], 100 * both[0] - 7, atol=1e-3)
    assert np.allclose(both[2], 3)


@pytest.mark.parametrize("shape", [(64, 64, 32), (8, 24, 16), (5, 9, 7), (24, 20)])
def test_painting_keeps_within_the_crop(shape: tuple[int, ...]) -> None:
    crop = np.full((2, *shape), 3.0, np.float32)
    crop[0].flat[::7], crop[1] = 9.0, crop[0] - 10
    for seed in range(30):
        inward, outward = (painted(crop, rng(seed), outward=on) for on in (False, True))
        assert 3 <= inward[0].min() <= inward[0].max() <= 9
        assert -7 <= outward[1].min() <= outward[1].max() <= 9
    shares = [np.mean(painted(crop, rng(s), outward=True)[0] != crop[0]) for s in range(30)]
    assert 0.1 < np.mean(shares) < 1


def test_boxes_of_painting_have_the_authors_sizes() -> None:
    crop = np.zeros((1, 60, 60, 30), np.float32)
    crop[0, ::2] = 1
    one = [np.argwhere(painted(crop, rng(s), outward=True)[0] == crop[0]) for s in range(20)]
    assert all(len(kept) for kept in one)
    smallest = min(int(np.prod(kept.max(0) - kept.min(0) + 1)) for kept in one)
    assert smallest >= (60 - 4 * 60 // 7) ** 2 * (30 - 4 * 30 // 7)


def test_swapping_keeps_the_voxels() -> None:
    crop = rng().normal(size=(1, 16, 24, 20)).astype(np.float32)
    result = swapped(crop, rng())
    assert not np.array_equal(result, crop)
    assert np.isin(result, crop).all()
