"""A tiny trained model, and what tests need to look at masks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK

from planners import paths
from tests.tiny import DATASET, tiny_plan, write_tiny_dataset, write_tiny_plan


@dataclass(frozen=True)
class Trained:
    """A finished run: where its data are and its model folder."""

    root: Path
    model: Path
    scans: Path
    references: Path


def train_tiny(
    root: Path,
    *,
    dims: int = 3,
    channels: int = 1,
    regions: bool = False,
    spacing: tuple[float, float, float] | None = None,
    **options,
) -> Trained:
    """Train the tiny plan, by default for a hundred iterations (three seconds)."""
    from trainers.train import train

    write_tiny_dataset(root, cases=6, channels=channels, regions=regions, test_cases=2)
    plan = tiny_plan(dims=dims, channels=channels)
    if spacing is not None:
        plan["configurations"]["3d_fullres"]["spacing"] = list(spacing)
    write_tiny_plan(plan)
    settings = {"epochs": 4, "iterations": 25, **options.pop("settings", {})}
    folder = train(901, plan="tinyPlans", settings=settings, device="cpu", **options)[0]
    raw = paths.raw(DATASET)
    return Trained(root, folder.parent, raw / "imagesTs", raw / "labelsTs")


def read(file: Path) -> np.ndarray:
    """Voxels (z, y, x) of an image file."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two boolean masks."""
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def predict_with_nnunet(model: Path, scans: Path, output: Path) -> None:
    """Masks of a folder by `nnUNetv2_predict` where autoseg is installed; its command is in a file, for its workers to find."""
    from trainers.runs import stock_command

    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AUTOSEG", "TORCH_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    arguments = stock_command(model, (0,), "cpu").split()[1:]
    arguments = [{"INPUT": str(scans), "OUTPUT": str(output)}.get(a, a) for a in arguments]
    start = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point; predict_entry_point()"
    script = output.with_name("predict_with_nnunet.py")
    script.write_text(f"if __name__ == '__main__':\n    {start}\n")
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
