"""A dataset of made-up CT scans, as large as real ones, that is planned and preprocessed by the project's own commands.

So a benchmark of pretraining has the plan, the network and the files of a real run, and needs no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.scans import made_up, write_image
from planners import paths
from planners.dataset import Dataset, load_dataset
from planners.files import write_json
from planners.fingerprint import fingerprint
from planners.planner import plan_dataset
from pretrain.volumes import Pool

SHAPE, SPACING_MM = (128, 384, 384), (1.25, 0.8, 0.8)
"""Of a scan, (z, y, x)."""
_NAME, _SCANS, _ORGANS = "Dataset900_MadeUp", 2, 5


def make_dataset(root: Path, shape: Sequence[int] = SHAPE, spacing: Sequence[float] = SPACING_MM) -> Dataset:
    """Write the scans below `root`, where all paths then point, and both plans of the dataset."""
    paths.configure(root)
    write_raw(paths.raw(_NAME), _SCANS, _ORGANS, shape, spacing)
    dataset = load_dataset(_NAME)
    plan_dataset(dataset, fingerprint(dataset))
    return dataset


def write_raw(
    dataset: Path, scans: int, organs: int, shape: Sequence[int], spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> None:
    """Write a raw dataset of CT scans of `shape` (z, y, x) into a folder."""
    for number in range(scans):
        scan = made_up(shape, organs, spacing, seed=number)
        write_image(scan.image.astype(np.int16), spacing, dataset / f"imagesTr/scan_{number}_0000.nrrd")
        write_image(scan.labels.astype(np.uint8), spacing, dataset / f"labelsTr/scan_{number}.nrrd")
    labels = {"background": 0, **{f"organ_{number}": number for number in range(1, 1 + organs)}}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": scans, "file_ending": ".nrrd"}
    write_json(dataset / "dataset.json", content)


def as_many(pool: Pool, count: int) -> Pool:
    """The pool as if it had `count` cases, by turns the same files: batches and classes are those of a larger dataset."""
    copies = [(pool.cases[number % len(pool)], f"made up/{number}") for number in range(count)]
    cases = tuple(replace(case, id=name) for case, name in copies)
    return Pool(cases, {name: pool.files[case.id] for case, name in copies})
