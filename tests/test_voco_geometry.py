"""Where VoCo cuts. Values: computed by hand, or with the authors' functions (specification of VoCo, checks 1 to 3 and 12)."""

from __future__ import annotations

import numpy as np
import pytest

from planners.errors import PlanError
from pretrain.methods.voco_geometry import (
    Layout,
    choose_layout,
    crop_size,
    draw_offset,
    overlap_labels,
    place_window,
    typical_labels,
    valid_bases,
)

NINE = Layout((64, 64), (3, 3), False, 1.0)


def whole(layout: Layout) -> list[tuple[int, int]]:
    return [(0, r) for r in layout.region]


@pytest.mark.parametrize(
    ("patch", "stride", "crop"),
    [
        ((40, 56, 40), (8, 8, 8), (24, 32, 24)),
        ((20, 320, 256), (4, 64, 64), (12, 192, 128)),
        ((128, 128, 128), (32, 32, 32), (64, 64, 64)),
        ((8, 8, 8), (8, 8, 8), (16, 16, 8)),  # one bottleneck voxel would not do, nor two
    ],
)
def test_a_crop_is_half_a_patch_and_keeps_four_bottleneck_voxels(
    patch: tuple[int, ...], stride: tuple[int, ...], crop: tuple[int, ...]
) -> None:
    assert crop_size(patch, stride) == crop
    assert all(c % s == 0 for c, s in zip(crop, stride, strict=True))
    assert np.prod(np.floor_divide(crop, stride)) >= 4


@pytest.mark.parametrize(
    ("patch", "stride", "shape", "spacing", "crop", "grid"),
    [
        ((40, 56, 40), (8, 8, 8), (36, 50, 35), (1, 1, 1), (16, 24, 24), (2, 2, 1)),
        ((20, 320, 256), (4, 64, 64), (20, 320, 320), (3.6, 0.62, 0.62), (8, 128, 128), (1, 2, 2)),
        ((128, 128, 128), (32, 32, 32), (260, 400, 400), (1.5, 1, 1), (64, 64, 64), (2, 2, 2)),
        ((80, 160, 160), (16, 32, 32), (128, 480, 500), (3, 0.78, 0.78), (48, 96, 96), (2, 2, 2)),
        ((512, 512), (128, 128), (512, 512), (0.8, 0.8), (256, 256), (2, 2)),
    ],
)
def test_layouts_of_typical_plans(
    patch: tuple, stride: tuple, shape: tuple, spacing: tuple, crop: tuple, grid: tuple
) -> None:
    assert choose_layout(patch, stride, shape, spacing) == Layout(crop, grid, False, 1.0)


def test_small_scans_are_enlarged_to_a_grid() -> None:
    layout = choose_layout((16, 256, 224), (4, 64, 32), (12, 240, 220), (10, 1.5, 1.5))
    assert (layout.crop, layout.grid, layout.whole) == ((4, 128, 64), (1, 2, 2), True)
    assert layout.upsampling == pytest.approx(256 / 240)


def test_scans_that_would_have_to_grow_more_than_twice_are_refused_with_the_usable_size() -> None:
    with pytest.raises(PlanError, match="32×64×64 voxels") as error:
        choose_layout((128, 128, 128), (32, 32, 32), (1, 60, 60), (5, 1, 1), grid=(2, 2, 2))
    assert "1×60×60" in str(error.value)
    with pytest.raises(PlanError, match="too small"):
        choose_layout((128, 128, 128), (32, 32, 32), (1, 300, 300), (5, 1, 1))


def test_a_grid_of_one_base_is_never_made() -> None:
    for shape in [(24, 24, 24), (30, 40, 90), (200, 30, 30)]:
        assert choose_layout((40, 56, 40), (8, 8, 8), shape, (1, 1, 1)).bases >= 4
    with pytest.raises(PlanError, match="grid"):
        choose_layout((40, 56, 40), (8, 8, 8), (64, 64, 64), (1, 1, 1), grid=(1, 1, 1))


def test_the_authors_grid_can_be_asked_for() -> None:
    layout = choose_layout((128, 128, 128), (32, 32, 32), (64, 200, 200), (1, 1, 1), grid=(1, 3, 3))
    assert (layout.crop, layout.grid) == ((64, 64, 64), (1, 3, 3))
    with pytest.raises(PlanError, match="grid"):
        choose_layout((128, 128, 128), (32, 32, 32), (64, 200, 200), (1, 1, 1), grid=(3, 3))


def test_more_bases_when_allowed() -> None:
    arguments = ((80, 80), (8, 8), (400, 400), (1, 1))
    assert choose_layout(*arguments).grid == (3, 3)
    assert choose_layout(*arguments, max_bases=16).grid == (4, 4)


def test_labels_are_products_of_overlaps() -> None:
    assert overlap_labels((16, 32), (64, 64), (3, 3)).ravel().tolist() == [0.375, 0.375, 0, 0.125, 0.125, 0, 0, 0, 0]
    y = overlap_labels((8, 24, 0), (16, 32, 16), (2, 2, 1))
    assert y[..., 0].tolist() == [[0.125, 0.375], [0.125, 0.375]]
    y = overlap_labels((4, 96, 32), (8, 128, 128), (2, 3, 2))
    assert y[0].tolist() == [[0.09375, 0.03125], [0.28125, 0.09375], [0, 0]]
    assert np.array_equal(y[0], y[1])


def test_a_crop_on_a_cell_is_that_cell() -> None:
    for index, cell in enumerate(np.ndindex(3, 3)):
        expected = np.eye(9)[index]
        assert overlap_labels(np.multiply(cell, 64), (64, 64), (3, 3)).ravel().tolist() == expected.tolist()


def test_labels_sum_to_one_and_are_sparse() -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([draw_offset(NINE, whole(NINE), np.ones(9), rng)[1] for _ in range(1000)])
    assert np.allclose(rows.sum(1), 1, atol=1e-6)
    assert rows.min() >= 0
    assert rows.max() <= 1
    # 3.94 with the authors' function, which never reaches the last cell; an inclusive end makes it a little less.
    assert (rows > 0).sum(1).mean() == pytest.approx((2 - 3 / 129) ** 2, abs=0.05)
    four = Layout((96, 96), (4, 4), False, 1.0)
    rows = np.stack([draw_offset(four, whole(four), np.ones(16), rng)[1] for _ in range(1000)])
    assert (rows > 0).sum(1).mean() == pytest.approx((2 - 4 / 289) ** 2, abs=0.05)


def test_offsets_reach_the_last_cell() -> None:
    layout = Layout((2, 3), (2, 2), False, 1.0)
    rng = np.random.default_rng(0)
    seen = {tuple(draw_offset(layout, whole(layout), np.ones(4), rng)[0].tolist()) for _ in range(300)}
    assert seen == {(y, x) for y in range(3) for x in range(4)}


def test_padding_drops_base_crops_and_keeps_random_crops_out() -> None:
    layout = Layout((8, 10, 10), (1, 2, 2), False, 1.0)
    box = [(0, 8), (0, 10), (4, 20)]
    valid = valid_bases(layout, box)
    assert valid.tolist() == [True, True, False, False]
    rng = np.random.default_rng(0)
    for _ in range(200):
        offset, labels, complete = draw_offset(layout, box, valid, rng)
        assert complete
        assert labels.sum() == pytest.approx(1)
        assert offset[1] == 0
        assert offset[2] >= 4


def test_a_crop_that_must_touch_padding_is_marked() -> None:
    """Less image than one crop: no random crop lies in valid bases alone."""
    layout = Layout((8, 10, 10), (1, 2, 2), False, 1.0)
    box = [(0, 8), (7, 13), (0, 20)]
    offset, labels, complete = draw_offset(layout, box, valid_bases(layout, box), np.random.default_rng(0))
    assert complete  # both rows hold 30 % image each
    assert offset[1] == 5
    box = [(0, 8), (0, 3), (9, 12)]
    _, labels, complete = draw_offset(layout, box, valid_bases(layout, box), np.random.default_rng(0))
    assert not complete
    assert labels.sum() < 1


def test_windows_zoom_out_at_most_twice_and_stay_in_the_scan() -> None:
    layout = Layout((8, 16, 16), (1, 2, 2), False, 1.0)
    rng = np.random.default_rng(0)
    zooms = []
    for _ in range(200):
        start, size = place_window(layout, (20, 50, 100), ((2, 18), (5, 45), (10, 90)), rng)
        assert size[0] == 8
        assert all(s >= 0 and s + w <= n for s, w, n in zip(start, size, (20, 50, 100), strict=True))
        zooms.append(size[1] / 32)
        assert size[1] == size[2]
    assert min(zooms) < 1.05
    assert max(zooms) == pytest.approx(50 / 32, abs=0.05)


def test_a_window_around_a_small_scan_puts_it_in_the_middle() -> None:
    layout = Layout((8, 16, 16), (1, 2, 2), False, 1.0)
    start, size = place_window(layout, (5, 32, 20), ((0, 5), (0, 32), (0, 20)), np.random.default_rng(0))
    assert size == [8, 32, 32]
    assert start == [-1, 0, -6]


def test_statistics_of_the_task() -> None:
    labels = typical_labels(NINE)
    assert np.allclose(labels.sum(1), 1, atol=1e-5)
    top = np.bincount(labels.argmax(1), minlength=9) / len(labels)
    assert top.argmax() == 4
    assert top[4] == pytest.approx(0.25, abs=0.01)
