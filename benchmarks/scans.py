"""Scans for benchmarks: a real CT enlarged to the size of clinical ones, and made-up anatomy where no data are needed.

Real data are never part of the project. `AUTOSEG_BENCHMARK_DATA` names a folder with `ct/example_ct.nii.gz` and
`ct/example_seg_62_labels.nii.gz` (test files of wasserth/TotalSegmentator, Apache-2.0) and `Task04_Hippocampus` (Medical
Segmentation Decathlon).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from scipy.ndimage import zoom
from scipy.spatial import cKDTree

from planners.errors import DatasetError

VARIABLE = "AUTOSEG_BENCHMARK_DATA"
_NOISE_HU = 12.0  # interpolation alone would leave an enlarged scan smoother, and more compressible, than a real one


@dataclass(frozen=True)
class Scan:
    """Image and labels on one grid."""

    image: np.ndarray
    """(z, y, x) float32, HU or alike."""
    labels: np.ndarray
    """(z, y, x) int16, 0 to n without gaps."""
    spacing: tuple[float, ...]
    """mm, (z, y, x)."""


def data_folder(name: str) -> Path:
    """A folder or file of real data. Raises DatasetError where there is none."""
    root = os.environ.get(VARIABLE)
    if root is None or not (Path(root) / name).exists():
        raise DatasetError(
            f"This benchmark needs {name}",
            where=root or f"{VARIABLE} is not set",
            remedy=f"set {VARIABLE} to a folder that holds it (benchmarks/README.md), or take --scale small",
        )
    return Path(root) / name


def real_ct(spacing_mm: float, labels: int = 62) -> Scan:
    """The CT of 122 x 101 x 112 voxels at 3 mm, enlarged to `spacing_mm` on each axis, its structures merged into `labels`."""
    image, spacing = _read(data_folder("ct/example_ct.nii.gz"))
    structures, _ = _read(data_folder("ct/example_seg_62_labels.nii.gz"))
    factors = [s / spacing_mm for s in spacing]
    large = zoom(image.astype(np.float32), factors, order=1, mode="nearest", grid_mode=True)
    large += np.random.default_rng(0).normal(0, _NOISE_HU, large.shape).astype(np.float32)
    merged = merge_labels(structures, labels)
    for axis, (n, m) in enumerate(zip(merged.shape, large.shape, strict=True)):
        merged = merged.take(((np.arange(m) + 0.5) * n / m).astype(np.intp), axis=axis)
    exact = (s * n / m for s, n, m in zip(spacing, image.shape, large.shape, strict=True))
    return Scan(large, merged, tuple(exact))


def made_up(shape: Sequence[int], labels: int = 3, spacing: Sequence[float] = (1.0, 1.0, 1.0), seed: int = 0) -> Scan:
    """A body of `labels` organs in air: the cells of random points, a third of which stay unlabelled, in an ellipsoid."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), axis=-1)
    cells = labels + max(2, labels // 2)
    owner = cKDTree(rng.uniform(-0.8, 0.8, (cells, 3))).query(grid)[1]
    body = (grid**2).sum(-1) < 0.9
    organ = np.where(body & (owner < labels), 1 + owner, 0).astype(np.int16)
    image = np.where(body, rng.uniform(-100, 200, cells)[owner], -1000) + rng.normal(0, _NOISE_HU, body.shape)
    return Scan(image.astype(np.float32), organ, tuple(float(s) for s in spacing))


def write_image(array: np.ndarray, spacing: Sequence[float], file: Path) -> None:
    """Write voxels (z, y, x) with their spacing in mm, (z, y, x); compressed if the file's ending says so."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(file))


def merge_labels(structures: np.ndarray, labels: int) -> np.ndarray:
    """Number the structures that are there from 1 on, and merge them in turn into at most `labels` of them."""
    present = np.unique(structures)
    present = present[present != 0]
    table = np.zeros(int(structures.max()) + 1, np.int16)
    table[present] = 1 + np.arange(len(present)) % labels
    return table[structures]


def _read(file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    image = SimpleITK.ReadImage(str(file))
    return SimpleITK.GetArrayFromImage(image), tuple(reversed(image.GetSpacing()))
