"""Whether a NIfTI file is whole, which SimpleITK does not say.

It reads the missing end of a cut-off file, and NaN in it, as zeros without a word, and what follows a damaged byte of a
compressed file as whatever comes out. So the stored bytes are gone through once, as a stream: gzip compares its checksum.
"""

from __future__ import annotations

import gzip
import io
import math
from pathlib import Path

import nibabel
import numpy as np

_CHUNK_BYTES = 2**20


def refuse_damaged(path: Path) -> None:
    """Raise ValueError if a NIfTI file is cut off or damaged, or holds values that are not finite; others are not looked at."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return
    try:
        voxels = nibabel.load(path).dataobj  # type: ignore[attr-defined]  # reads the header only
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as stream:
            stream.seek(voxels.offset)
            finite = _read_to_end(stream, voxels.dtype, math.prod(voxels.shape) * voxels.dtype.itemsize)
    except Exception as error:  # its readers raise many kinds for a broken file
        reason = next(iter(reversed(str(error).strip().splitlines())), type(error).__name__)
        raise ValueError(f"{path.name} cannot be read to its end: {reason}") from error
    if not finite:
        raise ValueError("the scan holds values that are not finite")


def _read_to_end(stream: io.BufferedIOBase, kind: np.dtype, expected: int) -> bool:
    """Whether all voxels are finite; EOFError if there are fewer than `expected` bytes of them."""
    length, finite = 0, True
    while chunk := stream.read(_CHUNK_BYTES):
        if kind.kind == "f":
            values = np.frombuffer(chunk[: max(0, expected - length)], kind)
            finite = finite and bool(np.isfinite(values).all())
        length += len(chunk)
    if length < expected:
        raise EOFError(f"{length} bytes of voxels instead of {expected}")
    return finite
