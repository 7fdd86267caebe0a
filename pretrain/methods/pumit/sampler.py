"""Which case, channel and zoom each view of a batch has, so that all have one degree of anisotropy (DA). No voxels are read.

Zooming in the plane or along the slices changes the ratio of the voxels' edges, and with it the DA: even one dataset gives
several. Source: function2-llx/PUMIT:pumit/datamodule.py, which draws thousands of samples ahead and sorts them into one bucket
for each DA. Here a batch begins with any view and is filled with others of its DA: views are as frequent, and nothing has to be
remembered from batch to batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.networks.pumit_vit import TOKEN
from pretrain.networks.sac import Spacing, degree_of_planes
from pretrain.volumes import CaseInfo

DA_2D = degree_of_planes(TOKEN)
_PLANE_ZOOM = (0.75, 2.0)
_SLICE_ZOOM = (0.8, 1.25)
_NEARLY_ISOTROPIC = 1.5
_ZOOMS = 16  # of one case, before another is tried
_TRIES = 64  # cases for one view


@dataclass(frozen=True)
class Crops:
    """What one stage cuts."""

    tokens: tuple[int, int, int]
    """Of a crop, (z, y, x)."""
    batch: int
    zoom: float
    """Probability of another zoom in the plane; along the slices it is 0.6 of that, as for the authors."""


@dataclass(frozen=True)
class View:
    """One crop, but for its place."""

    channel: int
    degree: int
    size: tuple[int, int, int]
    """Voxels (z, y, x) of the crop."""
    zoom: tuple[float, float, float]
    """Voxels of the scan for one of the crop, (z, y, x); above 1 the crop shows more."""


def usable(case: CaseInfo) -> list[int]:
    """The channels of a case that are not constant."""
    return [channel for channel, (low, high) in enumerate(case.channel_ranges) if high > low]


def view_size(tokens: Sequence[int], degree: int) -> tuple[int, int, int]:
    """Voxels (z, y, x) of a crop of so many tokens; of one plane where nothing is known of the neighbours."""
    z, y, x = tokens
    return 1 if degree == DA_2D else z * max(TOKEN >> degree, 1), y * TOKEN, x * TOKEN


def degree_of(case: CaseInfo, zoom: Sequence[float] = (1, 1, 1)) -> int:
    """DA of a case's voxels after a zoom; `DA_2D` for an image of one slice, whatever its spacing says."""
    if case.shape[0] == 1:
        return DA_2D
    return Spacing.of([s * z for s, z in zip(case.spacing, zoom, strict=True)], TOKEN).da0


def draw_zoom(case: CaseInfo, crops: Crops, rng: np.random.Generator) -> tuple[float, float, float]:
    """Zoom (z, y, x): with probability `crops.zoom` U(0.75, 2) in the plane, but not beyond the scan, and rarer U(0.8, 1.25)
    along slices that are hardly thicker than the pixels."""
    plane = along = 1.0
    fits = min(n / (t * TOKEN) for n, t in zip(case.shape[1:], crops.tokens[1:], strict=True))
    if rng.random() < crops.zoom:
        least, most = _PLANE_ZOOM
        plane = float(rng.uniform(least, max(least, min(fits, most))))
    if case.spacing[0] / min(case.spacing[1:]) <= _NEARLY_ISOTROPIC and rng.random() < 0.6 * crops.zoom:
        along = float(rng.uniform(*_SLICE_ZOOM))
    return along, plane, plane


def draw_views(crops: Crops, pool: Sequence[CaseInfo], rng: np.random.Generator) -> list[tuple[str, View]]:
    """The views of a batch, all of one DA: that of a case and a zoom drawn first.

    A case that does not have it gets other zooms before another case is tried, so that rare ones find company. Where there is
    none, the batch has other places of the views it has already.
    """
    cases = [case for case in pool if usable(case)] or list(pool)  # of constant scans a batch that does not count

    def view(case: CaseInfo, zoom: tuple[float, float, float], degree: int) -> tuple[str, View]:
        channel = int(rng.choice(usable(case) or [0]))
        return case.id, View(channel, degree, view_size(crops.tokens, degree), zoom)

    first = cases[rng.integers(len(cases))]
    zoom = draw_zoom(first, crops, rng)
    degree = degree_of(first, zoom)
    batch, found = [view(first, zoom, degree)], [(first, zoom)]
    while len(batch) < crops.batch:
        for _ in range(_TRIES):
            case = cases[rng.integers(len(cases))]
            zooms = (draw_zoom(case, crops, rng) for _ in range(_ZOOMS))
            fitting = next((z for z in zooms if degree_of(case, z) == degree), None)
            if fitting is not None:
                found.append((case, fitting))
                break
        else:
            case, fitting = found[rng.integers(len(found))]
        batch.append(view(case, fitting, degree))
    return batch
