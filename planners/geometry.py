"""Where the voxels of a file lie in the patient, and how far two files disagree about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

# Shares of a voxel by which a header may move the farthest corner: below the first it is the storage of decimals, below
# the second the rounding of a header; neither changes which voxel a label belongs to.
EQUAL_VOXELS = 1e-3
ROUNDING_VOXELS = 0.1

GEOMETRY_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl")
"""Files that hold their place in the patient; natural images and TIFF do not."""


@dataclass(frozen=True)
class Geometry:
    """A grid as in the header, in SimpleITK's order (x, y, z); lengths in mm."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    def shift_voxels(self, other: Geometry) -> float:
        """How far the two headers place a corner of the grid apart, in the smallest spacing of `other`; sizes are equal."""
        return float(np.abs(self._corners_mm() - other._corners_mm()).max() / min(other.spacing))

    def _corners_mm(self) -> np.ndarray:
        dimensions = len(self.size)
        corners = np.array(np.meshgrid(*((0, n - 1) for n in self.size))).reshape(dimensions, -1)
        matrix = np.reshape(self.direction, (dimensions, dimensions)) * self.spacing
        return (matrix @ corners).T + self.origin

    def __str__(self) -> str:
        def text(values: Iterable[float]) -> str:
            return ", ".join(f"{value:.6g}" for value in values)

        return f"spacing ({text(self.spacing)}) origin ({text(self.origin)}) direction ({text(self.direction)})"


def read_geometry(path: Path) -> Geometry:
    """The grid from the header alone; RuntimeError when SimpleITK cannot read it."""
    return _geometry(_header(path))


def read_voxels(path: Path) -> tuple[np.ndarray, Geometry]:
    """Voxels as stored, (z, y, x) with a time or channel axis first if there is one, and their grid.

    Raises whatever its reader raises for a broken file, truncated ones included.
    """
    if path.name.endswith(GEOMETRY_ENDINGS):
        header = _header(path)
        if path.name.endswith((".nii.gz", ".nii")):
            # SimpleITK reads NIfTI with zeros in place of NaN and of what a truncated file lacks, and says nothing.
            return np.asanyarray(nibabel.load(path).dataobj).T, _geometry(header)  # type: ignore[attr-defined]
        return SimpleITK.GetArrayFromImage(header.Execute()), _geometry(header)
    # Natural images and TIFF: nnU-Net's own readers, which know no place in the patient.
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

    reader = determine_reader_writer_from_file_ending(path.suffix, verbose=False)()
    voxels, properties = reader.read_images([str(path)])
    spacing = tuple(float(s) for s in properties["spacing"][::-1])
    return voxels, Geometry(tuple(voxels.shape[:0:-1]), spacing, (0.0,) * 3, tuple(np.eye(3).ravel()))


def _header(path: Path) -> SimpleITK.ImageFileReader:
    header = SimpleITK.ImageFileReader()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return header


def _geometry(header: SimpleITK.ImageFileReader) -> Geometry:
    return Geometry(header.GetSize(), header.GetSpacing(), header.GetOrigin(), header.GetDirection())
