"""What finished trainings left behind: Dice of each validation case and structure, learning curves, times."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from autoseg.comparison.design import Design, Pretraining, Training
from planners.dataset import label_values, load_dataset
from planners.files import read_json, replacing
from trainers.train import is_finished

COLUMNS = ("arm", "fold", "seed", "label_fraction", "training_cases", "case", "structure", "dice")


@dataclass(frozen=True)
class Outcome:
    """One finished training."""

    training: Training
    training_cases: int
    dice: dict[str, dict[str, float | None]]
    """Case → structure → Dice; None where neither the mask nor the reference has the structure, 0 where one of them has."""
    curve: tuple[float, ...]
    """Dice of validation patches after each epoch."""
    seconds: float
    """Of the training iterations and the online validation."""


def read_outcomes(design: Design) -> list[Outcome]:
    """Of the trainings that are finished, in the order of the design."""
    dataset_json = load_dataset(design.dataset_name).json
    trainings = [training for fold in design.folds for training in design.trainings(fold)]
    return [
        _read(design, training, dataset_json) for training in trainings if is_finished(design.fold_folder(training))
    ]


def pretraining_seconds(design: Design, work: Pretraining) -> float | None:
    """How long an encoder's pretraining took; None where it has not begun."""
    rows = _rows(design.encoder(work) / "progress.csv")
    return float(rows[-1]["seconds"]) if rows else None


def write_csv(outcomes: list[Outcome], path: Path) -> None:
    """One row per arm, fold, seed, share of labels, case and structure; no Dice where there is nothing to find."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for outcome in outcomes:
            work = outcome.training
            where = (work.arm.name, work.fold, work.seed, work.fraction, outcome.training_cases)
            for case, structures in outcome.dice.items():
                for structure, dice in structures.items():
                    writer.writerow([*where, case, structure, "" if dice is None else dice])


def read_dice(summary: dict, dataset_json: dict, file_ending: str) -> dict[str, dict[str, float | None]]:
    """Case → structure → Dice, from nnU-Net's `summary.json`.

    Its rule is that of `trainers.metrics`: a structure that is missed or invented has Dice 0, one that is in neither mask is
    not a number, here None.
    """
    keys = {
        name: str(value)
        for name, value in label_values(dataset_json).items()
        if name not in ("background", "ignore") and value not in (0, (0,))
    }
    found = {}
    for case in summary["metric_per_case"]:
        name = Path(case["prediction_file"]).name.removesuffix(file_ending)
        measured = {structure: case["metrics"][key]["Dice"] for structure, key in keys.items()}
        found[name] = {s: None if value is None or math.isnan(value) else float(value) for s, value in measured.items()}
    return found


def _read(design: Design, training: Training, dataset_json: dict) -> Outcome:
    folder = design.fold_folder(training)
    rows = _rows(folder / "progress.csv")
    return Outcome(
        training=training,
        training_cases=len(design.cases(training.fold, training.fraction, training.seed)),
        dice=read_dice(read_json(folder / "validation" / "summary.json"), dataset_json, dataset_json["file_ending"]),
        curve=tuple(float(row["dice"]) for row in rows),
        seconds=sum(float(row["seconds"]) for row in rows),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
