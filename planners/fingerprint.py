"""The dataset fingerprint: nnU-Net's file, made with bounded memory, plus what the intensity scheme is decided from.

nnU-Net draws 1e8 / N foreground voxels per case and keeps them all in the parent; 1e5 a case give the same percentiles with
a fiftieth of the memory. Its own numbers and keys are kept (MIC-DKFZ/nnUNet:nnunetv2/experiment_planning/
dataset_fingerprint/fingerprint_extractor.py), the additions stand under the key `autoseg`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from planners import paths
from planners.cases import run_cases
from planners.dataset import Dataset
from planners.errors import CasesFailed, DatasetError
from planners.files import content_hash, file_stamp, read_json, write_json
from planners.intensity import WINDOWS
from planners.quiet import nnunet_quiet

logger = logging.getLogger("autoseg")

_SAMPLES_PER_CASE = 100_000
_SAMPLES_IN_ALL = 100_000_000
_PEAK_COPIES = 12
# Voxels looked at for the shares of integers and air; extremes are exact.
_HINT_VOXELS = 200_000


def fingerprint(dataset: Dataset, *, workers: int | None = None) -> dict:
    """Measure `dataset`, or read what was measured before from the same files.

    Returns the content of `dataset_fingerprint.json`. Raises CasesFailed naming every case that could not be read.
    """
    path = paths.preprocessed(dataset.name) / "dataset_fingerprint.json"
    inputs = _inputs_hash(dataset)
    if path.is_file():
        known = read_json(path)
        if known.get("autoseg", {}).get("inputs") == inputs:
            return known
    with nnunet_quiet():
        reader = determine_reader_writer_from_dataset_json(dataset.json, str(dataset.cases[0].images[0])).__name__
    samples = min(_SAMPLES_PER_CASE, _SAMPLES_IN_ALL // len(dataset.cases))
    outcomes = run_cases(
        _measure_case,
        {case.name: (case.images, case.label, reader, samples) for case in dataset.cases},
        description="Measuring cases",
        bytes_per_case=estimated_case_bytes(dataset),
        workers=workers,
    )
    failed = [outcome for outcome in outcomes.values() if outcome.error]
    if failed:
        raise CasesFailed(
            f"{len(failed)} of {len(outcomes)} cases of {dataset.name} could not be measured",
            found="; ".join(f"{o.name}: {type(o.error).__name__}: {o.error}" for o in failed[:10]),
            remedy=f"autoseg verify -d {dataset.id} shows what is wrong with each",
        )
    measured = [outcomes[case.name].value for case in dataset.cases]
    result: dict[str, Any] = {
        "spacings": [m["spacing"] for m in measured],
        "shapes_after_crop": [m["shape_after_crop"] for m in measured],
        "foreground_intensity_properties_per_channel": {},
        "median_relative_size_after_cropping": float(np.median([m["relative_size"] for m in measured])),
        "autoseg": {
            "inputs": inputs,
            "reader": reader,
            "cases": [case.name for case in dataset.cases],
            "channels": [],
            "class_voxels": {case.name: m["class_voxels"] for case, m in zip(dataset.cases, measured, strict=True)},
        },
    }
    for channel, channel_name in enumerate(dataset.channel_names):
        foreground = np.concatenate([m["foreground"][channel] for m in measured])
        if foreground.size == 0:
            raise DatasetError(
                f"{dataset.name} has no labelled voxel in any case",
                where=dataset.folder / "labelsTr",
                remedy="check that the label files belong to the images and hold values above 0",
            )
        result["foreground_intensity_properties_per_channel"][str(channel)] = _statistics(foreground)
        hints = [m["hints"][channel] for m in measured]
        result["autoseg"]["channels"].append(
            {
                "name": channel_name,
                **{key: float(np.median([hint[key] for hint in hints])) for key in hints[0]},
                "window_share": {
                    name: float(np.mean((foreground >= low) & (foreground <= high)))
                    for name, (low, high) in WINDOWS.items()
                },
            }
        )
    write_json(path, result)
    return result


def estimated_case_bytes(dataset: Dataset) -> int:
    """Peak memory of working on the largest case: its float32 voxels, times what copies and resampling need.

    Read from headers only. Measured on 2026-11-20: preprocessing a CT with 62 labels (21.5 M voxels after resampling) peaked at
    11.5 float32 copies of the resampled image.
    """
    import SimpleITK  # takes a tenth of a second, and a training with its data in place needs none of it

    largest = 0
    for case in dataset.cases:
        header = SimpleITK.ImageFileReader()
        header.SetFileName(str(case.images[0]))
        try:
            header.ReadImageInformation()
        except RuntimeError:  # natural images and TIFF have other readers; their size on disk has to do
            largest = max(largest, case.images[0].stat().st_size * len(case.images) * 4)
            continue
        largest = max(largest, int(np.prod(header.GetSize())) * len(case.images) * 4)
    return largest * _PEAK_COPIES


def _inputs_hash(dataset: Dataset) -> str:
    files = [
        [file_stamp(path) for path in (*case.images, case.label) if path is not None and path.is_file()]
        for case in dataset.cases
    ]
    return content_hash({"json": dataset.json, "files": files, "samples": _SAMPLES_PER_CASE, "schema": 1})


def _measure_case(images: Sequence[Path], label: Path, reader: str, samples: int) -> dict:
    """Measure one case; arrays are (channel, z, y, x)."""
    read = recursive_find_reader_writer_by_name(reader)()
    voxels, properties = read.read_images([str(path) for path in images])
    labels, _ = read.read_seg(str(label))
    if voxels.shape[1:] != labels.shape[1:]:
        raise DatasetError("Image and label differ in shape", found=voxels.shape[1:], expected=labels.shape[1:])
    shape_before = voxels.shape[1:]
    hints = [_hints(channel) for channel in voxels]
    cropped, labels, _ = crop_to_nonzero(voxels, labels)
    foreground, _ = DatasetFingerprintExtractor.collect_foreground_intensities(labels, cropped, num_samples=samples)
    values, counts = np.unique(labels, return_counts=True)
    return {
        "spacing": [float(s) for s in properties["spacing"]],
        "shape_after_crop": [int(n) for n in cropped.shape[1:]],
        "relative_size": float(np.prod(cropped.shape[1:]) / np.prod(shape_before)),
        "foreground": [np.asarray(channel, dtype=np.float32) for channel in foreground],
        "hints": hints,
        "class_voxels": {str(int(v)): int(n) for v, n in zip(values, counts, strict=True) if v > 0},
    }


def _hints(channel: np.ndarray) -> dict[str, float]:
    flat = channel.ravel()
    seen = flat[:: max(1, flat.size // _HINT_VOXELS)]
    return {
        "low": float(flat.min()),
        "high": float(flat.max()),
        "integer_share": float(np.mean(seen == np.round(seen))),
        "air_share": float(np.mean((seen >= -1100) & (seen <= -900))),
    }


def _statistics(foreground: np.ndarray) -> dict[str, float]:
    """The names and definitions of nnU-Net's fingerprint."""
    low, median, high = np.percentile(foreground, (0.5, 50.0, 99.5))
    return {
        "mean": float(foreground.mean(dtype=np.float64)),
        "median": float(median),
        "std": float(foreground.std(dtype=np.float64)),
        "min": float(foreground.min()),
        "max": float(foreground.max()),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }
