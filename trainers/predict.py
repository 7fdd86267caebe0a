"""From scans to masks: a folder in, a folder out, the model loaded once, one bad scan not in the way of the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from planners.dataset import Case, channel_names, scans_in_folder
from planners.device import choose_device
from planners.errors import CasesFailed, SettingsError
from planners.files import read_json, write_json
from planners.paths import resolve_dataset
from planners.progress import track
from trainers.label_names import write_viewer_files
from trainers.predict_cases import predict_cases
from trainers.predictor import AutosegPredictor
from trainers.runs import choose_model

logger = logging.getLogger("autoseg")

_RECORD = "prediction.json"


@dataclass
class PredictionSummary:
    """What `predict` did."""

    output: Path
    model: Path
    folds: tuple[int | str, ...]
    written: list[Path] = field(default_factory=list)
    """Masks made now."""
    skipped: list[Path] = field(default_factory=list)
    """Masks that were there already."""
    failed: dict[str, str] = field(default_factory=dict)
    """Case -> what went wrong."""


def predict(
    inputs: str | Path,
    output: str | Path,
    *,
    dataset: int | str | None = None,
    model_folder: str | Path | None = None,
    plan: str | None = None,
    configuration: str | None = None,
    run: str | None = None,
    folds: Sequence[int | str] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    mirroring: bool = True,
    step_size: float = 0.5,
    save_probabilities: bool = False,
    precision: str = "float32",
    compiled: bool = False,
) -> PredictionSummary:
    """Segment the scans of a folder, or one scan, on their own grid.

    The model is a folder (ours or stock nnU-Net's), or the trained model of a dataset; `plan`, `configuration`, `run` and
    `folds` narrow the choice. Masks that are newer than their scan are kept, unless `overwrite`. Beside them lie label
    names and colours for ITK-SNAP and 3D Slicer. `precision` and `compiled` are as in `AutosegPredictor`.

    Raises CasesFailed after all other cases are finished, SettingsError when the model is not clear or `output` holds
    masks of another one.
    """
    if not 0 < step_size <= 1:
        raise SettingsError("The step of the window is a share of its size", found=step_size, expected="in (0, 1]")
    model = _model(dataset, model_folder, plan, configuration, run, folds)
    chosen = choose_device(device)
    predictor = AutosegPredictor(
        chosen, step_size=step_size, mirroring=mirroring, precision=precision, compiled=compiled
    )
    predictor.initialize_from_trained_model_folder(model, folds)
    dataset_json = predictor.dataset_json
    ending = dataset_json["file_ending"]
    cases = scans_in_folder(Path(inputs), len(channel_names(dataset_json)), ending)
    output = Path(output)
    summary = PredictionSummary(output, model, predictor.folds)
    logger.info(
        "Predicting %d scans on %s with %s, folds %s",
        len(cases),
        chosen,
        model.name,
        ", ".join(map(str, predictor.folds)),
    )

    output.mkdir(parents=True, exist_ok=True)
    _record(output, _identity(predictor, model, step_size, mirroring, precision), overwrite)
    write_viewer_files(output, dataset_json)
    todo = []
    for case in cases:
        mask = output / f"{case.name}{ending}"
        wanted = [mask, output / f"{case.name}.npz"] if save_probabilities else [mask]
        if overwrite or not all(_is_newer(file, case) for file in wanted):
            todo.append((case, mask))
        else:
            summary.skipped.append(mask)
    if summary.skipped:
        logger.info("%d masks are there already (--overwrite makes them again)", len(summary.skipped))
    problems = predict_cases(predictor, todo, save_probabilities=save_probabilities)
    for (case, mask), problem in zip(todo, track(problems, "Predicting", len(todo)), strict=True):
        if problem is None:
            summary.written.append(mask)
        else:
            summary.failed[case.name] = problem
    logger.info("Wrote %d masks to %s", len(summary.written), output)
    if summary.failed:
        raise CasesFailed(
            f"{len(summary.failed)} of {len(cases)} scans could not be predicted; the others are finished",
            where=inputs,
            found="\n            ".join(f"{name}: {problem}" for name, problem in summary.failed.items()),
            remedy="repair or remove these files and repeat the command; finished masks are kept",
        )
    return summary


def _model(
    dataset: int | str | None,
    model_folder: str | Path | None,
    plan: str | None,
    configuration: str | None,
    run: str | None,
    folds: Sequence[int | str] | None,
) -> Path:
    if (dataset is None) == (model_folder is None):
        raise SettingsError(
            "Prediction needs one model",
            found="none" if dataset is None else "both -d and -m",
            expected="either -d or -m",
        )
    if model_folder is not None:
        if plan or configuration or run:
            raise SettingsError(
                "-p, -c and --run choose among the models of a dataset (-d)", found=f"-m {model_folder}"
            )
        return Path(model_folder)
    return choose_model(resolve_dataset(dataset if dataset is not None else ""), plan, configuration, run, folds)


def _is_newer(file: Path, case: Case) -> bool:
    """Whether `file` was made from the case as it is now."""
    return file.is_file() and file.stat().st_mtime_ns >= max(image.stat().st_mtime_ns for image in case.images)


def _identity(predictor: AutosegPredictor, model: Path, step_size: float, mirroring: bool, precision: str) -> dict:
    """What decides the voxels of a mask beside the scan."""
    return {
        "model": f"{model.resolve().parent.name}/{model.resolve().name}",
        "folds": list(predictor.folds),
        "weights": predictor.weights_hash(),
        "step_size": step_size,
        "mirroring": mirroring,
        "precision": precision,
    }


def _record(output: Path, identity: dict, overwrite: bool) -> None:
    """Write down which model the masks of a folder come from; refuse to mix two."""
    file = output / _RECORD
    if file.is_file() and not overwrite:
        there = {"precision": "float32", **read_json(file)}  # older folders do not tell it
        different = [
            f"{key} {there.get(key)} there, {value} asked" for key, value in identity.items() if there.get(key) != value
        ]
        if different:
            raise SettingsError(
                "The output folder holds masks that were made otherwise",
                where=output,
                found="; ".join(different),
                remedy="choose another folder with -o, or replace them with --overwrite",
            )
    write_json(file, identity)
