"""How scans lie in the patient, and reading them as if all lay alike: axes change places and directions, nothing is resampled.

A plan keeps scans as they are stored. Where one dataset mixes directions, a task that asks where things are (which neighbour,
which turn) has contradicting answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np

_OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Alignment:
    """A rearrangement of the axes of a stored array (channels, z, y, x)."""

    order: tuple[int, ...] = (0, 1, 2)
    """The stored axis that becomes each axis."""
    mirrored: tuple[bool, ...] = (False, False, False)
    """Whether an axis, of the new ones, runs the other way."""

    def stored_box(self, shape: Sequence[int], start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
        """Where a box of the aligned array, of `shape`, lies in the stored one."""
        box = [slice(0)] * len(self.order)
        for axis, length, first, width, mirrored in zip(self.order, shape, start, size, self.mirrored, strict=True):
            low = int(length) - int(first) - int(width) if mirrored else int(first)
            box[axis] = slice(low, low + int(width))
        return tuple(box)

    def applied(self, stored: np.ndarray) -> np.ndarray:
        """A part (channels, z, y, x) of the stored array, aligned."""
        if self == AS_STORED:
            return stored
        aligned = stored.transpose(0, *(1 + axis for axis in self.order))
        return np.ascontiguousarray(
            np.flip(aligned, tuple(1 + axis for axis, mirrored in enumerate(self.mirrored) if mirrored))
        )


AS_STORED = Alignment()


def orientation(properties: Mapping[str, Any], transpose_forward: Sequence[int]) -> str:
    """The side of the patient that indices grow towards on each axis of a preprocessed array, from nnU-Net's properties of it.

    Letters of (z, y, x), such as SPL; oblique axes get the nearest. Empty for files that do not say (PNG, TIFF).
    """
    if "sitk_stuff" in properties:
        direction = np.asarray(properties["sitk_stuff"]["direction"], float)
        dims = round(direction.size**0.5)
        if dims < 3:
            return ""
        axes = _LPS_TO_RAS @ direction.reshape(dims, dims)[:3, :3]
    elif "nibabel_stuff" in properties:
        stored = properties["nibabel_stuff"]
        axes = np.asarray(stored.get("reoriented_affine", stored["original_affine"]))[:3, :3]
    else:
        return ""
    affine = np.eye(4)
    affine[:3, :3] = axes
    letters = nibabel.aff2axcodes(affine)[::-1]  # (x, y, z), the order of both readers, to (z, y, x)
    return "" if None in letters else "".join(letters[axis] for axis in transpose_forward)


def alignment(stored: str, wanted: str) -> Alignment:
    """How an array of orientation `stored` becomes one of orientation `wanted`, both of three letters."""
    order = tuple(next(i for i, s in enumerate(stored) if letter in (s, _OPPOSITE[s])) for letter in wanted)
    return Alignment(order, tuple(stored[axis] != letter for axis, letter in zip(order, wanted, strict=True)))
