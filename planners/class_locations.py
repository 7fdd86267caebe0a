"""Voxels of each class to centre training patches on: nnU-Net's draw, without a list of the coordinates of all voxels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SEED = 1234
_AT_LEAST = 10_000
_SHARE = 0.01


def class_locations(
    labels: np.ndarray, classes: Sequence[int | Sequence[int]]
) -> dict[int | tuple[int, ...], np.ndarray | list]:
    """For each class or region up to 10,000 of its voxels, or 1 % where that is more: the same as nnU-Net draws.

    Args:
        labels: (1, z, y, x) of integer values.
        classes: labels, or several labels each that make up a region.

    Returns:
        class -> (n, 4) int64, one index for each axis of `labels`; an empty list where there is no voxel of it.
        Source: MIC-DKFZ/nnUNet:nnunetv2/preprocessing/preprocessors/default_preprocessor.py, `_sample_foreground_locations`.
    """
    wanted = {c if isinstance(c, tuple) else (c,): c for c in map(_key, classes)}
    if not wanted:
        return {}
    voxels, counts, first = _by_label(labels, sorted({label for group in wanted for label in group}))
    generator = np.random.RandomState(_SEED)
    locations: dict[int | tuple[int, ...], np.ndarray | list] = {}
    for group, key in wanted.items():
        present = [label for label in group if counts[label]]
        total = sum(counts[label] for label in present)
        if not total:
            locations[key] = []
            continue
        drawn = generator.choice(total, max(min(_AT_LEAST, total), int(np.ceil(total * _SHARE))), replace=False)
        ends = np.cumsum([counts[label] for label in present])
        which = np.searchsorted(ends, drawn, side="right")
        # From a voxel's number among those of the region to its place in the list of all.
        shift = np.array([first[label] for label in present]) - np.concatenate(([0], ends[:-1]))
        picked = voxels[shift[which] + drawn]
        locations[key] = np.stack(np.unravel_index(picked, labels.shape), axis=1).astype(np.int64, copy=False)
    return locations


def _key(group: int | Sequence[int]) -> int | tuple[int, ...]:
    return tuple(int(label) for label in group) if isinstance(group, Sequence) else int(group)


def _by_label(labels: np.ndarray, wanted: Sequence[int]) -> tuple[np.ndarray, dict[int, int], dict[int, int]]:
    """Flat indices of voxels with a wanted label, sorted by label; how many each has, and where its first stands."""
    flat = labels.reshape(-1)
    low, high = int(flat.min()), int(flat.max())
    number = np.zeros(high - low + 1, np.uint8 if len(wanted) < 256 else np.uint16)
    """Of each label among the wanted, from one."""
    for place, label in enumerate(wanted, start=1):
        if low <= label <= high:
            number[label - low] = place
    # Where background is not asked for, most of the volume needs no second look.
    voxels = np.flatnonzero(flat > 0) if wanted[0] > 0 else np.arange(flat.size)
    numbers = number[flat[voxels].astype(np.intp) - low]
    if not numbers.all():
        voxels, numbers = voxels[numbers > 0], numbers[numbers > 0]
    voxels = voxels[np.argsort(numbers, kind="stable")]  # of small integers a radix sort
    counts = np.bincount(numbers, minlength=len(wanted) + 1)[1:].tolist()
    first = np.cumsum([0, *counts])[:-1].tolist()
    return voxels, dict(zip(wanted, counts, strict=True)), dict(zip(wanted, first, strict=True))
