"""Spline resizing along one axis as a product with a banded matrix: what SciPy's `zoom` computes, at the speed of a product.

Resizing on a grid is linear and separable, its prefilter included, so one small matrix an axis says all of it. The matrix is
made by resizing unit vectors with SciPy's own function, which scikit-image's `resize` and so nnU-Net use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_ROWS = 64  # of a block: fewer leave the matrix product too small, more make it dense again
_NEGLIGIBLE = 1e-7  # the prefilter's tail falls below it some 12 samples outside the support


@dataclass(frozen=True)
class _Block:
    """Output rows [start, stop) and the input columns [first, last) that they need."""

    start: int
    stop: int
    first: int
    last: int
    weights: np.ndarray


@lru_cache(maxsize=64)
def _blocks(old: int, new: int, order: int, dtype: str) -> tuple[_Block, ...]:
    from scipy.ndimage import zoom  # takes a quarter of a second, and training needs none of it

    unit = np.eye(old)
    matrix = np.stack([zoom(row, new / old, order=order, mode="nearest", grid_mode=True) for row in unit], axis=1)
    blocks = []
    for start in range(0, new, _ROWS):
        stop = min(start + _ROWS, new)
        needed = np.flatnonzero(np.abs(matrix[start:stop]).max(axis=0) > _NEGLIGIBLE)
        first, last = int(needed[0]), int(needed[-1]) + 1
        blocks.append(_Block(start, stop, first, last, np.ascontiguousarray(matrix[start:stop, first:last], dtype)))
    return tuple(blocks)


def resize_axis(volume: np.ndarray, axis: int, new: int, order: int) -> np.ndarray:
    """`volume` (z, y, x) with `new` samples along one axis, by splines of `order`, edges repeated.

    Args:
        volume: float32 or float64, C-contiguous; the result has its type.
    """
    old = volume.shape[axis]
    if old == new:
        return volume
    shape = list(volume.shape)
    shape[axis] = new
    resized = np.empty(shape, volume.dtype)
    blocks = _blocks(old, new, order, volume.dtype.str)
    if axis == 0:
        source, target = volume.reshape(old, -1), resized.reshape(new, -1)
        for block in blocks:
            np.matmul(block.weights, source[block.first : block.last], out=target[block.start : block.stop])
    elif axis == 1:
        for block in blocks:
            np.matmul(block.weights, volume[:, block.first : block.last], out=resized[:, block.start : block.stop])
    else:
        source, target = volume.reshape(-1, old), resized.reshape(-1, new)
        for block in blocks:
            np.matmul(source[:, block.first : block.last], block.weights.T, out=target[:, block.start : block.stop])
    return resized


def nearest_index(old: int, new: int) -> np.ndarray:
    """Of each of `new` samples along an axis, the nearest of `old` ones; the upper one half way, as SciPy rounds."""
    return np.clip(np.floor((np.arange(new) + 0.5) * old / new).astype(np.intp), 0, old - 1)
