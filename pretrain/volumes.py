"""The scans a method learns from: what is known of each, and crops of them.

Voxels stay in nnU-Net's preprocessed files and are read a crop at a time; resident memory does not grow with the number of
cases. `pretrain.pools` says which scans there are.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import blosc2
import numpy as np

from pretrain.orientation import AS_STORED, Alignment

_OPEN_FILES = 32


@dataclass(frozen=True)
class CaseInfo:
    """What is known of a preprocessed case without reading its voxels. Axes are (z, y, x) after the plan's transpose and the
    alignment."""

    id: str
    """source/name, unique in the pool."""
    source: str
    """Where it came from: a dataset, its `imagesUn`, or a folder of images."""
    shape: tuple[int, ...]
    """Voxels."""
    spacing: tuple[float, ...]
    """mm of the preprocessed voxels; in a 2d configuration slices keep their original distance. A scan on its own grid may have
    any, and a 2D image is one slice, 999 times as thick as its pixels are wide."""
    original_spacing: tuple[float, ...]
    """mm of the scan as it was acquired."""
    channels: int
    foreground_box: tuple[tuple[int, int], ...]
    """First and one past the last voxel on each axis."""
    foreground_threshold: float
    """The mean over channels lies above it in the foreground (Otsu)."""
    intensity_range: tuple[float, float]
    """1st and 99th percentile of the mean over channels: where a scan shows air, the first is air."""
    intensity_std: float
    """Standard deviation of the mean over channels."""
    channel_ranges: tuple[tuple[float, float], ...] = ()
    """0.5th and 99.5th percentile of each channel's voxels above its smallest; equal where a channel is constant."""
    orientation: str = ""
    """The side of the patient that indices grow towards on each axis (SPL: superior, posterior, left); empty: not known."""
    alignment: Alignment = AS_STORED
    """How the axes above are made from those of the file."""


class Volume:
    """An open case; `read` fetches one crop."""

    def __init__(self, info: CaseInfo, path: Path) -> None:
        self.info = info
        mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
        self._array = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mapped)

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Voxels (channels, *size) float32 of the box at `start`, which must lie inside."""
        alignment = self.info.alignment
        box = (slice(None), *alignment.stored_box(self.info.shape, start, size))
        return alignment.applied(np.asarray(self._array[box], dtype=np.float32))

    def plane(self, index: int) -> Plane:
        """One slice as an image of two dimensions."""
        return Plane(self, index)


class Plane:
    """One slice (axis 0) of an open case, read like a Volume with the axes (y, x)."""

    def __init__(self, volume: Volume, index: int) -> None:
        whole = volume.info
        self.info = replace(
            whole, shape=whole.shape[1:], spacing=whole.spacing[1:], foreground_box=whole.foreground_box[1:]
        )
        self._volume, self._index = volume, int(index)

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Pixels (channels, *size) float32 of the box at `start`, which must lie inside."""
        return self._volume.read((self._index, *start), (1, *size))[:, 0]


@dataclass(frozen=True)
class Pool:
    """Cases and the files of their voxels. Small, and pickled to the workers."""

    cases: tuple[CaseInfo, ...]
    files: Mapping[str, Path]

    def __len__(self) -> int:
        return len(self.cases)

    def split(self, held_out_share: float, seed: int) -> tuple[Pool, Pool]:
        """(cases to learn from, cases to measure on): at least one of each, or everything twice when there is one case."""
        if len(self) == 1:
            return self, self
        order = np.random.default_rng([seed, 0]).permutation(len(self))
        count = min(len(self) - 1, max(1, round(held_out_share * len(self))))
        held_out = set(order[:count].tolist())
        parts = (tuple(c for i, c in enumerate(self.cases) if (i in held_out) == out) for out in (False, True))
        learn, measure = (Pool(part, {case.id: self.files[case.id] for case in part}) for part in parts)
        return learn, measure


class Volumes:
    """Opens the cases of a pool, keeping the last ones open."""

    def __init__(self, pool: Pool) -> None:
        self._files = pool.files
        self._infos = {case.id: case for case in pool.cases}
        self._open: OrderedDict[str, Volume] = OrderedDict()

    def __getitem__(self, case_id: str) -> Volume:
        if case_id not in self._open:
            self._open[case_id] = Volume(self._infos[case_id], self._files[case_id])
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(case_id)
        return self._open[case_id]
