"""Turns by quarters of a circle, which move voxels without interpolating, and the crops that they leave in shape.

Ten of the 24 turns of a cube: none, and 90, 180 and 270 degrees about each axis (Taleb et al., "3D Self-Supervised Methods for
Medical Imaging", NeurIPS 2020, arXiv:2006.03829). A quarter turn exchanges two axes. Where these have other voxel sizes, the
turn could be read from the texture, so such axes are only turned by half circles, which map the lattice of voxels onto itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planners.decisions import times
from planners.errors import PlanError
from pretrain.crops import resize, window_start
from pretrain.method import Target
from pretrain.volumes import CaseInfo, Plane, Volume

_ALIKE = 1.5  # ratio of spacings up to which axes count as equal
_USUAL = 0.9  # share of the scans whose original spacings must be alike
_SMALL_SCAN = 0.1  # a tenth of the scans may be smaller than what is cut; of these less is cut
MAX_ZOOM = 2.5
_ENOUGH = 24  # voxels on an edge, below which little anatomy is left to tell a turn from


@dataclass(frozen=True)
class Turn:
    """`quarters` of a circle in the plane of two axes of space."""

    plane: tuple[int, int]
    quarters: int

    def __call__(self, image: np.ndarray, *, back: bool = False) -> np.ndarray:
        """Turn (channels, *space), or turn it back."""
        axes = (1 + self.plane[0], 1 + self.plane[1])
        return np.rot90(image, -self.quarters if back else self.quarters, axes)

    def name(self, dims: int) -> str:
        """`90° zy`: the angle and the plane."""
        letters = "zyx"[3 - dims :]
        return f"{90 * self.quarters}°" + (
            f" {letters[self.plane[0]]}{letters[self.plane[1]]}" if self.quarters else ""
        )


PLANES = ((0, 1), (1, 2), (0, 2))
TURNS = (Turn(PLANES[0], 0), *(Turn(plane, quarters) for plane in PLANES for quarters in (1, 2, 3)))
"""All ten, in the order of their classes."""


def turns_of(dims: int, exchanged: Sequence[int]) -> tuple[Turn, ...]:
    """The turns that only exchange axes of the set `exchanged`: 10, 6 or 4 in 3D, 4 or 2 in 2D.

    First none, then all turns in the plane of the exchanged axes, then the half turns that are left.
    """
    possible = TURNS if dims == 3 else TURNS[:4]
    inside = [t for t in possible[1:] if set(t.plane) <= set(exchanged)]
    half = [t for t in possible[1:] if t.quarters == 2 and t not in inside]
    return (possible[0], *inside, *half)


@dataclass(frozen=True)
class TurnableCrop:
    """What is cut from a scan, and the turns that leave its shape as it is."""

    turns: tuple[Turn, ...]
    exchanged: tuple[int, ...]
    """Axes that some turns exchange; they are equally long."""
    cut: tuple[int, ...]
    """Voxels of the scan on each axis."""
    size: tuple[int, ...]
    """Voxels the network sees: as many, or more where the scans are too small for the network."""

    @property
    def zoom(self) -> float:
        """The largest enlargement of an axis."""
        return max(s / c for s, c in zip(self.size, self.cut, strict=True))

    def read(self, source: Volume | Plane, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        """A random crop (channels, *size) from inside the scan, and whether the scan is large enough for it.

        Of a scan that is smaller than `cut` less is taken, from exchanged axes equally: padding would tell the turn.
        """
        cut = [min(c, n) for c, n in zip(self.cut, source.info.shape, strict=True)]
        side = min((cut[axis] for axis in self.exchanged), default=0)
        cut = [side if axis in self.exchanged else c for axis, c in enumerate(cut)]
        start = window_start(source.info.shape, cut, source.info.foreground_box, rng)
        large_enough = all(s <= MAX_ZOOM * c for s, c in zip(self.size, cut, strict=True))
        return resize(source.read(start, cut), self.size), large_enough


def turnable_crop(
    target: Target, pool: Sequence[CaseInfo], *, room: Sequence[float] = (1.0, 1.0, 1.0), method: str
) -> TurnableCrop:
    """The largest crop of the plan's patch and the scans that all turns of the plan's geometry leave in shape.

    Args:
        room: how many times its own size must fit around a crop, on (z, y, x).

    Raises PlanError when scans would have to be enlarged more than 2.5-fold for the network.
    """
    dims, stride = target.encoder.spatial_dims, target.encoder.total_stride
    shapes = np.quantile([case.shape[-dims:] for case in pool], _SMALL_SCAN, axis=0)
    longest = [min(p, int(v / r)) for p, v, r in zip(target.patch_size, shapes, room[-dims:], strict=True)]
    crops = [_crop(dims, axes, longest, stride) for axes in (*_exchangeable(target, pool, longest), ())]
    fitting = [c for c in crops if c.zoom <= MAX_ZOOM]
    large = [c for c in fitting if c.exchanged and c.cut[c.exchanged[0]] == c.size[c.exchanged[0]] >= _ENOUGH]
    if not fitting:
        # Whole voxels are cut, and so many of them must lie in the room.
        wanted = [math.ceil(math.ceil(2 * s / MAX_ZOOM) * r) for s, r in zip(stride, room[-dims:], strict=True)]
        raise PlanError(
            f"The scans are too small for {method} with this network",
            found=f"scans of {times([int(v) for v in shapes])} voxels (one in ten is smaller)",
            expected=f"at least {times(wanted)}",
            remedy="plan a smaller patch (--patch-size) or a finer spacing (--spacing), or take a network with fewer halvings",
        )
    return (large or fitting)[0]


def _exchangeable(target: Target, pool: Sequence[CaseInfo], longest: Sequence[int]) -> list[tuple[int, ...]]:
    """Sets of axes that quarter turns may exchange: all three first, then the best pair."""
    dims, stride = target.encoder.spatial_dims, target.encoder.total_stride
    original = np.array([case.original_spacing[-dims:] for case in pool])

    def ratio(pair: tuple[int, int]) -> float:
        a, b = pair
        scans = np.maximum(original[:, a] / original[:, b], original[:, b] / original[:, a])
        now = target.spacing[a] / target.spacing[b]
        return max(now, 1 / now, float(np.quantile(scans, _USUAL)))

    pairs = [pair for pair in (PLANES if dims == 3 else PLANES[:1]) if ratio(pair) <= _ALIKE]
    # A network that halves one axis more often is made for coarser voxels there.
    pairs.sort(key=lambda p: (stride[p[0]] != stride[p[1]], -min(longest[p[0]], longest[p[1]]), ratio(p)))
    everything = [(0, 1, 2)] if len(pairs) == 3 and len(set(stride)) == 1 else []
    return [*everything, *pairs[:1]]


def _crop(dims: int, exchanged: tuple[int, ...], longest: Sequence[int], stride: Sequence[int]) -> TurnableCrop:
    """A crop of whole bottleneck voxels, two or more on each axis, equally long on the exchanged axes."""
    cut, size = [0] * dims, [0] * dims
    for group in (exchanged, *((axis,) for axis in range(dims) if axis not in exchanged)):
        step = math.lcm(*(stride[axis] for axis in group))
        least = step * math.ceil(2 * max((stride[axis] for axis in group), default=1) / step)
        room = min((longest[axis] for axis in group), default=least)
        fits = room // step * step
        for axis in group:
            cut[axis], size[axis] = (fits, fits) if fits >= least else (max(1, room), least)
    return TurnableCrop(turns_of(dims, exchanged), exchanged, tuple(cut), tuple(size))
