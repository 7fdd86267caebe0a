"""Images and labels on another grid: nnU-Net's default resampling, equal to rounding, in a fraction of its time and memory.

Images go through one banded matrix an axis (`planners.spline`). Labels are scored only where the corners around a sample
disagree (`planners.cells`), so that their cost does not grow with the number of labels. Plans keep naming nnU-Net's function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.preprocessing.resampling import default_resampling

from planners.cells import Cells
from planners.spline import nearest_index, resize_axis

_SAMPLES = 2**14
"""Samples that are scored together; more fall out of the cache."""


def resample_to_shape(
    data: Any,
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    is_seg: bool = False,
    order: int = 3,
    order_z: int = 0,
    force_separate_z: bool | None = None,
    separate_z_anisotropy_threshold: float = ANISO_THRESHOLD,
) -> np.ndarray:
    """Drop-in for nnU-Net's `resample_data_or_seg_to_shape`.

    Source: MIC-DKFZ/nnUNet:nnunetv2/preprocessing/resampling/default_resampling.py.

    Args:
        data: (channels, z, y, x), an array or a tensor on the CPU; returned as it is where nothing changes.
        new_shape: (z, y, x) of the result.
        current_spacing, new_spacing: mm; they only decide whether the coarse axis is resampled apart.
        is_seg: labels, each of which is resampled as an indicator of its own; the largest wins, ties go to the nearest.
        order: of the splines; labels know 0 and 1.
        order_z: the same along an axis that is resampled apart.

    Returns:
        (channels, *new_shape) of the type of `data`. Images differ from nnU-Net's by less than 1e-5 of their deviation, as
        they are computed in their own precision and not in float64; labels where two are within rounding of a tie.
    """
    data = np.asarray(data)
    shape = tuple(int(n) for n in new_shape)
    if data.shape[1:] == shape:
        return data
    apart, axis = default_resampling.determine_do_sep_z_and_axis(
        force_separate_z, current_spacing, new_spacing, separate_z_anisotropy_threshold
    )
    axis = int(axis) if apart else None
    resize: Callable[[np.ndarray, tuple[int, ...], int | None], np.ndarray] | None
    if is_seg:
        resize = _resize_labels if order == 1 and (axis is None or order_z == 0) else None
    else:
        resize = _image_resizer(order, order_z) if np.issubdtype(data.dtype, np.floating) else None
    if resize is None:  # what no plan asks for
        return default_resampling.resample_data_or_seg(data, shape, is_seg, axis, order, bool(apart), order_z=order_z)
    result = np.empty((len(data), *shape), data.dtype)
    for target, channel in zip(result, data, strict=True):
        target[...] = resize(channel, shape, axis)
    return result


def _image_resizer(order: int, order_z: int) -> Callable[[np.ndarray, tuple[int, ...], int | None], np.ndarray]:
    def resize(image: np.ndarray, shape: tuple[int, ...], apart: int | None) -> np.ndarray:
        volume = np.ascontiguousarray(image, np.float64 if image.dtype == np.float64 else np.float32)
        # What grows least goes first, so that what is in between stays small.
        axes = sorted((a for a in range(3) if a != apart), key=lambda a: shape[a] / volume.shape[a])
        # Splines overshoot; nnU-Net cuts that off, slice by slice where slices are resampled one by one.
        within = None if apart is None else tuple(axes)
        low, high = volume.min(within, keepdims=True), volume.max(within, keepdims=True)
        for axis in axes:
            volume = resize_axis(volume, axis, shape[axis], order)
        if any(shape[a] != image.shape[a] for a in axes):
            volume = np.clip(volume, low, high, out=volume)
        if apart is None or shape[apart] == volume.shape[apart]:
            return volume
        if order_z == 0:
            return np.take(volume, nearest_index(volume.shape[apart], shape[apart]), axis=apart)
        return resize_axis(volume, apart, shape[apart], order_z)

    return resize


def _resize_labels(labels: np.ndarray, shape: tuple[int, ...], apart: int | None) -> np.ndarray:
    labels = smallest_integers(labels)
    if apart is not None and shape[apart] != labels.shape[apart]:
        # Slices are resampled one by one, so the nearest of them can be taken before as well as after.
        labels = np.take(labels, nearest_index(labels.shape[apart], shape[apart]), axis=apart)
    if labels.shape == shape:
        return labels
    cells = Cells(labels.shape, shape)
    resized, mixed = cells.settle(labels)
    flat_old, flat_new = labels.reshape(-1), resized.reshape(-1)
    for start in range(0, len(mixed), _SAMPLES):
        samples = mixed[start : start + _SAMPLES]
        corners, shares = cells.corners(samples)
        flat_new[samples] = _winners(flat_old[corners], shares, cells.nearest(samples))
    return resized


def _winners(labels: np.ndarray, shares: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Of each sample the label with the largest share of its corners; ties go to the nearest corner's label if it is one of
    them, else to the smallest.

    Args:
        labels, shares: (8, k), of the corners around each sample.
        nearest: (k,), which corner is nearest.
    """
    scores, pairs = shares.copy(), list(combinations(range(8), 2))
    same = [labels[one] == labels[other] for one, other in pairs]
    for (one, other), equal in zip(pairs, same, strict=True):
        scores[one] += shares[other] * equal
    # The first corner of a label has the whole sum, added up in SciPy's order; the others take it from there.
    for (one, other), equal in zip(reversed(pairs), reversed(same), strict=True):
        np.copyto(scores[other], scores[one], where=equal)
    tied = scores == scores.max(axis=0)
    samples = np.arange(labels.shape[1])
    smallest = np.where(tied, labels, np.iinfo(labels.dtype).max).min(axis=0)
    return np.where(tied[nearest, samples], labels[nearest, samples], smallest)


def smallest_integers(labels: np.ndarray) -> np.ndarray:
    """Labels in the smallest signed integers that hold them: all that is done to them is then cheap."""
    low, high = labels.min(), labels.max()
    for kind in (np.int8, np.int16, np.int32):
        if low >= np.iinfo(kind).min and high <= np.iinfo(kind).max:
            return np.ascontiguousarray(labels, kind)
    return np.ascontiguousarray(labels, np.int64)
