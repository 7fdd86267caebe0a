"""Cutting one view: place, turn and zoom in one resampling, intensities in [0, 1], and what of it lies inside the scan.

Source: function2-llx/PUMIT:pumit/transforms.py and scripts/data/process.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from pretrain.methods.pumit.sampler import View
from pretrain.volumes import CaseInfo, Volume

_IN_PLANE, _OUT_OF_PLANE = 90.0, 30.0  # degrees, at most
_NEARLY_ISOTROPIC = 1.5


def draw_placement(
    info: CaseInfo, view: View, rng: np.random.Generator, *, rotate: float, mirror: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where the voxels of a view come from: voxel `o` of the view is voxel `matrix @ o + offset` of the scan, (z, y, x).

    Within the foreground where the view fits into it; along axes on which the scan is smaller it begins with the scan, so that
    padding comes after it.

    Args:
        rotate: probability of a turn, by up to 90° in the plane, and by up to 30° about the other two axes where the slices are
            hardly thicker than the pixels.
        mirror: probability of a mirrored axis, for each.
    """
    start = []
    field = [n * z for n, z in zip(view.size, view.zoom, strict=True)]
    for n, seen, (low, high) in zip(info.shape, field, info.foreground_box, strict=True):
        seen = math.ceil(seen)
        first, last = sorted((low, high - seen))
        start.append(0 if n <= seen else int(rng.integers(max(0, first), min(n - seen, last) + 1)))
    turn = np.eye(3)
    spacing = np.array(info.spacing)
    seen_mm = spacing * view.zoom
    if rng.random() < rotate:
        tilted = view.size[0] > 1 and seen_mm[0] / min(seen_mm[1:]) <= _NEARLY_ISOTROPIC
        most = (_IN_PLANE, _OUT_OF_PLANE, _OUT_OF_PLANE) if tilted else (_IN_PLANE, 0.0, 0.0)
        # About z, then y, then x: scipy names axes by their place.
        turn = Rotation.from_euler("xyz", [rng.uniform(-angle, angle) for angle in most], degrees=True).as_matrix()
    flips = np.where(rng.random(3) < mirror, -1.0, 1.0)
    # Turned in mm, about the middle of the view.
    matrix = (turn * (seen_mm * flips)) / spacing[:, None]
    middle = np.array(start) + (np.array(field) - 1) / 2
    return matrix, middle - matrix @ ((np.array(view.size) - 1) / 2)


def resampled(volume: Volume, view: View, matrix: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of a view, linearly interpolated, and which of them lie inside the scan; both (z, y, x).

    Intensities run from 0 to 1 as those of the scan's channel from its 0.5th to its 99.5th percentile; outside it is 0.
    """
    shape = np.array(volume.info.shape)
    corners = np.array(np.meshgrid(*((0, n - 1) for n in view.size), indexing="ij")).reshape(3, -1)
    reached = matrix @ corners + offset[:, None]
    first = np.clip(np.floor(reached.min(1)).astype(int), 0, shape - 1)
    last = np.clip(np.ceil(reached.max(1)).astype(int), first, shape - 1)
    box = volume.read(first.tolist(), (last - first + 1).tolist())[view.channel]
    low, high = volume.info.channel_ranges[view.channel]
    box = np.clip((box - low) / ((high - low) or 1), 0, 1)
    image = affine_transform(box, matrix, offset - first, view.size, order=1, mode="nearest")
    inside = np.ones(view.size, bool)
    steps = np.ogrid[tuple(slice(n) for n in view.size)]
    for row, constant, n in zip(matrix, offset, shape, strict=True):
        place = sum(factor * step for factor, step in zip(row, steps, strict=True)) + constant
        # Half a voxel beyond the centres, and a little for rounding.
        inside &= (place > -0.501) & (place < n - 0.499)
    image[~inside] = 0
    return image.astype(np.float32), inside


def other_intensities(image: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
    """Another gamma, of the image or its negative, with `probability`; another brightness and another contrast with half of it
    each. An image in [0, 1] stays there."""
    if rng.random() < probability / 2:
        image = np.clip(image * rng.uniform(0.75, 1.25), 0, 1)
    if rng.random() < probability / 2:
        mean = image.mean()
        image = np.clip(mean + (image - mean) * rng.uniform(0.75, 1.25), 0, 1)
    if rng.random() < probability:
        gamma = rng.uniform(0.7, 1.5)
        image = image**gamma if rng.random() < 0.5 else 1 - (1 - image) ** gamma
    return image.astype(np.float32)


def tokens_inside(inside: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Which tokens of a view have at least one voxel inside the scan: (z, y, x) → (tokens,), x fastest."""
    grid = [n for t, voxels in zip(tokens, inside.shape, strict=True) for n in (t, voxels // t)]
    return inside.reshape(grid).any((1, 3, 5)).ravel()
