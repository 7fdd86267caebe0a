"""Compare a folder of predicted masks with a folder of references: Dice, NSD and HD95 per case and structure."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planners.cases import run_cases
from planners.dataset import IMAGE_ENDINGS, Dataset, load_dataset, original_labels, split_ending
from planners.errors import DatasetError
from planners.files import replacing, write_json
from planners.geometry import ROUNDING_VOXELS, read_geometry, read_voxels
from trainers.metrics import METRICS, case_metrics, summarise

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("autoseg")

Labels = Mapping[str, "int | tuple[int, ...]"]


@dataclass(frozen=True)
class Evaluation:
    """The result of a comparison.

    `rows` is case → structure → metrics and `summary` structure → means, both as `trainers.metrics` describes them;
    `problems` has one line for each case that could not be compared.
    """

    dataset: str
    tolerance_mm: float
    rows: dict[str, dict[str, dict[str, Any]]]
    summary: dict[str, dict[str, Any]]
    problems: tuple[str, ...]
    csv_path: Path
    json_path: Path


def evaluate(
    predictions: str | Path,
    references: str | Path,
    dataset: int | str,
    *,
    tolerance_mm: float = 1.0,
    workers: int | None = None,
) -> Evaluation:
    """Compare masks of equal names and write `metrics.csv` and `metrics.json` into the folder of the predictions.

    Args:
        dataset: gives the structures and their values. Masks may hold these values or, where the dataset was converted with
            a remap, the original ones.
        tolerance_mm: of the NSD.

    A missing prediction and one on another grid than its reference are listed in `problems`; DatasetError is raised when no
    pair can be compared.
    """
    predictions, references = Path(predictions), Path(references)
    loaded = load_dataset(dataset)
    predicted, true = _masks(predictions, loaded.file_ending), _masks(references, loaded.file_ending)
    pairs = {name: (predicted[name], true[name]) for name in sorted(predicted.keys() & true.keys())}
    if not pairs:
        raise DatasetError(
            "No prediction has a reference of the same name",
            where=f"{predictions} and {references}",
            found=f"{_names(predicted)} and {_names(true)}",
            remedy="give the folder of masks with -i and the folder of labels, such as labelsTs, with -r",
        )
    problems = [f"{name}: no prediction" for name in sorted(true.keys() - predicted.keys())]
    problems += [f"{name}: no reference" for name in sorted(predicted.keys() - true.keys())]

    labels = {name: value for name, value in loaded.labels.items() if name not in ("background", "ignore")}
    ignored = loaded.labels.get("ignore")
    to_dataset = _translations(loaded, predictions, references, pairs, workers)
    outcomes = run_cases(
        _compare,
        {name: (*pair, labels, ignored, tolerance_mm, *to_dataset) for name, pair in pairs.items()},
        description="Comparing masks",
        bytes_per_case=_bytes_of_largest(true[name] for name in pairs),
        workers=workers,
    )
    rows = {name: outcome.value for name, outcome in outcomes.items() if outcome.error is None}
    for name, outcome in outcomes.items():
        if outcome.error is not None:
            problems.append(f"{name}: {' '.join(str(outcome.error).split()) or type(outcome.error).__name__}")
    if not rows:
        raise DatasetError("No pair of masks could be compared", where=predictions, found="; ".join(problems))
    evaluation = Evaluation(
        loaded.name,
        tolerance_mm,
        rows,
        summarise(rows),
        tuple(problems),
        predictions / "metrics.csv",
        predictions / "metrics.json",
    )
    _write(evaluation)
    return evaluation


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print the means with the cases behind them, the problems, and where the numbers were written."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    title = f"{evaluation.dataset}: {len(evaluation.rows)} case(s); NSD at {evaluation.tolerance_mm:g} mm"
    table = Table("structure", title=title, title_justify="left")
    for heading in ("Dice", "NSD", "HD95 mm", "cases", "missed", "false alarm"):
        table.add_column(heading, justify="right")
    for structure, row in evaluation.summary.items():
        if structure == "mean":
            table.add_section()
        shown = ["-" if row[metric] is None else f"{row[metric]:.{digits}f}" for metric, digits in _DIGITS.items()]
        table.add_row(structure, *shown, *(str(row[key]) for key in ("cases", "missed", "false_alarm")))
    console.print(table)
    console.print(
        "A missed or invented structure counts with Dice 0, NSD 0 and the image's diagonal; one that is absent from both "
        "masks does not count."
    )
    for problem in evaluation.problems:
        console.print(f"[yellow]not compared[/] {escape(problem)}", highlight=False)
    console.print(f"Wrote {evaluation.csv_path} and {evaluation.json_path.name}", highlight=False, soft_wrap=True)


_DIGITS = {"dice": 3, "nsd": 3, "hd95_mm": 1}


def _masks(folder: Path, file_ending: str) -> dict[str, Path]:
    """Case name → mask file of a folder."""
    if not folder.is_dir():
        raise DatasetError("Not a folder of masks", where=folder)
    endings = {*IMAGE_ENDINGS, file_ending}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem, ending = split_ending(path, endings)
        if path.is_file() and ending and not path.name.startswith("."):
            found.setdefault(stem, path)
    return found


def _names(masks: Mapping[str, Path]) -> str:
    return ", ".join(list(masks)[:3]) + (", …" if len(masks) > 3 else "") if masks else "no mask"


def _translations(
    dataset: Dataset, predictions: Path, references: Path, pairs: Mapping[str, tuple[Path, Path]], workers: int | None
) -> tuple[dict[int, int] | None, dict[int, int] | None]:
    """For predictions and references: original value → value in the dataset, or None where masks hold the latter."""
    back = original_labels(dataset.json)
    if back is None:
        return None, None
    forward = {old: new for new, old in back.items()}
    outcomes = run_cases(_values, pairs, description="Looking at label values", workers=workers)
    seen = [outcome.value for outcome in outcomes.values() if outcome.error is None]
    inside_dataset = references.resolve().is_relative_to(dataset.folder.resolve())
    chosen = []
    for side, folder, converted in ((0, predictions, False), (1, references, inside_dataset)):
        values = set().union(*(pair[side] for pair in seen))
        original, renamed = values <= forward.keys(), values <= back.keys()
        if not original and not renamed:
            raise DatasetError(
                f"Label values belong neither to {dataset.name} nor to what it was converted from",
                where=folder,
                found=sorted(values),
                expected=f"{sorted(forward)} or {sorted(back)}",
            )
        # Both can be true (5, 6 made 1, 2 and back): `predict` writes original values, the dataset's own labels are converted.
        chosen.append(None if renamed and (converted or not original) else forward)
    return chosen[0], chosen[1]


def _values(*masks: Path) -> tuple[set[int], ...]:
    return tuple({int(value) for value in np.unique(read_voxels(path)[0])} for path in masks)


def _compare(
    prediction_path: Path,
    reference_path: Path,
    labels: Labels,
    ignored: int | None,
    tolerance_mm: float,
    prediction_to_dataset: Mapping[int, int] | None,
    reference_to_dataset: Mapping[int, int] | None,
) -> dict[str, dict[str, Any]]:
    prediction, grid = read_voxels(prediction_path)
    reference, expected = read_voxels(reference_path)
    if grid.size != expected.size or grid.shift_voxels(expected) > ROUNDING_VOXELS:
        raise DatasetError(
            "prediction and reference lie on different grids",
            found=f"{grid.size} voxels, {grid}",
            expected=f"{expected.size} voxels, {expected}",
        )
    prediction = _in_dataset_values(prediction, prediction_to_dataset)
    reference = _in_dataset_values(reference, reference_to_dataset)
    if ignored is not None:
        prediction = np.where(reference == ignored, 0, prediction)
    while prediction.ndim > len(grid.size):  # natural images carry a channel axis
        prediction, reference = prediction[0], reference[0]
    return case_metrics(prediction, reference, labels, expected.spacing[::-1], tolerance_mm)


def _in_dataset_values(mask: np.ndarray, to_dataset: Mapping[int, int] | None) -> np.ndarray:
    """Integers from a mask of any type, with original values replaced by the dataset's."""
    whole = mask.astype(np.int32)
    if not np.array_equal(whole, mask):
        raise DatasetError(
            "the mask holds values that are not whole numbers", found=f"from {mask.min()} to {mask.max()}"
        )
    if to_dataset is None:
        return whole
    lookup = np.zeros(max(to_dataset) + 1, dtype=np.int32)
    lookup[list(to_dataset)] = list(to_dataset.values())
    return lookup[whole]


def _bytes_of_largest(paths: Any) -> int:
    largest = 0
    for path in paths:
        try:
            largest = max(largest, int(np.prod(read_geometry(path).size, dtype=np.int64)))
        except RuntimeError:  # unreadable or not SimpleITK's: found when it is read
            continue
    return largest * 40  # two masks as stored and as 32-bit integers, and the distances of one structure


def _write(evaluation: Evaluation) -> None:
    columns = [*METRICS, "missed", "false_alarm"]
    with (
        replacing(evaluation.csv_path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["case", "structure", *columns])
        for case, structures in evaluation.rows.items():
            for structure, row in structures.items():
                values = ["" if row[column] is None else row[column] for column in METRICS]
                writer.writerow([case, structure, *values, int(row["missed"]), int(row["false_alarm"])])
    write_json(
        evaluation.json_path,
        {
            "autoseg": version("autoseg"),
            "dataset": evaluation.dataset,
            "tolerance_mm": evaluation.tolerance_mm,
            "summary": evaluation.summary,
            "cases": evaluation.rows,
            "problems": list(evaluation.problems),
        },
    )
