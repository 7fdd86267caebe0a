"""Where PCRL's views lie in a scan, and how they are cut: windows that overlap, resized to the patch, mirrored and
turned a little.

Source: Luchixiang/PCRL:pytorch/preprocess/luna_pre.py (windows), pytorch/datasets/luna_pcrl_pretask.py (torchio's
RandomFlip and RandomAffine). Here windows are drawn at each step instead of stored, and have the patch's shape times a
zoom.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import affine_grid, grid_sample

from pretrain.crops import read_window, share_shown
from pretrain.volumes import Plane, Volume

_TRIES = 50
_LARGEST_SHIFT = 0.25  # of the window on each axis: leaves an overlap of 0.42 / 1.58 = 0.27 in 3D
_LARGEST_TURN = 10.0  # degrees
_LARGEST_SCALE = 0.1
_THIN = 3.0  # extents (mm) that differ more are not turned into each other: most of the result would lie outside
_AROUND = 3  # voxels that local windows may reach out of the box around the two global ones


@dataclass(frozen=True)
class Window:
    """A box in voxels of the scan; it may reach over the border."""

    start: tuple[int, ...]
    size: tuple[int, ...]


def overlap(a: Window, b: Window) -> float:
    """Intersection over union of two boxes."""
    shared = 1.0
    for s, w, t, v in zip(a.start, a.size, b.start, b.size, strict=True):
        shared *= max(0, min(s + w, t + v) - max(s, t))
    return shared / (float(np.prod(a.size)) + float(np.prod(b.size)) - shared)


def draw_window(shape: Sequence[int], patch: Sequence[int], zooms: Sequence[float], rng: np.random.Generator) -> Window:
    """The patch times a zoom, cut to the scan but not below the patch; a scan that is smaller lies in the middle."""
    zoom = rng.choice(zooms)
    size = [min(max(1, round(zoom * p)), max(n, p)) for n, p in zip(shape, patch, strict=True)]
    start = [_first(n, w) if n <= w else int(rng.integers(n - w + 1)) for n, w in zip(shape, size, strict=True)]
    return Window(tuple(start), tuple(size))


def draw_pair(
    shape: Sequence[int], patch: Sequence[int], zooms: Sequence[float], least: float, rng: np.random.Generator
) -> tuple[Window, Window]:
    """Two windows that overlap by more than `least` (intersection over union), at most 0.25."""
    first = draw_window(shape, patch, zooms, rng)
    for _ in range(_TRIES):
        second = draw_window(shape, patch, zooms, rng)
        if overlap(first, second) > least:
            return first, second
    start = []
    for n, s, w in zip(shape, first.start, first.size, strict=True):
        # One axis less, or a higher demand, and a quarter is still enough: the shift is at most that.
        most = int(_LARGEST_SHIFT * w)
        start.append(s if n <= w else int(np.clip(s + rng.integers(-most, most + 1), 0, n - w)))
    shifted = Window(tuple(start), first.size)
    return first, shifted if overlap(first, shifted) > least else first


def draw_around(
    pair: tuple[Window, Window],
    shape: Sequence[int],
    patch: Sequence[int],
    zooms: Sequence[float],
    rng: np.random.Generator,
) -> Window:
    """A window of at most half the smaller of `pair` on each axis, inside the box around both, or up to 3 voxels outside,
    but inside the scan."""
    drawn = draw_window(shape, patch, zooms, rng).size
    size = [min(w, max(1, min(a, b) // 2)) for w, a, b in zip(drawn, *(window.size for window in pair), strict=True)]
    start = []
    for axis, (n, w) in enumerate(zip(shape, size, strict=True)):
        low = max(0, min(window.start[axis] for window in pair) - _AROUND)
        high = min(n, max(window.start[axis] + window.size[axis] for window in pair) + _AROUND)
        start.append(_first(n, w) if n <= w else int(rng.integers(low, high - w + 1)))
    return Window(tuple(start), tuple(size))


def cut(
    source: Volume | Plane, window: Window, size: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """The window resized to (channels, *size), mirrored and turned a little; and how much of its part of the scan differs
    from the background, so that scans smaller than the patch count too.

    What lies outside the scan or the window is the smallest value of each channel.
    """
    voxels, inside = read_window(source, window.start, window.size)
    box = (slice(None), *(slice(*part) for part in inside))
    shown = share_shown(voxels[box], source.info)
    lowest = voxels.reshape(len(voxels), -1).min(1).reshape(-1, *[1] * len(size))
    spacing = source.info.spacing
    matrix = jitter([w * s for w, s in zip(window.size, spacing, strict=True)], rng)
    # torch orders the axes of a grid (x, y, z)
    theta = torch.from_numpy(np.ascontiguousarray(matrix[::-1, ::-1])).float()
    theta = torch.cat([theta, torch.zeros(len(size), 1)], 1)[None]
    image = torch.from_numpy(voxels - lowest)[None]
    grid = affine_grid(theta, [1, 1, *size], align_corners=False)
    return grid_sample(image, grid, align_corners=False)[0].numpy() + lowest, shown


def jitter(extent: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """A matrix from places in the crop to places in the window, both from -1 to 1, axes as in `extent` (mm).

    Scales of 0.9 to 1.1 and turns of up to 10 degrees, which are turns in mm; the last axis (left-right) is mirrored
    half the time.
    """
    scale = rng.uniform(1 - _LARGEST_SCALE, 1 + _LARGEST_SCALE, len(extent))
    scale[-1] *= rng.choice((-1, 1))
    turn = np.eye(len(extent))
    for a, b in itertools.combinations(range(len(extent)), 2):
        angle = np.deg2rad(rng.uniform(-_LARGEST_TURN, _LARGEST_TURN))
        if max(extent[a], extent[b]) <= _THIN * min(extent[a], extent[b]):
            plane = np.eye(len(extent))
            plane[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
            turn = turn @ plane
    half = np.asarray(extent, float) / 2
    return turn * scale * half / half[:, None]


def _first(length: int, window: int) -> int:
    return -((window - length) // 2)
