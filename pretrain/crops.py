"""Cutting and changing crops, as several methods do it: numpy arrays (channels, *space), all randomness from a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.nn.functional import interpolate

from pretrain.volumes import CaseInfo, Plane, Volume

T = TypeVar("T")
LINEAR = {2: "bilinear", 3: "trilinear"}
"""torch's name of linear interpolation, by the number of axes."""
_AIR_LEVEL = 0.02  # of the scan's range of intensities, around its lowest
_LEAST_SHOWN = 0.1
_FLAT = 0.05  # of the scan's standard deviation
_OUTSIDE = 1e-3  # of it, around 0
_GAIN, _OFFSET, _NOISE = (0.8, 1.25), 0.1, 0.05


def volume_or_plane(case: Volume, dims: int, rng: np.random.Generator) -> Volume | Plane:
    """The case itself, or in 2D one of the slices that hold foreground."""
    return case if dims == 3 else case.plane(int(rng.integers(*case.info.foreground_box[0])))


def read_window(
    volume: Volume | Plane, start: Sequence[int], size: Sequence[int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """A window that may reach over the border; what lies outside is filled with the smallest value of each channel inside.

    Returns:
        voxels (channels, *size), and the part that lies inside the scan, [first, last) on each axis of the window.
    """
    first = [max(0, s) for s in start]
    last = [min(n, s + w) for n, s, w in zip(volume.info.shape, start, size, strict=True)]
    inside = volume.read(first, [b - a for a, b in zip(first, last, strict=True)])
    valid = [(a - s, b - s) for a, b, s in zip(first, last, start, strict=True)]
    if all(low == 0 and high == w for (low, high), w in zip(valid, size, strict=True)):
        return inside, valid
    window = np.empty((len(inside), *size), np.float32)
    window[...] = inside.reshape(len(inside), -1).min(1).reshape(-1, *[1] * len(size))
    box = (slice(None), *(slice(low, high) for low, high in valid))
    window[box] = inside
    return window, valid


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear interpolation of (channels, *space) to `size`; the borders of the first and last voxels stay where they are."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None]
    return interpolate(tensor, size=tuple(size), mode=LINEAR[len(size)], align_corners=False)[0].numpy()


def share_shown(crop: np.ndarray, info: CaseInfo) -> float:
    """Share of a crop (channels, *space) that is neither at the scan's lowest level nor left out of its normalisation; 0 for a
    flat one, which shows nothing."""
    mean = crop.mean(0)
    if mean.std() <= _FLAT * info.intensity_std:
        return 0.0
    low, high = info.intensity_range
    lowest = np.abs(mean - low) <= _AIR_LEVEL * (high - low)
    # Where only the inside of a mask is normalised, the outside is 0, which lies among the tissues. Else 0 is rare.
    outside = np.abs(mean) <= _OUTSIDE * info.intensity_std
    return 1 - float((lowest | outside).mean())


def is_air(crop: np.ndarray, info: CaseInfo) -> bool:
    """Whether a crop (channels, *space) shows next to nothing: nearly all of it background, or flat."""
    return share_shown(crop, info) < _LEAST_SHOWN


def window_start(
    shape: Sequence[int], size: Sequence[int], box: Sequence[tuple[int, int]], rng: np.random.Generator
) -> list[int]:
    """A random start of a window of `size` in a scan of `shape`: inside `box` (the foreground) where it fits, else around it;
    a scan that is smaller is put in the middle."""
    start = []
    for n, w, (low, high) in zip(shape, size, box, strict=True):
        if n <= w:
            start.append(-((w - n) // 2))
            continue
        first, last = sorted((low, high - w))
        start.append(int(rng.integers(max(0, first), min(n - w, last) + 1)))
    return start


def best_of(tries: int, make: Callable[[], tuple[T, float]], enough: float) -> tuple[T, float]:
    """Call `make` until its score is `enough`, at most `tries` times; the result with the highest score."""
    best, score = make()
    for _ in range(tries - 1):
        if score >= enough:
            break
        other, its_score = make()
        if its_score > score:
            best, score = other, its_score
    return best, score


def mirrored(crop: np.ndarray, rng: np.random.Generator, probability: float) -> np.ndarray:
    """Mirror (channels, *space) along each axis independently."""
    axes = tuple(1 + axis for axis in range(crop.ndim - 1) if rng.random() < probability)
    return np.flip(crop, axes) if axes else crop


def turned(crop: np.ndarray, rng: np.random.Generator, probability: float, spacing: Sequence[float]) -> np.ndarray:
    """Turn (channels, *space) by 90, 180 or 270 degrees in the plane of the last two axes.

    Only where both have the same size and spacing: else the crop would change its shape or its voxels theirs.
    """
    exchangeable = crop.shape[-1] == crop.shape[-2] and abs(spacing[-1] - spacing[-2]) <= 0.01 * spacing[-1]
    if not exchangeable or rng.random() >= probability:
        return crop
    return np.rot90(crop, int(rng.integers(1, 4)), axes=(-2, -1))


def other_scanner(image: np.ndarray, mean: np.ndarray, spread: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another gain (0.8 to 1.25, around `mean`), offset (up to a tenth of `spread`) and noise (up to a twentieth) for each
    channel of each image (…, channels, *space), whose mean and spread are (…, channels, 1, …)."""
    gain = rng.uniform(*_GAIN, mean.shape).astype(np.float32)
    offset = rng.uniform(-_OFFSET, _OFFSET, mean.shape).astype(np.float32)
    noise = rng.uniform(0, _NOISE, mean.shape).astype(np.float32) * rng.standard_normal(image.shape, np.float32)
    return mean + (image - mean) * gain + spread * (offset + noise)


def shifted(crop: np.ndarray, rng: np.random.Generator, probability: float, most: np.ndarray) -> np.ndarray:
    """Add one number a channel, uniform in ±`most` (channels,)."""
    if rng.random() >= probability:
        return crop
    return crop + (rng.uniform(-1, 1, len(most)) * most).astype(np.float32).reshape(-1, *[1] * (crop.ndim - 1))
