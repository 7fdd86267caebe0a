"""A grid of tiles cut from a scan, which some methods put in order, place or predict: its geometry, its views, its batches.

Tiles are cut with gaps and encoded one by one: in one large feature map each would see its neighbours. What could tell a
tile's place without its content is taken away: the tile's position in its cell is random, its mean and spread are removed,
and gain, offset and noise differ from tile to tile. Gaps as in Doersch et al. (arXiv:1505.05192) and Noroozi and Favaro
(arXiv:1603.09246), in three dimensions as in Taleb et al. (arXiv:2006.03829); the sizes are rules of this project.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from planners.decisions import times
from planners.errors import PlanError
from pretrain.crops import is_air, other_scanner, resize, window_start
from pretrain.method import Target
from pretrain.volumes import CaseInfo, Plane, Volume

logger = logging.getLogger("autoseg")

AIR_SHARE = 4 / 27
"""Of the tiles of a grid, at most, may be air."""

_FILL = 0.85  # of a cell, at most, is its tile; the rest is the gap
_FEW = 2  # voxels of the deepest map on each axis: fewer cannot be normalised
_MAX_ZOOM = 2.5
_TYPICAL = 10  # percentile of the scans' sizes: nine in ten hold the whole grid
_MOST_SMALL = 0.2  # of the scans may be too small
_MEMORY = 1.5  # encoding needs less than segmenting: voxels of a batch, in batches of the plan
_BATCH = (4, 64)  # grids for one optimiser step
_LEAST_SPREAD = 1e-3  # of the scan's standard deviation


@dataclass(frozen=True)
class TileGrid:
    """Tiles of every scan. Axes are (z, y, x), or (y, x) in a 2D configuration; tiles are counted in C order."""

    grid: tuple[int, ...]
    """Tiles per axis."""
    cell: tuple[int, ...]
    """Voxels that belong to a tile and its gap."""
    native: tuple[int, ...]
    """Voxels that are cut."""
    size: tuple[int, ...]
    """Voxels that the encoder gets: the tile, resized."""

    @property
    def tiles(self) -> int:
        return math.prod(self.grid)

    @property
    def dims(self) -> int:
        return len(self.grid)

    @property
    def zoom(self) -> float:
        """Largest enlargement of an axis."""
        return max(s / n for s, n in zip(self.size, self.native, strict=True))

    def __str__(self) -> str:
        enlarged = f"enlarged at most {self.zoom:.2f}-fold to {times(self.size)}"
        return f"{times(self.grid)} tiles of {times(self.native)} voxels, {enlarged}"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a scan of `shape` voxels (its last axes count) holds all tiles."""
        axes = zip(shape[-self.dims :], self.grid, self.native, strict=True)
        return all(length >= n * native for length, n, native in axes)


def choose_grid(
    grid: Sequence[int],
    stride: Sequence[int],
    patch_size: Sequence[int],
    shape: Sequence[int],
    *,
    one_by_one: bool = False,
    fixed_axis: int | None = None,
    smaller: Mapping[str, Sequence[int]] | None = None,
) -> TileGrid:
    """Sizes of the tiles for scans of `shape` voxels and an encoder of total `stride`.

    Tiles get twice the stride on every axis. Where they would have to be enlarged more than 2.5 times, the axis that needs
    most gets a single tile (or one tile less at a time, with `one_by_one`); in a plane, on `fixed_axis` or on a second axis
    that would leave too little of the task.

    Args:
        smaller: other grids that the user can ask for, by how; the first that has room is the remedy.

    Raises PlanError naming the axis.
    """
    asked, grid = grid, list(grid)
    given_up: int | None = None
    while True:
        # The first term is the specification's. Cells are then rounded down, so that a tile may lack a voxel: few for a deep
        # network, but one of two on an axis that is never halved, for which all axes would be enlarged twofold.
        wanted = [max(math.ceil(n * _FEW * r / _FILL), n * (_FEW * r + 1)) for n, r in zip(grid, stride, strict=True)]
        cell = [min(v, w) // n for v, w, n in zip(shape, wanted, grid, strict=True)]
        largest = [int(_FILL * c) for c in cell]
        needs = [_FEW * r / max(t, 0.1) if n > 1 else 1.0 for n, r, t in zip(grid, stride, largest, strict=True)]
        zoom = max(1.0, *needs)
        if zoom <= _MAX_ZOOM:
            break
        axis = needs.index(zoom)
        if len(grid) == 2 or axis == fixed_axis or given_up not in (None, axis):
            raise _refusal(axis, grid[axis], asked, stride, patch_size, shape, fixed_axis, smaller or {})
        given_up = axis
        grid[axis] = grid[axis] - 1 if one_by_one else 1
    native, size = [], []
    for axis, (n, r, t) in enumerate(zip(grid, stride, largest, strict=True)):
        if n == 1:
            length = min(shape[axis], patch_size[axis])
            size.append(r * max(_FEW, length // r))
            native.append(min(length, size[-1]))
            cell[axis] = native[-1]
            if size[-1] > _MAX_ZOOM * native[-1]:
                raise _refusal(axis, 1, asked, stride, patch_size, shape, fixed_axis, smaller or {})
        else:
            size.append(r * max(_FEW, int(zoom * t / r + 1e-9)))
            native.append(min(t, round(size[-1] / zoom)))
    return TileGrid(tuple(grid), tuple(cell), tuple(native), tuple(size))


def _refusal(
    axis: int,
    number: int,
    asked: Sequence[int],
    stride: Sequence[int],
    patch_size: Sequence[int],
    shape: Sequence[int],
    fixed_axis: int | None,
    smaller: Mapping[str, Sequence[int]],
) -> PlanError:
    """Why there is no room for `number` tiles on `axis`, and how much there would have to be."""

    def has_room(grid: Sequence[int]) -> bool:
        try:
            choose_grid(grid, stride, patch_size, shape, fixed_axis=fixed_axis)
        except PlanError:
            return False
        return True

    way_out = next((f"{how}; or " for how, grid in smaller.items() if has_room(grid)), "")
    tile = math.ceil(_FEW * stride[axis] / _MAX_ZOOM)
    # Both are rounded down: what is cut from a cell, and what is left for a cell.
    needed = tile if number == 1 else number * next(cell for cell in itertools.count(tile) if int(_FILL * cell) >= tile)
    return PlanError(
        "The scans are too small for tiles with this network",
        where=f"axis {'zyx'[axis - len(asked)]}",
        found=f"scans of typically {times(shape)} voxels for a grid of {times(asked)} tiles",
        expected=f"at least {needed} voxels on this axis, because the "
        f"network halves it {round(math.log2(stride[axis]))} times",
        remedy=f"{way_out}--method rotation or exemplar needs no tiles; or plan a finer spacing (--spacing) or a smaller patch "
        "(--patch-size), whose network has fewer halvings",
    )


def typical_shape(pool: Sequence[CaseInfo], dims: int) -> tuple[int, ...]:
    """Voxels that nine in ten scans reach, on each axis."""
    return tuple(int(n) for n in np.percentile([case.shape[-dims:] for case in pool], _TYPICAL, axis=0))


def check_pool(grid: TileGrid, pool: Sequence[CaseInfo]) -> None:
    """Say how many scans are too small for the grid; PlanError when these are more than a fifth."""
    small = [case.id for case in pool if not grid.fits(case.shape)]
    named = ", ".join(small[:3]) + (", …" if len(small) > 3 else "")
    if len(small) > _MOST_SMALL * len(pool):
        raise PlanError(
            "Too many scans are too small for the grid of tiles",
            found=f"{len(small)} of {len(pool)}: {named}",
            expected=f"at least {times([n * t for n, t in zip(grid.grid, grid.native, strict=True)])} voxels",
            remedy="--method rotation or exemplar needs no tiles; or move the small scans to a dataset of their own",
        )
    if small:
        logger.warning(
            "%d of %d scans are too small for the grid of tiles and are left out: %s", len(small), len(pool), named
        )


@dataclass(frozen=True)
class BatchSize:
    """How many grids are encoded, and how."""

    volumes: int
    """Of a batch."""
    accumulate: int
    """Batches for one optimiser step."""
    at_once: int
    """Tiles that go through the encoder together; beyond that, memory is saved by computing twice."""

    def __str__(self) -> str:
        return f"{self.volumes} volumes a batch" + (
            f", {self.accumulate} batches a step" if self.accumulate > 1 else ""
        )


def batch_size(target: Target, grid: TileGrid, encoded: int, volumes: int | None, least: int = 1) -> BatchSize:
    """As many voxels as the plan's segmentation batch leaves room for, and at least four grids for an optimiser step.

    Args:
        encoded: tiles of one volume that are encoded; volumes: the user's choice; least: volumes of a batch.
    """
    room = _MEMORY * int(target.settings["batch_size"]) * math.prod(target.patch_size)
    at_once = max(1, int(room / math.prod(grid.size)))
    if volumes is not None:
        return BatchSize(volumes, 1, at_once)
    volumes = min(_BATCH[1], max(least, at_once // encoded))
    return BatchSize(volumes, max(1, math.ceil(_BATCH[0] / volumes)), at_once)


def draw_cases(grid: TileGrid, pool: Sequence[CaseInfo], count: int, rng: np.random.Generator) -> list[str]:
    """Cases of a batch that hold the grid, different ones if there are enough.

    Where none does, as may be among the few that are held out, those that have a voxel for each tile: then `cut_tiles` cuts
    smaller ones. PlanError when there is none of these either.
    """
    usable = [case.id for case in pool if grid.fits(case.shape)] or [
        case.id for case in pool if all(v >= n for v, n in zip(case.shape[-grid.dims :], grid.grid, strict=True))
    ]
    if not usable:
        raise PlanError(
            "None of these scans has room for the grid of tiles",
            found=", ".join(f"{case.id} ({times(case.shape)} voxels)" for case in pool[:3]),
            expected=f"{times(grid.grid)} tiles of {times(grid.native)} voxels",
            remedy="if they are the scans held out for measuring, --seed holds out others; else leave out scans this small",
        )
    return [str(name) for name in rng.choice(usable, size=count, replace=count > len(usable))]


def cut_tiles(
    grid: TileGrid, source: Volume | Plane, which: Sequence[int], rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """The tiles `which` of one region of the scan, each at a random place in its cell.

    Returns:
        voxels (channels, *native) of each, and which are air (tiles,).
    """
    shape, box = source.info.shape, source.info.foreground_box
    cell = [min(c, v // n) for c, v, n in zip(grid.cell, shape, grid.grid, strict=True)]
    native = [min(t, c) for t, c in zip(grid.native, cell, strict=True)]
    origin = window_start(shape, [n * c for n, c in zip(grid.grid, cell, strict=True)], box, rng)
    margins = [(c - t) // 4 for c, t in zip(cell, native, strict=True)]
    tiles = []
    for index in which:
        places = np.unravel_index(index, grid.grid)
        axes = zip(origin, places, cell, native, margins, strict=True)
        start = [o + int(p) * c + int(rng.integers(m, c - t - m + 1)) for o, p, c, t, m in axes]
        tiles.append(source.read(start, native))
    return tiles, np.array([is_air(tile, source.info) for tile in tiles])


def finish_tiles(
    grid: TileGrid, tiles: Sequence[np.ndarray], info: CaseInfo, rng: np.random.Generator | None
) -> np.ndarray:
    """What the encoder gets: (tiles, channels, *size), each channel of mean 0 and standard deviation 1.

    `rng` then changes each tile's gain and offset and adds noise; None leaves them.
    """
    views = np.stack([resize(tile, grid.size) for tile in tiles])
    axes = tuple(range(2, views.ndim))
    mean, spread = views.mean(axes, keepdims=True), views.std(axes, keepdims=True)
    spread = np.maximum(spread, np.float32(_LEAST_SPREAD * info.intensity_std) + np.finfo(np.float32).tiny)
    if rng is not None:
        views = other_scanner(views, mean, spread, rng)
    return (views - mean) / spread


def tile_features(encoder: Any, grid: TileGrid) -> int:
    """Numbers that `encode_tiles` gives for a tile: channels times voxels of the encoder's last stage."""
    stride = np.prod(np.array(encoder.strides), axis=0)
    return int(encoder.output_channels[-1]) * math.prod(s // int(r) for s, r in zip(grid.size, stride, strict=True))


def encode_tiles(encoder: nn.Module, tiles: Tensor, at_once: int) -> Tensor:
    """The last stage of each tile, flat and in float32: (volumes, tiles, channels, *size) → (volumes, tiles, features).

    Not its mean over space: behind an instance norm means are nearly the same for all tiles, and where in the tile something
    lies belongs to the answer. More than `at_once` tiles go through the encoder in parts, which are computed again for the
    gradient.
    """
    flat = tiles.flatten(0, 1)
    if len(flat) <= at_once or not torch.is_grad_enabled():
        parts = [_last_map(encoder, part) for part in flat.split(at_once)]
    else:
        parts = [checkpoint(_last_map, encoder, part, use_reentrant=False) for part in flat.split(at_once)]
    return torch.cat(parts).unflatten(0, tiles.shape[:2])


def _last_map(encoder: nn.Module, images: Tensor) -> Tensor:
    return encoder(images)[-1].float().flatten(1)
