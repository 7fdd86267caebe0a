"""From raw scans to nnU-Net's preprocessed files: one case, a dataset, a pool of unlabelled scans. Resumable.

Each case (`planners.preprocessed_case`) is saved under a temporary name and renamed. A journal beside the folder says which
cases are finished from which inputs; it becomes the marker of a finished folder. The folder itself holds nothing but cases,
because nnU-Net takes every file there for one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from planners import paths
from planners.cases import run_cases
from planners.dataset import Case, Dataset, load_dataset
from planners.errors import CasesFailed, PlanError
from planners.files import content_hash, copy_file, file_stamp, read_json, write_json
from planners.fingerprint import estimated_case_bytes
from planners.locks import waiting_lock
from planners.plans import load_plan, preprocessing_hash, resolved
from planners.preprocessed_case import ENDINGS, preprocess_case, save_case
from planners.progress import duration

logger = logging.getLogger("autoseg")


def preprocess_dataset(
    dataset_name: str, plan_name: str, configurations: Sequence[str], *, workers: int | None = None
) -> None:
    """Preprocess the labelled cases for `configurations` of a plan, copying reference labels for validation.

    Repeating does nothing, an interrupted run continues, changed inputs run again. Raises CasesFailed naming the cases that
    failed, with the others finished.
    """
    dataset = load_dataset(dataset_name)
    plan = load_plan(dataset_name, plan_name)
    base = paths.preprocessed(dataset_name)
    for case in dataset.cases:
        target = base / "gt_segmentations" / f"{case.name}{dataset.file_ending}"
        if case.label is not None and (not target.is_file() or file_stamp(target) != file_stamp(case.label)):
            copy_file(case.label, target)
    if not (base / "dataset.json").is_file() or read_json(base / "dataset.json") != dataset.json:
        write_json(base / "dataset.json", dataset.json)
    done: set[str] = set()
    for configuration in configurations:
        settings = resolved(plan, configuration)
        identifier = settings["data_identifier"]
        if identifier in done:
            continue
        done.add(identifier)
        _preprocess_folder(base / identifier, dataset.cases, plan, configuration, dataset, workers=workers)


def preprocess_unlabelled(
    home_dataset: str,
    plan: dict,
    configuration: str,
    pool_name: str,
    cases: Sequence[Case],
    *,
    workers: int | None = None,
) -> Path:
    """Preprocess scans without labels by the home dataset's plan.

    They go to `<data_identifier>_unlabelled/<pool_name>`, never into the folder nnU-Net trains from. Returns that folder.
    """
    dataset = load_dataset(home_dataset)
    identifier = resolved(plan, configuration)["data_identifier"]
    folder = paths.preprocessed(home_dataset) / f"{identifier}_unlabelled" / pool_name
    unlabelled = [Case(case.name, case.images, None) for case in cases]
    _preprocess_folder(folder, unlabelled, plan, configuration, dataset, workers=workers)
    return folder


def is_preprocessed(dataset_name: str, plan: dict, configuration: str) -> bool:
    """Whether every labelled case is preprocessed from its present files."""
    dataset = load_dataset(dataset_name)
    folder = paths.preprocessed(dataset_name) / resolved(plan, configuration)["data_identifier"]
    if _is_foreign(folder, dataset.cases):
        return True
    wanted = _input_hashes(dataset.cases, plan, configuration, dataset.json)
    return _marker(folder).is_file() and read_json(_marker(folder)).get("cases") == wanted


def _preprocess_folder(
    folder: Path,
    cases: Sequence[Case],
    plan: dict,
    configuration: str,
    dataset: Dataset,
    *,
    workers: int | None,
) -> None:
    if _is_foreign(folder, cases):
        logger.info("Using %s as nnU-Net preprocessed it", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder.with_name(f"{folder.name}.autoseg.lock"), f"preprocessing {folder}"):
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        wanted = _input_hashes(cases, plan, configuration, dataset.json)
        finished = _finished_cases(folder)
        for name in {path.name[: -len(".pkl")] for path in folder.glob("*.pkl")} - set(wanted):
            _remove_case(folder, name)
            logger.info("Removed %s from %s: its scan is gone", name, folder.name)
        todo = [case for case in cases if finished.get(case.name) != wanted[case.name]]
        if not todo:
            logger.info("%s: all %d cases are preprocessed already", folder.name, len(cases))
            write_json(_marker(folder), {"cases": wanted})
            return
        if len(todo) < len(cases):
            logger.info(
                "%s: %d of %d cases are there, %d to do", folder.name, len(cases) - len(todo), len(cases), len(todo)
            )
        _marker(folder).unlink(missing_ok=True)
        _journal(folder).write_text(
            "".join(json.dumps([name, stamp]) + "\n" for name, stamp in finished.items() if wanted.get(name) == stamp)
        )
        started = time.monotonic()
        outcomes = run_cases(
            _preprocess_and_save,
            {case.name: (case, plan, configuration, dataset.json, folder, wanted[case.name]) for case in todo},
            description=f"Preprocessing {configuration}",
            bytes_per_case=_case_bytes(dataset, plan, configuration),
            workers=workers,
        )
        failed = [outcome for outcome in outcomes.values() if outcome.error is not None]
        if failed:
            raise CasesFailed(
                f"{len(failed)} of {len(cases)} cases could not be preprocessed; the others are finished",
                where=folder,
                found="\n            ".join(f"{o.name}: {_first_lines(o.error)}" for o in failed[:20]),
                remedy=f"autoseg verify -d {dataset.id} checks each file; then repeat the command, it continues here",
            )
        write_json(_marker(folder), {"cases": wanted})
        _journal(folder).unlink(missing_ok=True)
        logger.info("Preprocessed %d cases in %s: %s", len(todo), duration(time.monotonic() - started), folder)


def _preprocess_and_save(
    case: Case, plan: dict, configuration: str, dataset_json: dict, folder: Path, input_hash: str
) -> None:
    image, labels, properties = preprocess_case(case.images, case.label, plan, configuration, dataset_json)
    temporary = folder / f".partial-{case.name}"
    temporary.mkdir()
    try:
        save_case(image, labels, properties, plan, configuration, temporary, case.name)
        _remove_case(folder, case.name)
        for ending in ENDINGS:
            (temporary / f"{case.name}{ending}").rename(folder / f"{case.name}{ending}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with _journal(folder).open("a", encoding="utf-8") as journal:
        journal.write(json.dumps([case.name, input_hash]) + "\n")


def _remove_case(folder: Path, name: str) -> None:
    for ending in reversed(ENDINGS):
        (folder / f"{name}{ending}").unlink(missing_ok=True)


def _input_hashes(cases: Sequence[Case], plan: dict, configuration: str, dataset_json: Mapping) -> dict[str, str]:
    how = preprocessing_hash(plan, configuration)
    labels = [dataset_json["labels"], dataset_json.get("regions_class_order")]
    return {
        case.name: content_hash(
            [how, labels, [file_stamp(p) for p in (*case.images, case.label) if p is not None and p.is_file()]]
        )
        for case in cases
    }


def _finished_cases(folder: Path) -> dict[str, str]:
    """Hash of the inputs of each case whose files are all there, from the marker or the journal of an unfinished run."""
    finished: dict[str, str] = {}
    if _marker(folder).is_file():
        finished.update(read_json(_marker(folder))["cases"])
    if _journal(folder).is_file():
        for line in _journal(folder).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError, ValueError):  # the last line of a killed run may be torn
                name, stamp = json.loads(line)
                finished[name] = stamp
    return {
        name: stamp
        for name, stamp in finished.items()
        if all((folder / f"{name}{ending}").is_file() for ending in ENDINGS)
    }


def _is_foreign(folder: Path, cases: Sequence[Case]) -> bool:
    """Whether stock nnU-Net filled this folder; it is then read and never written."""
    if folder.name.startswith("autoseg_") or folder.parent.name.endswith("_unlabelled") or not folder.is_dir():
        return False
    if _marker(folder).is_file() or _journal(folder).is_file() or not any(folder.glob("*.pkl")):
        return False
    missing = [case.name for case in cases if not (folder / f"{case.name}.pkl").is_file()]
    if missing:
        raise PlanError(
            "nnU-Net preprocessed only some of the cases, and its data are never touched",
            where=folder,
            found=f"{len(missing)} missing, e.g. {', '.join(missing[:3])}",
            remedy="finish with nnUNetv2_preprocess, or use an autoseg plan",
        )
    return True


def _marker(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.autoseg.json")


def _journal(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.autoseg.partial.jsonl")


def _case_bytes(dataset: Dataset, plan: dict, configuration: str) -> int:
    """Peak memory of the largest case: its raw or its resampled voxels, whichever are more."""
    spacing = resolved(plan, configuration)["spacing"]
    before = plan["original_median_spacing_after_transp"][-len(spacing) :]
    return int(estimated_case_bytes(dataset) * max(1.0, float(np.prod(before) / np.prod(spacing))))


def _first_lines(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", "; ")
