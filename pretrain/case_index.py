"""What is known of preprocessed cases: measured once a case, kept in `<folder>.pool.json` beside the preprocessed folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import blosc2
import numpy as np

from planners.cases import run_cases
from planners.errors import DatasetError
from planners.files import file_stamp, read_case_properties, read_json, write_json
from pretrain.orientation import orientation
from pretrain.volumes import CaseInfo

_SCHEMA = 3
_MEASURED_VOXELS = 2**21
_SLAB = 32  # slices read at a time while measuring


def index_cases(
    source: str,
    folder: Path,
    names: Sequence[str],
    transpose_forward: Sequence[int],
    target_spacing: Sequence[float],
    workers: int | None,
) -> list[CaseInfo]:
    """What is known of each case in a preprocessed folder; measured where the file is new or has changed.

    Args:
        target_spacing: mm of the folder's grid, (z, y, x), (y, x) for slices, () where each scan keeps its own.

    Raises DatasetError naming cases that are missing or cannot be used.
    """
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
        "orientation": orientation(properties, transpose_forward),
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
        orientation=entry["orientation"],
    )
