"""Where VoCo cuts: size of a crop, grid of base crops, place of the region, overlap labels. Pure numpy.

Rules of this project (no paper gives any for anisotropic scans); axes are (z, y, x), or (y, x) in a 2d configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planners.errors import PlanError
from pretrain.crops import best_of, window_start

_MIN_BOTTLENECK = 4  # voxels of the deepest map; instance norm needs 2, and 2 carry nothing but a sign
_MIN_BASES = 4
_MAX_CELLS = 4  # of one axis
_MAX_UPSAMPLING = 2.0
_COMPLETE = 1 - 1e-6  # sum of the labels of a crop that lies in valid bases only


@dataclass(frozen=True)
class Layout:
    """What is cut from every volume."""

    crop: tuple[int, ...]
    """Voxels of every base and random crop."""
    grid: tuple[int, ...]
    """Base crops per axis."""
    whole: bool
    """Whether the whole foreground is resized to the grid, because the scans are too small to cut the grid out of them."""
    upsampling: float
    """Largest factor of that resizing for the median scan."""

    @property
    def bases(self) -> int:
        return math.prod(self.grid)

    @property
    def region(self) -> tuple[int, ...]:
        """Voxels of the grid as a whole."""
        return tuple(c * g for c, g in zip(self.crop, self.grid, strict=True))


def crop_size(patch_size: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """About half the patch on each axis, a multiple of the encoder's total stride, with at least four bottleneck voxels."""
    crop = [s * max(1, math.floor(p / (2 * s) + 0.5)) for p, s in zip(patch_size, stride, strict=True)]
    while _bottleneck(crop, stride) < _MIN_BOTTLENECK:
        axis = max(range(len(crop)), key=lambda a: patch_size[a] - crop[a])
        crop[axis] += stride[axis]
    return tuple(crop)


def choose_layout(
    patch_size: Sequence[int],
    stride: Sequence[int],
    shape: Sequence[float],
    spacing: Sequence[float],
    *,
    max_bases: int = 9,
    grid: Sequence[int] | None = None,
) -> Layout:
    """Crop and grid for scans of a typical `shape` (voxels) and `spacing` (mm); `grid` overrides the rule.

    Raises PlanError when the scans are so small that they would have to be enlarged more than twice.
    """
    crop = list(crop_size(patch_size, stride))
    if grid is not None:
        return _layout_of_grid(crop, tuple(grid), stride, shape)
    chosen = _grid(crop, shape, spacing, max_bases)
    while math.prod(chosen) < _MIN_BASES:
        axis = _reducible_axis(crop, stride)
        if axis is None:
            break
        crop[axis] -= stride[axis]
        chosen = _grid(crop, shape, spacing, max_bases)
    if math.prod(chosen) >= _MIN_BASES:
        _upsampling(crop, chosen, shape)  # on an axis with one cell, a crop may be far longer than the scan
        return Layout(tuple(crop), chosen, False, 1.0)
    longest = sorted(range(len(crop)), key=lambda a: -shape[a] * spacing[a])[:2]
    chosen = tuple(2 if axis in longest else 1 for axis in range(len(crop)))
    return Layout(tuple(crop), chosen, True, _upsampling(crop, chosen, shape))


def overlap_labels(offset: Sequence[float] | np.ndarray, crop: Sequence[int], grid: Sequence[int]) -> np.ndarray:
    """Share of a crop at `offset` (voxels of the region) that lies in each base crop: float32 of shape `grid`, sum 1."""
    labels = np.ones((), np.float32)
    for o, c, g in zip(offset, crop, grid, strict=True):
        cells = np.arange(g) * c
        share = np.maximum(0, np.minimum(o + c, cells + c) - np.maximum(o, cells)) / c
        labels = labels[..., None] * share.astype(np.float32)
    return labels


def draw_offset(
    layout: Layout, box: Sequence[tuple[int, int]], bases_valid: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, bool]:
    """A random crop inside `box` (first and one past the last voxel of the region that holds image, per axis).

    Returns:
        offset (axes,), labels (bases,) over the valid bases, and whether these sum to 1 (they do not where the crop reaches
        into a base that is padding, which ten tries could not avoid).
    """

    def one() -> tuple[tuple[np.ndarray, np.ndarray], float]:
        axes = zip(box, layout.crop, layout.grid, strict=True)
        offset = np.array([_one_offset(low, high, c, g, rng) for (low, high), c, g in axes])
        labels = overlap_labels(offset, layout.crop, layout.grid).ravel() * bases_valid
        return (offset, labels), float(labels.sum())

    (offset, labels), total = best_of(10, one, _COMPLETE)
    return offset, labels, total >= _COMPLETE


def valid_bases(layout: Layout, box: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which base crops (bases,) are at most 90 % padding, `box` being the part of the region that holds image."""
    share = np.ones(())
    for (low, high), c, g in zip(box, layout.crop, layout.grid, strict=True):
        cells = np.arange(g) * c
        share = share[..., None] * np.maximum(0, np.minimum(high, cells + c) - np.maximum(low, cells)) / c
    return share.ravel() >= 0.1


def place_window(
    layout: Layout,
    shape: Sequence[int],
    foreground_box: Sequence[tuple[int, int]],
    rng: np.random.Generator,
) -> tuple[list[int], list[int]]:
    """Start and size (voxels) of what is cut and resized to the region: zoomed out by at most 2 as far as the scan allows.

    It lies in the foreground's box where it fits in, else around it; a scan that is smaller is put in the middle.
    """
    room = [n / r for n, r, g in zip(shape, layout.region, layout.grid, strict=True) if g > 1]
    zoom = rng.uniform(1.0, max(1.0, min(2.0, *room)))
    size = [
        min(round(zoom * r), max(n, r)) if g > 1 else r
        for n, r, g in zip(shape, layout.region, layout.grid, strict=True)
    ]
    return window_start(shape, size, foreground_box, rng), size


def typical_labels(layout: Layout) -> np.ndarray:
    """Labels (many, bases) of crops spread evenly over a region without padding: the statistics of the task."""
    moving = [axis for axis, g in enumerate(layout.grid) if g > 1]
    count = round(16_384 ** (1 / len(moving)))
    rows: np.ndarray = np.ones((1, 1))
    for axis, (c, g) in enumerate(zip(layout.crop, layout.grid, strict=True)):
        # Between two voxels: the few crops that lie exactly on a base crop would weigh too much.
        offsets = (np.arange(count) + 0.5) / count * c * (g - 1) if axis in moving else np.zeros(1)
        shares = np.stack([overlap_labels([o], [c], [g]) for o in offsets])
        rows = np.einsum("ra,sb->rsab", rows, shares).reshape(len(rows) * len(shares), -1)
    return rows.astype(np.float32)


def _one_offset(low: int, high: int, crop: int, cells: int, rng: np.random.Generator) -> int:
    first, last = low, high - crop
    if last < first:  # less image than one crop: all of it, in the middle
        first = last = (low + high - crop) // 2
    most = crop * (cells - 1)
    return int(rng.integers(min(max(first, 0), most), min(max(last, 0), most) + 1))


def _grid(crop: Sequence[int], shape: Sequence[float], spacing: Sequence[float], max_bases: int) -> tuple[int, ...]:
    """Cells are added where the region is shortest in mm, on axes at least half as long as the longest."""
    most = [min(_MAX_CELLS, int(n // c)) for n, c in zip(shape, crop, strict=True)]
    length = [n * s for n, s in zip(shape, spacing, strict=True)]
    grid = [1] * len(crop)
    while True:
        candidates = [
            axis
            for axis in range(len(crop))
            if grid[axis] < most[axis]
            and length[axis] >= 0.5 * max(length)
            and math.prod(grid) // grid[axis] * (grid[axis] + 1) <= max_bases
        ]
        if not candidates:
            return tuple(grid)
        grid[min(candidates, key=lambda axis: grid[axis] * crop[axis] * spacing[axis])] += 1


def _layout_of_grid(crop: list[int], grid: tuple[int, ...], stride: Sequence[int], shape: Sequence[float]) -> Layout:
    """The user's grid, with crops made smaller until it fits into the typical scan or nothing is left to take away."""
    if len(grid) != len(crop) or min(grid) < 1 or not 2 <= math.prod(grid) <= 16:
        raise PlanError(
            "Not a grid of base crops",
            found=",".join(map(str, grid)),
            expected=f"{len(crop)} numbers, in the order of the axes {'(z, y, x)' if len(crop) == 3 else '(y, x)'}, "
            "2 to 16 cells in all",
            remedy="--set voco.grid=1,3,3" if len(crop) == 3 else "--set voco.grid=3,3",
        )
    while True:
        too_long = [axis for axis in range(len(crop)) if grid[axis] * crop[axis] > shape[axis]]
        axis = _reducible_axis(crop, stride, too_long)
        if axis is None:
            break
        crop[axis] -= stride[axis]
    _upsampling(crop, grid, shape)
    return Layout(tuple(crop), grid, False, 1.0)


def _reducible_axis(crop: Sequence[int], stride: Sequence[int], among: Sequence[int] | None = None) -> int | None:
    """The axis with the most bottleneck voxels that can lose one with at least four left in all."""
    axes = [
        axis
        for axis in (range(len(crop)) if among is None else among)
        if crop[axis] > stride[axis]
        and _bottleneck([c - s * (a == axis) for a, (c, s) in enumerate(zip(crop, stride, strict=True))], stride)
        >= _MIN_BOTTLENECK
    ]
    return max(axes, key=lambda axis: crop[axis] // stride[axis], default=None)


def _bottleneck(crop: Sequence[int], stride: Sequence[int]) -> int:
    return math.prod(c // s for c, s in zip(crop, stride, strict=True))


def _upsampling(crop: Sequence[int], grid: Sequence[int], shape: Sequence[float]) -> float:
    """How much the typical scan must grow to hold the grid; PlanError beyond 2."""
    factor = max(1.0, *(g * c / n for g, c, n in zip(grid, crop, shape, strict=True)))
    if factor > _MAX_UPSAMPLING:
        raise PlanError(
            "The scans are too small for VoCo with this network",
            found=f"a typical scan of {_text(shape)} voxels, crops of {_text(crop)}, a grid of {_text(grid)}",
            expected=f"at least {_text([math.ceil(g * c / 2) for g, c in zip(grid, crop, strict=True)])} voxels",
            remedy="plan a smaller patch (--patch-size) or a finer spacing (--spacing), or take a network with fewer halvings",
        )
    return factor


def _text(sizes: Sequence[float]) -> str:
    return "×".join(f"{n:g}" for n in sizes)
