"""Crops as flat pictures: the middle planes of a volume side by side, in the proportions of the body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_PIXELS = 160  # of the longest edge
_GAP = 4


def middle_planes(image: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """The middle planes yx, zx and zy of a volume (z, y, x) in one picture, or the image (y, x) itself.

    Pixels are square, the longest edge has 160 of them; what belongs to no plane is NaN.
    """
    if image.ndim == 2:
        return _scaled(image, spacing, _pixel(image.shape, spacing))
    pixel = _pixel(image.shape, spacing)
    z, y, x = (n // 2 for n in image.shape)
    dz, dy, dx = spacing
    axial = _scaled(image[z], (dy, dx), pixel)
    coronal = _scaled(image[:, y], (dz, dx), pixel)
    sagittal = _scaled(image[:, :, x].T, (dy, dz), pixel)
    picture = np.full((len(axial) + _GAP + len(coronal), axial.shape[1] + _GAP + sagittal.shape[1]), np.nan)
    picture[: len(axial), : axial.shape[1]] = axial
    picture[len(axial) + _GAP :, : axial.shape[1]] = coronal
    picture[: len(axial), axial.shape[1] + _GAP :] = sagittal
    return picture


def show_planes(axis: Any, image: np.ndarray, spacing: Sequence[float]) -> None:
    """Draw the middle planes of one channel into a matplotlib axis; grey values from its 1st to its 99th percentile."""
    low, high = np.quantile(image, [0.01, 0.99])
    axis.imshow(middle_planes(image, spacing), cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
    axis.set_xticks([])
    axis.set_yticks([])
    for edge in axis.spines.values():
        edge.set_visible(False)


def _pixel(shape: Sequence[int], spacing: Sequence[float]) -> float:
    return max(n * s for n, s in zip(shape, spacing, strict=True)) / _PIXELS


def _scaled(plane: np.ndarray, spacing: Sequence[float], pixel: float) -> np.ndarray:
    """Nearest neighbours of (rows, columns) on square pixels."""
    index = [
        np.minimum(np.arange(max(1, round(n * s / pixel))) * pixel / s, n - 1).astype(int)
        for n, s in zip(plane.shape, spacing, strict=True)
    ]
    return plane[np.ix_(*index)]
