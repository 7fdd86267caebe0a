"""A whole data set from command to command: what a user waits for between raw scans and the first training."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.made_up_dataset import write_raw
from benchmarks.measuring import Agreement, Duel, Scale
from benchmarks.scans import data_folder
from planners.files import read_json, write_json

AUTOSEG = (sys.executable, "-m", "autoseg")


def hippocampus(scale: Scale) -> AbstractContextManager[Duel]:
    """170 MR cases; small: 4 made-up ones of their size, with one worker a step of nnU-Net's, whose start is most of it."""
    if scale is Scale.full:
        return plan_and_preprocess(170)
    return _plan_and_preprocess(_write_made_up, 4, "-npfp", "1", "-np", "1")


def plan_and_preprocess(cases: int) -> AbstractContextManager[Duel]:
    """Raw hippocampus scans to preprocessed cases: verify, fingerprint, plan, preprocess; both with their own defaults."""
    return _plan_and_preprocess(write_hippocampus, cases)


@contextmanager
def _plan_and_preprocess(write: Callable[[str, int], None], cases: int, *options: str) -> Iterator[Duel]:
    with TemporaryDirectory() as folder:
        write(folder, cases)
        places = {f"nnUNet_{name}": f"{folder}/{name}" for name in ("raw", "preprocessed", "results")}
        nnunet = [str(Path(sys.executable).with_name("nnUNetv2_plan_and_preprocess")), "-d", "4", "-c", "3d_fullres"]
        ours = [*AUTOSEG, "plan_and_preprocess", "-d", "4", "--root", folder]

        def run(command: list[str]) -> int:
            shutil.rmtree(places["nnUNet_preprocessed"], ignore_errors=True)
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, **places})
            return len(list(Path(places["nnUNet_preprocessed"]).rglob("*_seg.b2nd")))

        yield Duel(
            lambda: run([*nnunet, "--verify_dataset_integrity", *options]),
            lambda: run(ours),
            lambda reference, ours: Agreement(f"{ours} cases", reference == ours == cases),
        )


def write_hippocampus(root: str, cases: int) -> None:
    """The first cases of the hippocampus task as data set 4 of an empty data root."""
    task = Path(root) / "Task04_Hippocampus"
    _first_cases(data_folder("Task04_Hippocampus"), task, cases)
    convert = [*AUTOSEG, "convert", "msd", str(task), "-d", "4", "--root", root]
    subprocess.run(convert, check=True, capture_output=True)


def _write_made_up(root: str, cases: int) -> None:
    write_raw(Path(root) / "raw" / "Dataset004_MadeUp", cases, 2, (35, 50, 35))


def _first_cases(task: Path, target: Path, cases: int) -> None:
    """A Decathlon task with its first cases only."""
    description = read_json(task / "dataset.json")
    description["training"] = description["training"][:cases]
    description["numTraining"] = len(description["training"])
    for case in description["training"]:
        for part in ("image", "label"):
            (target / case[part]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(task / case[part], target / case[part])
    write_json(target / "dataset.json", {**description, "test": [], "numTest": 0})
