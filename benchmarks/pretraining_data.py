"""Views for VoCo out of a large CT: crops read from a chunked file, beside loading the whole volume first.

The loaders are those of VoCo's training, without what MONAI adds to them: a NIfTI file is read, scaled and resized twice to
384 x 384 x 96 voxels (Luffy03/VoCo:utils/data_utils.py, get_loader_1k), or that volume is unpickled from a cache and the part
of the recipe that is not cached, its second resizing, is done. The views are cut by the same function on both sides: a grid of
4 x 4 base crops and 4 random ones, so that they must be the same, voxel by voxel.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK
import torch
from torch.nn.functional import interpolate

from benchmarks.measuring import Agreement, Duel, Made, Scale
from benchmarks.scans import made_up, real_ct
from planners.preprocessed_case import save_case
from pretrain.case_index import otsu
from pretrain.methods.voco import VoCo, VoCoSpec
from pretrain.methods.voco_geometry import Layout
from pretrain.volumes import CaseInfo, Volume

_WINDOW_HU = (-175.0, 250.0)
_GRID = (1, 4, 4)
_PLAN = {"configurations": {"3d_fullres": {"patch_size": [48, 192, 192]}}}

Views = list[dict[str, np.ndarray]]


@dataclass
class Loaded:
    """A volume in memory, read like `pretrain.volumes.Volume`."""

    info: CaseInfo
    voxels: np.ndarray

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        box = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
        return self.voxels[box][None]


def whole_volume(scale: Scale) -> Made:
    """Against reading and resizing the NIfTI file for every sample."""
    return _duel(scale, _whole)


def cached(scale: Scale) -> Made:
    """Against a volume that was resized once and pickled."""
    return _duel(scale, _unpickled)


@contextmanager
def _duel(scale: Scale, load: Callable[[Path, tuple[int, ...]], np.ndarray]) -> Iterator[Duel]:
    full = scale is Scale.full
    scan = real_ct(0.8) if full else made_up((140, 230, 250))
    crop, shape = ((64, 96, 96), (96, 384, 384)) if full else ((48, 64, 64), (72, 256, 256))
    spec = VoCoSpec(Layout(crop, _GRID, whole=False, upsampling=1.0), scan.spacing, 2, 4, mirror=0, turn=0, shift=0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan.image.astype(np.int16)), str(folder / "scan.nii.gz"))
        volume = _whole(folder, shape)
        (folder / "cached.pkl").write_bytes(pickle.dumps(volume, protocol=5))
        save_case(volume[None], np.zeros((1, *shape), np.int8), {}, _PLAN, "3d_fullres", folder, "scan")
        info = _info(volume, scan.spacing)
        chunked = Volume(info, folder / "scan.b2nd")
        seeds = range(3)

        def loading() -> Views:
            return [_views(spec, Loaded(info, load(folder, shape)), seed) for seed in seeds]

        yield Duel(loading, lambda: [_views(spec, chunked, seed) for seed in seeds], _same_views)


def _whole(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    low, high = _WINDOW_HU
    hu = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "scan.nii.gz"))).astype(np.float32)
    return _resized(_resized((hu.clip(low, high) - low) / (high - low), shape), shape)


def _unpickled(folder: Path, shape: tuple[int, ...]) -> np.ndarray:
    return _resized(pickle.loads((folder / "cached.pkl").read_bytes()), shape)


def _resized(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return interpolate(torch.from_numpy(volume)[None, None], size=shape, mode="trilinear", align_corners=True)[
        0, 0
    ].numpy()


def _views(spec: VoCoSpec, case: Volume | Loaded, seed: int) -> dict[str, np.ndarray]:
    return VoCo.sample(spec, case, None, np.random.default_rng(seed))  # type: ignore[arg-type]


def _info(volume: np.ndarray, spacing: tuple[float, ...]) -> CaseInfo:
    low, high = np.quantile(volume, [0.01, 0.99])
    return CaseInfo(
        id="benchmark/scan",
        source="benchmark",
        shape=volume.shape,
        spacing=spacing,
        original_spacing=spacing,
        channels=1,
        foreground_box=tuple((0, n) for n in volume.shape),
        foreground_threshold=otsu(volume),
        intensity_range=(float(low), float(high)),
        intensity_std=float(volume.std()),
    )


def _same_views(reference: Views, ours: Views) -> Agreement:
    pairs = [(a[key], b[key]) for a, b in zip(reference, ours, strict=True) for key in ("base", "random", "labels")]
    differing = sum(int((a != b).sum()) for a, b in pairs)
    return Agreement(f"{differing} voxels differ", differing == 0)
