"""Exemplar's views: the same place in a scan, mirrored, turned, tilted, zoomed and with another contrast.

A view is sampled from a larger window, so no corner is empty: an empty corner would tell how the view was made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from pretrain.crops import is_air, mirrored, window_start
from pretrain.turns import MAX_ZOOM, TurnableCrop
from pretrain.volumes import Plane, Volume

MOST_TILT = 15.0  # degrees
ZOOM = (0.8, 1.2)

Matrix = np.ndarray


def room_of_views(dims: int) -> tuple[float, ...]:
    """How many times its own size a square crop needs around it on each axis, for any tilt and zoom."""
    tilt = math.radians(MOST_TILT)
    in_plane = (math.cos(tilt) + math.sin(tilt)) / ZOOM[0]
    return (1 / ZOOM[0], in_plane, in_plane)[3 - dims :]


@dataclass(frozen=True)
class Changes:
    """How likely each change of a view is."""

    mirror: float
    """On each axis."""
    turn: float
    zoom: float
    contrast: float


def draw_views(
    crop: TurnableCrop, changes: Changes, source: Volume | Plane, number: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Views (number, channels, *size) of one random place, and 1 where there is something to see, else 0."""
    turned = [rng.random() < changes.turn for _ in range(number)]
    matrices = [draw_matrix(source.info.spacing, changes, tilted, rng) for tilted in turned]
    matrices, size = fit_window(matrices, crop, source.info.shape)
    start = window_start(source.info.shape, size, source.info.foreground_box, rng)
    window = source.read(start, size)
    views = []
    for matrix, tilted in zip(matrices, turned, strict=True):
        view = mirrored(look(window, matrix, crop.size), rng, changes.mirror)
        if tilted:
            view = crop.turns[rng.integers(len(crop.turns))](view)
        views.append(_other_contrast(view, rng) if rng.random() < changes.contrast else view)
    first = [max(0, w - c) // 2 for w, c in zip(size, crop.cut, strict=True)]
    box = (slice(None), *(slice(f, f + c) for f, c in zip(first, crop.cut, strict=True)))
    large_enough = all(np.linalg.norm(matrix, axis=0).min() >= ZOOM[0] / MAX_ZOOM for matrix in matrices)
    return np.stack(views), float(large_enough and not is_air(window[box], source.info))


def draw_matrix(spacing: Sequence[float], changes: Changes, tilted: bool, rng: np.random.Generator) -> Matrix:
    """(axes, axes): from an offset in the crop to an offset in the scan, both in voxels. It tilts the last two axes."""
    matrix = np.eye(len(spacing))
    if tilted:
        angle = math.radians(rng.uniform(-MOST_TILT, MOST_TILT))
        c, s = math.cos(angle), math.sin(angle)
        ratio = spacing[-1] / spacing[-2]  # a rotation in mm
        matrix[-2:, -2:] = [[c, -s * ratio], [s / ratio, c]]
    if rng.random() < changes.zoom:
        matrix /= rng.uniform(*ZOOM)
    return matrix


def fit_window(
    matrices: Sequence[Matrix], crop: TurnableCrop, shape: Sequence[int]
) -> tuple[list[Matrix], tuple[int, ...]]:
    """The matrices, from voxels of the view to voxels of the scan, and the window (voxels) that holds all the views.

    Where the scan is too small for a view, the view is zoomed in.
    """
    scale = np.divide(crop.cut, crop.size)
    fitted, window = [], np.ones(len(shape), int)
    # A window of the crop's parity has its middle where the crop has it: a plain view is not interpolated.
    largest = np.array([max(1, n - (n - c) % 2) for n, c in zip(shape, crop.cut, strict=True)])
    for matrix in matrices:
        whole = matrix * scale
        reach = np.abs(whole) @ (np.array(crop.size) - 1)  # between the first and the last voxel of a view
        shrink = min(1.0, *((largest - 1) / np.maximum(reach, 1e-9)))
        fitted.append(whole * shrink)
        needed = np.ceil(reach * shrink - 1e-6).astype(int) + 1
        needed += (needed - crop.cut) % 2
        window = np.maximum(window, np.minimum(needed, largest))
    return fitted, tuple(window.tolist())


def look(window: np.ndarray, matrix: Matrix, size: Sequence[int]) -> np.ndarray:
    """A view (channels, *size) of a window (channels, *space) around its middle, by linear interpolation."""
    middle = (np.array(window.shape[1:]) - 1) / 2
    offset = middle - matrix @ ((np.array(size) - 1) / 2)
    return np.stack(
        [
            ndimage.affine_transform(channel, matrix, offset, tuple(size), order=1, mode="nearest")
            for channel in window.astype(np.float32, copy=False)
        ]
    )


def _other_contrast(view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast 0.5 to 1.5 about each channel's mean, brightness up to an eighth of its range."""
    per_channel = (len(view), *[1] * (view.ndim - 1))
    space = tuple(range(1, view.ndim))
    mean = view.mean(space, keepdims=True)
    extent = view.max(space, keepdims=True) - view.min(space, keepdims=True)
    factor, shift = rng.uniform(0.5, 1.5, per_channel), rng.uniform(-0.125, 0.125, per_channel)
    return (mean + (view - mean) * factor + shift * extent).astype(np.float32)
