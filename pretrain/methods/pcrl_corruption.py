"""What PCRL does to a crop before the encoder sees it; the clean crop is what must be restored. Crops are (channels,
*space).

Version 1: blur, local shuffling, painting (Luchixiang/PCRL:pytorch/data.py, after Models Genesis). Version 2: blur,
noise, gamma and swapped blocks (RL4M/PCRLv2:pytorch/datasets). Noise that is painted lies between the crop's 1st and
99th percentile, because nnU-Net's intensities are not in [0, 1]; margins shrink with the crop, so that thin crops work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

_LARGEST_BLUR = 2.0  # mm
_SHUFFLED = 1.87  # voxels in blocks for one of the crop: 10,000 blocks of 3.5×3.5×2 on average in 64×64×32
_BLOCK_SHAPES = 16  # drawn per crop
_MOST_BOXES = 5
_ANOTHER_BOX = 0.95
_MARGIN = 3
_LARGEST_NOISE = 0.25  # of the crop's standard deviation
_LARGEST_GAMMA = 0.3  # logarithm
_SWAPPED = (4, 4, 8)  # voxels of a block (z, y, x)
_VOXELS_A_SWAP = 1311  # as 100 swaps in 64×64×32


@dataclass(frozen=True)
class Corruption:
    """Probabilities of version 1."""

    blur: float
    shuffle: float
    paint: float
    outward: float
    """Of painting everything but a few windows, where there is painting; else a few boxes are painted."""


def corrupt(crop: np.ndarray, how: Corruption, spacing: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Version 1's input, a new array. `spacing` in mm."""
    result = blurred(crop, spacing, rng) if rng.random() < how.blur else crop.copy()
    if rng.random() < how.shuffle:
        result = shuffled(result, rng)
    if rng.random() < how.paint:
        result = painted(result, rng, outward=rng.random() < how.outward)
    return result


def disturb(crop: np.ndarray, spacing: Sequence[float], rng: np.random.Generator, *, swap: bool) -> np.ndarray:
    """Version 2's input, a new array: blur, noise, gamma, and with `swap` exchanged blocks."""
    result = blurred(crop, spacing, rng)
    spread = result.reshape(len(result), -1).std(1).reshape(-1, *[1] * (crop.ndim - 1))
    result += (rng.uniform(0, _LARGEST_NOISE) * spread * rng.normal(size=result.shape)).astype(np.float32)
    space = tuple(range(1, crop.ndim))
    low, high = result.min(space, keepdims=True), result.max(space, keepdims=True)
    width = np.where(high > low, high - low, np.float32(1))
    gamma = float(np.exp(rng.uniform(-_LARGEST_GAMMA, _LARGEST_GAMMA)))
    result = ((result - low) / width) ** gamma * width + low
    return swapped(result, rng) if swap else result


def blurred(crop: np.ndarray, spacing: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Gaussian of up to 2 mm, the same on all axes."""
    width = rng.uniform(0, _LARGEST_BLUR)
    return gaussian_filter(crop, [0, *(width / s for s in spacing)])


def shuffled(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Voxels are exchanged inside many small blocks, of up to a tenth of the crop on each axis; all channels alike.

    The authors' 10,000 blocks of their small crop cover it about twice. Blocks grow with the crop, so their number follows
    their mean size: then a crop of any size is covered as often, in time that grows with its voxels only.
    """
    shape = crop.shape[1:]
    source = crop.reshape(len(crop), -1)
    result = source.copy()
    largest = [max(1, n // 10) for n in shape]
    mean_size = float(np.prod([(1 + n) / 2 for n in largest]))
    count = max(1, round(_SHUFFLED * source.shape[1] / mean_size / _BLOCK_SHAPES))
    strides = np.array([int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))])
    for _ in range(_BLOCK_SHAPES):
        block = [int(rng.integers(1, n + 1)) for n in largest]
        corners = np.stack([rng.integers(0, n - b + 1, count) for n, b in zip(shape, block, strict=True)], 1) @ strides
        inside = np.indices(block).reshape(len(block), -1).T @ strides
        places = corners[:, None] + inside
        result[:, places] = source[:, rng.permuted(places, axis=1)]
    return result.reshape(crop.shape)


def painted(crop: np.ndarray, rng: np.random.Generator, *, outward: bool) -> np.ndarray:
    """Noise in up to five boxes of a sixth to a third of each axis; `outward`: everywhere but in up to five larger
    ones."""
    shape = crop.shape[1:]
    low, high = np.quantile(crop.reshape(len(crop), -1), [0.01, 0.99], axis=1).reshape(2, -1, *[1] * len(shape))
    noise = rng.uniform(low, high, crop.shape).astype(np.float32)
    inside = np.zeros(shape, bool)
    for number in range(_MOST_BOXES):
        if rng.random() < _ANOTHER_BOX or (outward and number == 0):
            inside[_box(shape, rng, outward=outward)] = True
        else:
            break
    return np.where(inside != outward, noise, crop)


def swapped(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pairs of blocks change places."""
    shape = crop.shape[1:]
    block = [max(1, min(b, n // 4)) for b, n in zip(_SWAPPED[-len(shape) :], shape, strict=True)]

    def place() -> tuple[slice, ...]:
        start = [int(rng.integers(n - b + 1)) for n, b in zip(shape, block, strict=True)]
        return (slice(None), *(slice(s, s + b) for s, b in zip(start, block, strict=True)))

    result = crop.copy()
    for _ in range(max(1, int(np.prod(shape)) // _VOXELS_A_SWAP)):
        one, other = place(), place()
        kept = result[one].copy()
        result[one] = result[other]
        result[other] = kept
    return result


def _box(shape: Sequence[int], rng: np.random.Generator, *, outward: bool) -> tuple[slice, ...]:
    slices = []
    for n in shape:
        least, most = (n - 4 * n // 7, n - 3 * n // 7) if outward else (n // 6, n // 3)
        side = int(rng.integers(max(1, least), max(1, least, most) + 1))
        margin = min(_MARGIN, (n - side) // 2)
        start = int(rng.integers(margin, n - side - margin + 1))
        slices.append(slice(start, start + side))
    return tuple(slices)
