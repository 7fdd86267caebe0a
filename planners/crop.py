"""The box of what is not zero, and which voxels in it are outside: nnU-Net's crop, looking for holes only where they can be."""

from __future__ import annotations

import numpy as np

OUTSIDE = -1


def crop_to_nonzero(image: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Cut away what is zero in all channels around a scan, as nnU-Net's function of this name does.

    Args:
        image: (channels, z, y, x); a view of it is returned.
        labels: (1, z, y, x) of a signed type; outside voxels without a label become -1 in place. None: only they are marked.

    Returns:
        image and labels (int8 if there were none) in the box; the box as [start, stop) of each axis. A scan of nothing but
        zeros is kept whole.
    """
    nonzero = image[0] != 0
    for channel in image[1:]:
        nonzero |= channel != 0
    box = _box(nonzero)
    slices = tuple(slice(*ends) for ends in box)
    inside = nonzero[slices]
    if not inside.all():
        from scipy.ndimage import binary_fill_holes  # not at the top: see planners.spline

        # What is cut off is outside and connected, so holes in the box are the holes of the whole.
        inside = binary_fill_holes(inside)
    image = image[:, slices[0], slices[1], slices[2]]
    if labels is None:
        return image, np.where(inside, np.int8(0), np.int8(OUTSIDE))[None], box
    labels = labels[:, slices[0], slices[1], slices[2]]
    if not inside.all():
        labels[(labels == 0) & ~inside[None]] = OUTSIDE
    return image, labels, box


def _box(mask: np.ndarray) -> list[list[int]]:
    rows = np.any(mask, axis=2)
    box = []
    for axis, filled in enumerate((np.any(rows, axis=1), np.any(rows, axis=0), np.any(mask, axis=(0, 1)))):
        where = np.flatnonzero(filled)
        box.append([int(where[0]), int(where[-1]) + 1] if len(where) else [0, mask.shape[axis]])
    return box
