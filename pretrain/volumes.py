"""The scans a method learns from: which there are, what is known of each, and crops of them.

Voxels stay in nnU-Net's preprocessed files and are read a crop at a time; resident memory does not grow with the number of
cases. Where the foreground lies is measured once a case and kept in `<folder>.pool.json` beside the preprocessed folder.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import blosc2
import numpy as np

from planners import paths
from planners.cases import run_cases
from planners.dataset import Case, Dataset, load_dataset, scans_in_folder
from planners.errors import DatasetError, SettingsError
from planners.files import content_hash, file_stamp, read_case_properties, read_json, write_json
from planners.plans import folds, resolved
from planners.preprocess import preprocess_dataset, preprocess_unlabelled

logger = logging.getLogger("autoseg")

_SCHEMA = 3
_OPEN_FILES = 32
_MEASURED_VOXELS = 2**21
_SLAB = 32  # slices read at a time while measuring


@dataclass(frozen=True)
class CaseInfo:
    """What is known of a preprocessed case without reading its voxels. Axes are (z, y, x) after the plan's transpose."""

    id: str
    """source/name, unique in the pool."""
    source: str
    """Where it came from: a dataset, its `imagesUn`, or a folder of images."""
    shape: tuple[int, ...]
    """Voxels."""
    spacing: tuple[float, ...]
    """mm of the preprocessed voxels; in a 2d configuration slices keep their original distance."""
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


class Volume:
    """An open case; `read` fetches one crop."""

    def __init__(self, info: CaseInfo, path: Path) -> None:
        self.info = info
        mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
        self._array = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, **mapped)

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """Voxels (channels, *size) float32 of the box at `start`, which must lie inside."""
        box = (slice(None), *(slice(int(s), int(s) + int(n)) for s, n in zip(start, size, strict=True)))
        return np.asarray(self._array[box], dtype=np.float32)

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


def build_pool(
    dataset: Dataset,
    plan: dict,
    configuration: str,
    *,
    images: Path | None = None,
    more_datasets: Sequence[int | str] = (),
    exclude_fold: int | None = None,
    workers: int | None = None,
) -> Pool:
    """All scans a run may use, preprocessed by the home dataset's plan: training cases, `imagesUn`, `images`, other datasets.

    Args:
        exclude_fold: leaves out the validation cases of that fold, so that training on it stays honest.

    Raises CasesFailed naming scans that cannot be preprocessed, DatasetError for other channels or no case at all.
    """
    preprocess_dataset(dataset.name, plan["plans_name"], [configuration], workers=workers)
    excluded = _validation_cases(dataset, exclude_fold)
    settings = resolved(plan, configuration)
    folder = paths.preprocessed(dataset.name) / settings["data_identifier"]
    sources = [(dataset.name, folder, [case.name for case in dataset.cases if case.name not in excluded])]

    def add(source: str, pool_name: str, cases: Sequence[Case]) -> None:
        if cases:
            place = preprocess_unlabelled(dataset.name, plan, configuration, pool_name, cases, workers=workers)
            sources.append((source, place, [case.name for case in cases]))

    add(f"{dataset.name}/imagesUn", "imagesUn", dataset.unlabelled)
    if images is not None:
        # The same scan again would count twice, or bring an excluded case back.
        known = {path.resolve() for case in (*dataset.cases, *dataset.unlabelled) for path in case.images}
        scans = scans_in_folder(images, len(dataset.channel_names), dataset.file_ending)
        new = [scan for scan in scans if not known.intersection(path.resolve() for path in scan.images)]
        if len(new) < len(scans):
            logger.info("%d of the scans in %s belong to the dataset already", len(scans) - len(new), images)
        name = f"{Path(images).resolve().name}-{content_hash(str(Path(images).resolve()))[:8]}"
        add(name, name, new)
    for other in more_datasets:
        foreign = load_dataset(other)
        if len(foreign.channel_names) != len(dataset.channel_names):
            raise DatasetError(
                f"{foreign.name} has other channels than {dataset.name}",
                found=", ".join(foreign.channel_names),
                expected=", ".join(dataset.channel_names),
                remedy="leave this dataset out",
            )
        add(foreign.name, foreign.name, [*foreign.cases, *foreign.unlabelled])

    cases: list[CaseInfo] = []
    files: dict[str, Path] = {}
    for source, place, names in sources:
        for info in _index(source, place, names, plan["transpose_forward"], settings["spacing"], workers):
            cases.append(info)
            files[info.id] = place / f"{info.id.removeprefix(source + '/')}.b2nd"
    if not cases:
        raise DatasetError(f"{dataset.name} has no scan to learn from", remedy="add scans with --images FOLDER")
    counts = Counter(case.source for case in cases)
    logger.info("Scans: %s", ", ".join(f"{count} from {source}" for source, count in counts.items()))
    return Pool(tuple(cases), files)


def _validation_cases(dataset: Dataset, fold: int | None) -> set[str]:
    if fold is None:
        return set()
    splits = folds(dataset.name)
    if not 0 <= fold < len(splits):
        raise SettingsError("No such fold", found=fold, expected=f"0 to {len(splits) - 1}")
    return set(splits[fold]["val"])


def _index(
    source: str,
    folder: Path,
    names: Sequence[str],
    transpose_forward: Sequence[int],
    target_spacing: Sequence[float],
    workers: int | None,
) -> list[CaseInfo]:
    """The CaseInfo of each case in a preprocessed folder; measured where the file is new or has changed."""
    path = folder.with_name(f"{folder.name}.pool.json")
    stored = read_json(path) if path.is_file() else {}
    known = stored.get("cases", {}) if stored.get("schema") == _SCHEMA else {}
    missing = [name for name in names if not (folder / f"{name}.b2nd").is_file()]
    if missing:
        raise DatasetError(
            "Preprocessed cases are missing",
            where=folder,
            found=f"{len(missing)} without a .b2nd file, e.g. {', '.join(missing[:3])}",
            remedy="autoseg plan_and_preprocess; data that an older nnU-Net preprocessed (.npz) cannot be used",
        )
    stamps = {name: file_stamp(folder / f"{name}.b2nd") for name in names}
    todo = [name for name in names if known.get(name, {}).get("stamp") != stamps[name]]
    if todo:
        outcomes = run_cases(
            measure_case,
            {name: (folder, name, transpose_forward) for name in todo},
            description="Looking for the foreground",
            bytes_per_case=sum(stamps[name][1] for name in todo) // len(todo),
            workers=workers,
        )
        failed = [f"{o.name}: {o.error}" for o in outcomes.values() if o.error is not None]
        if failed:
            raise DatasetError(
                f"{len(failed)} preprocessed cases cannot be used",
                where=folder,
                found="\n            ".join(failed[:20]),
                remedy="autoseg verify checks the scans; removing these files makes the next run preprocess them again",
            )
        for name in todo:
            known[name] = {"stamp": stamps[name], **outcomes[name].value}
        write_json(path, {"schema": _SCHEMA, "cases": known})
    return [_case_info(source, name, known[name], target_spacing) for name in names]


def measure_case(folder: Path, name: str, transpose_forward: Sequence[int]) -> dict:
    """What the pool's index holds of one case (JSON types). Reads slab by slab, keeping one voxel in a few."""
    properties = read_case_properties(folder / f"{name}.pkl")
    array = blosc2.open(urlpath=str(folder / f"{name}.b2nd"), mode="r", dparams={"nthreads": 1})
    shape = array.shape[1:]
    coarse = max(1, round((np.prod(shape) / _MEASURED_VOXELS) ** (1 / 3)))
    every = [max(1, min(coarse, n // 16)) for n in shape]
    slab = max(1, _SLAB // every[0]) * every[0]
    channels = np.concatenate(
        [
            np.asarray(array[:, first : first + slab])[:, :: every[0], :: every[1], :: every[2]]
            for first in range(0, shape[0], slab)
        ],
        axis=1,
    )
    kept = channels.mean(0)
    if not np.isfinite(kept).all():
        raise DatasetError("voxels that are not numbers (NaN or infinite)")
    threshold = otsu(kept)
    box = []
    for axis, length in enumerate(shape):
        share = (kept > threshold).mean(axis=tuple(a for a in range(3) if a != axis))
        inside = np.flatnonzero(share >= 0.01)
        first, last = (inside[0], inside[-1]) if inside.size else (0, len(share) - 1)
        box.append([int(first) * every[axis], min(int(length), (int(last) + 1) * every[axis])])
    return {
        "shape": [int(n) for n in shape],
        "channels": int(array.shape[0]),
        "original_spacing": [float(properties["spacing"][axis]) for axis in transpose_forward],
        "box": box,
        "threshold": threshold,
        "range": [float(v) for v in np.quantile(kept, [0.01, 0.99])],
        "std": float(kept.std()),
        "channel_ranges": [channel_range(channel) for channel in channels],
    }


def channel_range(values: np.ndarray) -> tuple[float, float]:
    """0.5th and 99.5th percentile of the values above the smallest; twice that where all are equal."""
    smallest = values.min()
    above = values[values > smallest]
    low, high = np.quantile(above, [0.005, 0.995]) if above.size else (smallest, smallest)
    return float(low), float(high)


def otsu(values: np.ndarray) -> float:
    """The threshold that separates two classes of intensities best; just below the minimum when all are equal."""
    low, high = np.quantile(values, [0.001, 0.999])
    if not high > low:
        return float(values.min()) - 1.0
    counts, edges = np.histogram(values, bins=256, range=(low, high))
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    sums = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(edges[1 + int(np.nanargmax(between))])


def _case_info(source: str, name: str, entry: dict, target_spacing: Sequence[float]) -> CaseInfo:
    original = entry["original_spacing"]
    return CaseInfo(
        id=f"{source}/{name}",
        source=source,
        shape=tuple(entry["shape"]),
        spacing=(*original[: 3 - len(target_spacing)], *map(float, target_spacing)),
        original_spacing=tuple(original),
        channels=entry["channels"],
        foreground_box=tuple((first, last) for first, last in entry["box"]),
        foreground_threshold=entry["threshold"],
        intensity_range=tuple(entry["range"]),
        intensity_std=entry["std"],
        channel_ranges=tuple((low, high) for low, high in entry["channel_ranges"]),
    )
