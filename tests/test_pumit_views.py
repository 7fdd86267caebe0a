"""PUMIT's sampler and views: one DA a batch, geometry against volumes of coordinates, padding, intensities, masks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.case_index import channel_range
from pretrain.method import Step
from pretrain.methods.pumit.masking import draw_visible, masked_terms, masked_tokens, visible_count
from pretrain.methods.pumit.method import PUMITPretraining, PUMITSpec
from pretrain.methods.pumit.sampler import DA_2D, Crops, View, degree_of, draw_views, draw_zoom, view_size
from pretrain.methods.pumit.views import draw_placement, other_intensities, resampled, tokens_inside
from pretrain.volumes import CaseInfo
from tests.tiny import Array

CROPS = Crops((4, 8, 8), batch=6, zoom=0.5)


def case(
    spacing: tuple[float, ...], shape: tuple[int, ...] = (60, 300, 280), name: str = "a", channels: int = 1
) -> CaseInfo:
    info = Array(np.zeros((channels, 2, 2, 2)), name, spacing=spacing).info
    return replace(info, shape=shape, channel_ranges=((0.0, 1.0),) * channels)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Sampler --------------------------------------------------------------------------------------------------------------


def batches(pool: list[CaseInfo], number: int, crops: Crops = CROPS) -> list[list[tuple[str, View]]]:
    return [draw_views(crops, pool, generator(seed)) for seed in range(number)]


def test_a_batch_has_one_degree_and_all_degrees_come() -> None:
    """3.75 times a zoom of 1/2 to 1/0.75 is DA 0, 1 or 2."""
    found = Counter()
    for batch in batches([case((3.0, 0.8, 0.8)), case((3.0, 0.8, 0.8), name="b")], 200):
        degrees = {view.degree for _, view in batch}
        assert len(degrees) == 1
        assert len(batch) == 6
        assert len({view.size for _, view in batch}) == 1
        for _, view in batch:
            assert view.degree == int(np.floor(np.log2(3.75 * view.zoom[0] / view.zoom[1]) + 1e-3))
        found += Counter(degrees)
    # By the zoom's uniform law: 1 half of the time, else 2 below 0.9375 and 0 above 1.875.
    expected = {0: 0.5 * 0.125 / 1.25, 1: 0.5 + 0.5 * 0.9375 / 1.25, 2: 0.5 * 0.1875 / 1.25}
    assert found.keys() == expected.keys()
    for degree, share in expected.items():
        assert abs(found[degree] - 200 * share) < 4 * np.sqrt(200 * share * (1 - share))


def test_a_batch_of_mixed_scans_is_filled_with_those_that_can_have_its_degree() -> None:
    pool = [
        case((1.0, 1.0, 1.0), name="iso"),
        case((5.0, 0.7, 0.7), name="thick"),
        case((1, 1, 1), (1, 90, 90), "flat"),
    ]
    seen = {frozenset(name for name, _ in batch) for batch in batches(pool, 30)}
    assert frozenset({"iso"}) in seen
    assert frozenset({"flat"}) in seen
    assert not any({"iso", "flat"} <= names for names in seen)


def test_a_degree_that_hardly_ever_comes_still_fills_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other view has it: the batch has other places of the one that began it."""
    zooms = iter([(1.0, 1.9, 1.9)])  # DA 0 from a ratio of 3.75, and then never again
    monkeypatch.setattr("pretrain.methods.pumit.sampler.draw_zoom", lambda *_: next(zooms, (1.0, 1.0, 1.0)))
    batch = draw_views(CROPS, [case((3.0, 0.8, 0.8))], generator())
    assert [view.zoom for _, view in batch] == [(1.0, 1.9, 1.9)] * 6
    assert {view.degree for _, view in batch} == {0}


def test_views_are_the_same_for_the_same_seed() -> None:
    pool = [case((3.0, 0.8, 0.8)), case((2.5, 1.1, 1.0), name="b", channels=2)]
    assert batches(pool, 5) == batches(pool, 5)
    assert len({str(batch) for batch in batches(pool, 5)}) == 5


def test_every_channel_is_drawn_and_constant_ones_are_not() -> None:
    info = replace(case((1, 1, 1), channels=3), channel_ranges=((0.0, 1.0), (2.0, 2.0), (-1.0, 3.0)))
    nothing = replace(case((1, 1, 1), name="nothing"), channel_ranges=((1.0, 1.0),))
    drawn = {(name, view.channel) for batch in batches([info, nothing], 20) for name, view in batch}
    assert drawn == {("a", 0), ("a", 2)}


@pytest.mark.parametrize(
    ("spacing", "degree", "size"),
    [
        ((1, 1, 1), 0, (64, 128, 128)),
        ((3, 0.8, 0.8), 1, (32, 128, 128)),
        ((5, 0.7, 0.7), 2, (16, 128, 128)),
        ((10, 1.25, 1.25), 3, (8, 128, 128)),
        ((20, 1, 1), 4, (4, 128, 128)),
        ((40, 1, 1), 5, (1, 128, 128)),
        ((4.9999995, 1.25, 1.25), 2, (16, 128, 128)),
    ],
)
def test_crops_have_as_many_tokens_whatever_the_slices(spacing, degree, size) -> None:
    assert degree_of(case(spacing)) == degree
    assert view_size(CROPS.tokens, degree) == size


def test_an_image_of_one_slice_is_flat_whatever_its_spacing_says() -> None:
    assert degree_of(case((1.0, 1.0, 1.0), (1, 90, 90))) == DA_2D == 5


def test_zooms_do_not_look_beyond_the_scan_and_slices_are_zoomed_where_thin() -> None:
    many = [draw_zoom(case((1.4, 1, 1), (60, 192, 400)), CROPS, generator(seed)) for seed in range(400)]
    plane, along = np.array([z[1] for z in many]), np.array([z[0] for z in many])
    assert 0.75 <= plane.min() < 0.8
    assert 1.4 < plane.max() <= 1.5  # 192 voxels for 128
    assert abs((plane == 1).mean() - 0.5) < 0.1
    assert 0.8 <= along.min() < along.max() <= 1.25
    assert abs((along == 1).mean() - 0.7) < 0.1
    thick = [draw_zoom(case((1.6, 1, 1)), CROPS, generator(seed))[0] for seed in range(50)]
    assert set(thick) == {1.0}


# Geometry -------------------------------------------------------------------------------------------------------------


def coordinates(shape: tuple[int, int, int], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Array:
    """Three channels that hold the voxel's own z, y and x, as a share of the axis."""
    grid = np.stack([index / (n - 1) for index, n in zip(np.indices(shape), shape, strict=True)])
    volume = Array(grid, spacing=spacing)
    volume.info = replace(volume.info, channel_ranges=((0.0, 1.0),) * 3)
    return volume


def places(volume: Array, view: View, matrix: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (3, z, y, x), in voxels of the scan, that a view shows, and what of it lies inside."""
    shown = [resampled(volume, replace(view, channel=axis), matrix, offset) for axis in range(3)]
    scale = np.array(volume.info.shape).reshape(3, 1, 1, 1) - 1
    return np.stack([image for image, _ in shown]) * scale, shown[0][1]


def test_a_view_without_turn_and_zoom_is_a_crop() -> None:
    volume = coordinates((20, 40, 44))
    view = View(0, 0, (16, 16, 32), (1.0, 1.0, 1.0))
    matrix, offset = draw_placement(volume.info, view, generator(3), rotate=0, mirror=0)
    found, inside = places(volume, view, matrix, offset)
    assert inside.all()
    start = found[:, 0, 0, 0].round().astype(int)
    assert (start > 0).any()
    assert np.allclose(found, np.indices(view.size) + start.reshape(3, 1, 1, 1), atol=1e-4)


def test_a_zoomed_view_shows_so_many_voxels_of_the_scan() -> None:
    volume = coordinates((30, 60, 60))
    view = View(0, 0, (16, 32, 32), (1.25, 1.5, 1.5))
    found, inside = places(volume, view, *draw_placement(volume.info, view, generator(1), rotate=0, mirror=0))
    assert inside.all()
    steps = [np.diff(found[axis], axis=axis) for axis in range(3)]
    assert all(np.allclose(step, zoom, atol=1e-4) for step, zoom in zip(steps, view.zoom, strict=True))


def test_mirrored_axes_run_backwards() -> None:
    volume = coordinates((20, 40, 44))
    view = View(0, 0, (16, 16, 32), (1.0, 1.0, 1.0))
    found, _ = places(volume, view, *draw_placement(volume.info, view, generator(3), rotate=0, mirror=1))
    assert all(np.allclose(np.diff(found[axis], axis=axis), -1, atol=1e-4) for axis in range(3))


def test_a_turned_view_keeps_lengths_in_mm_and_thick_slices_stay_flat() -> None:
    for spacing, flat in [((1.2, 1.0, 0.9), False), ((3.0, 1.0, 0.9), True)]:
        volume = coordinates((40, 60, 60), spacing)
        volume.info = replace(volume.info, foreground_box=((16, 24), (20, 40), (20, 40)))
        view = View(0, 0, (8, 16, 16), (1.0, 1.2, 1.2))
        matrix, offset = draw_placement(volume.info, view, generator(5), rotate=1, mirror=0)
        found, inside = places(volume, view, matrix, offset)
        assert inside.all()
        mm = found * np.reshape(spacing, (3, 1, 1, 1))
        for axis in range(3):
            length = np.linalg.norm(np.diff(mm, axis=1 + axis), axis=0)
            assert np.allclose(length, spacing[axis] * view.zoom[axis], atol=1e-2)
        assert not np.allclose(matrix[1, 2], 0)
        assert (abs(matrix[0, 1:]) < 1e-9).all() == flat


def test_views_lie_in_the_foreground_where_they_fit() -> None:
    volume = coordinates((40, 80, 80))
    volume.info = replace(volume.info, foreground_box=((20, 40), (0, 34), (40, 80)))
    view = View(0, 0, (16, 32, 32), (1.0, 1.0, 1.0))
    for seed in range(20):
        found, _ = places(volume, view, *draw_placement(volume.info, view, generator(seed), rotate=0, mirror=0))
        low, high = found.reshape(3, -1).min(1), found.reshape(3, -1).max(1)
        assert (low >= np.array([20, 0, 40]) - 1e-3).all()
        assert (high <= np.array([39, 33, 79]) + 1e-3).all()


# Padding and intensities ----------------------------------------------------------------------------------------------


def test_small_scans_are_padded_at_the_end_and_the_padding_does_not_count() -> None:
    volume = coordinates((20, 17, 60))
    view = View(0, 0, (32, 64, 32), (1.0, 1.0, 1.0))
    matrix, offset = draw_placement(volume.info, view, generator(0), rotate=0, mirror=0)
    assert offset[:2].tolist() == [0, 0]
    image, inside = resampled(replace_intensities(volume, 0.5), view, matrix, offset)
    assert inside[:20, :17].all()
    assert not inside[20:].any()
    assert not inside[:, 17:].any()
    assert (image[~inside] == 0).all()
    # 20 voxels reach into both tokens along z, 17 into two of four along y.
    assert tokens_inside(inside, (2, 4, 2)).reshape(2, 4, 2).all((0, 2)).tolist() == [True, True, False, False]
    assert tokens_inside(inside[:16], (1, 4, 2)).sum() == 4


def replace_intensities(volume: Array, value: float) -> Array:
    changed = Array(np.full_like(volume.voxels, value))
    changed.info = volume.info
    return changed


def test_intensities_run_from_the_first_to_the_last_half_percent_above_the_smallest() -> None:
    voxels = np.concatenate([np.full(5000, -7.0), np.linspace(0, 1000, 5000)])
    low, high = channel_range(voxels)
    assert (low, high) == pytest.approx((5, 995), abs=0.2)
    assert channel_range(np.ones(5)) == (1.0, 1.0)
    volume = Array(np.array([-7.0, 5, 252.5, 500, 995, 1000]).reshape(1, 1, 1, 6), spacing=(1, 1, 1))
    volume.info = replace(volume.info, channel_ranges=((5.0, 995.0),))
    view = View(0, DA_2D, (1, 1, 6), (1.0, 1.0, 1.0))
    image, _ = resampled(volume, view, np.eye(3), np.zeros(3))
    assert image.ravel().tolist() == pytest.approx([0, 0, 0.25, 0.5, 1, 1])


def test_other_intensities_stay_between_0_and_1_and_often_change_something() -> None:
    image = generator().random((1, 8, 8)).astype(np.float32)
    made = [other_intensities(image, generator(seed), 0.3) for seed in range(200)]
    assert all(m.min() >= 0 and m.max() <= 1 and m.dtype == np.float32 for m in made)
    share = np.mean([not np.array_equal(m, image) for m in made])
    assert abs(share - (1 - 0.7 * 0.85 * 0.85)) < 0.12
    assert np.array_equal(other_intensities(image, generator(), 0), image)


SPEC = PUMITSpec({"tokenizer": CROPS, "mim": replace(CROPS, tokens=(1, 2, 2))}, 0.5, rotate=0, mirror=0, intensity=0)


def test_a_view_keeps_the_intensities_of_the_plan() -> None:
    """What the transformer sees is `low + image * (high - low)`: the voxels themselves, but for the extremes."""
    volume = Array(generator().normal(3, 2, (1, 16, 32, 32)), spacing=(1, 1, 1))
    sample = PUMITPretraining.sample(SPEC, volume, ("mim", View(0, 0, (16, 32, 32), (1.0, 1.0, 1.0))), generator())
    low, high = sample["low"], sample["high"]
    assert np.allclose(low + sample["image"] * (high - low), np.clip(volume.voxels, low, high), atol=1e-5)
    assert low == pytest.approx(np.quantile(volume.voxels, 0.005), abs=0.05)
    assert sample["valid"]
    assert sample["inside"].all()


def test_constant_crops_do_not_count() -> None:
    volume = Array(np.zeros((1, 16, 32, 32)), spacing=(1, 1, 1))
    volume.info = replace(volume.info, channel_ranges=((0.0, 1.0),))
    sample = PUMITPretraining.sample(SPEC, volume, ("mim", View(0, 0, (16, 32, 32), (1.0, 1.0, 1.0))), generator())
    assert not sample["valid"]


def test_degrees_do_not_mix_in_a_batch() -> None:
    volume = Array(generator().normal(size=(1, 16, 32, 32)), spacing=(1, 1, 1))
    samples = [
        PUMITPretraining.sample(SPEC, volume, ("tokenizer", View(0, degree, (16, 32, 32), (1.0,) * 3)), generator())
        for degree in (0, 0, 1)
    ]
    assert PUMITPretraining.collate(samples[:2])["degree"] == 0
    with pytest.raises(ValueError, match="too many values"):
        PUMITPretraining.collate(samples)


def test_each_stage_has_its_crops() -> None:
    pool = [case((1, 1, 1))]
    for stage, tokens in [("tokenizer", (4, 8, 8)), ("mim", (1, 2, 2))]:
        drawn = PUMITPretraining.draw(SPEC, pool, generator(), Step(stage, 0, 10, 0))
        assert all(name == stage and view.size == view_size(tokens, view.degree) for _, (name, view) in drawn)


# Masks ----------------------------------------------------------------------------------------------------------------


def test_as_many_tokens_are_seen_as_in_the_authors_code() -> None:
    assert visible_count(500, 0.55) == 224
    assert visible_count(100, 0.55) == 44
    assert visible_count(2, 0.9) == 1
    assert visible_count(2, 0.1) == 1
    drawn = draw_visible(np.ones(500, bool), 0.55, generator())
    assert drawn.shape == (224,)
    assert (np.diff(drawn) > 0).all()


def test_every_token_is_seen_as_often() -> None:
    counts = sum(np.bincount(draw_visible(np.ones(20, bool), 0.55, generator(s)), minlength=20) for s in range(1000))
    assert abs(counts / 1000 - visible_count(20, 0.55) / 20).max() < 0.07


@pytest.mark.parametrize("inside", range(2, 25))
def test_padding_takes_no_part_in_masking_but_counts_stay_equal(inside: int) -> None:
    is_inside = generator(inside).permutation(np.arange(24) < inside)
    visible = draw_visible(is_inside, 0.55, generator())
    assert len(visible) == visible_count(24, 0.55)
    seen = int(is_inside[visible].sum())
    assert 1 <= seen < inside
    assert abs(seen - 0.45 * inside) <= 1


def test_only_masked_tokens_that_count_have_a_gradient() -> None:
    logits = torch.randn(2, 6, 5, requires_grad=True)
    targets = torch.rand(2, 6, 5).softmax(-1)
    counted = masked_tokens(torch.tensor([[0, 3], [1, 2]]), 6)
    assert counted.tolist() == [[False, True, True, False, True, True], [True, False, False, True, True, True]]
    counted[1, 5] = False
    masked_terms(logits, targets, counted)["ce"].backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, counted)


def test_the_masked_loss_is_a_divergence() -> None:
    """0 for the right answer; for the mean of the targets what `prior` says: here ln 2, of two certain tokens."""
    targets = torch.eye(4)[None, :2]
    everything = torch.ones(1, 2, dtype=torch.bool)
    right = masked_terms(torch.where(targets > 0, 0.0, -50.0), targets, everything)
    assert float(right["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(right["prior"]) == pytest.approx(np.log(2), abs=1e-6)
    mean = masked_terms(targets.mean(1, keepdim=True).clamp_min(1e-20).log().expand(1, 2, 4), targets, everything)
    assert float(mean["kl"]) == pytest.approx(np.log(2), abs=1e-6)
    soft = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]])
    terms = masked_terms(torch.tensor([[[0.0, 0.0, -50, -50]]]), soft, everything[:, :1])
    assert float(terms["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(terms["ce"]) == pytest.approx(np.log(2), abs=1e-6)
