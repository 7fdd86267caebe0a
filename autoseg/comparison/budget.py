"""Hours and disk of a comparison, before it is begun: from a rehearsal of a few iterations, else from assumptions.

The rehearsal is the real thing for a few iterations, on a throw-away copy of the folders (links to the preprocessed data), so
that nothing below the data root is written.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoseg.comparison.arms import Arm
from autoseg.comparison.design import Design
from planners import paths
from planners.budget import is_small
from planners.dataset import load_dataset
from planners.plans import resolved
from planners.preprocess import is_preprocessed
from planners.progress import without_bars
from planners.quiet import nnunet_quiet
from pretrain.catalog import load_method
from pretrain.encoders import build_segmentation_network
from pretrain.loop import pretrain
from pretrain.runs import is_finished as is_pretrained
from pretrain.settings import configure
from trainers.base import AutosegTrainer
from trainers.data import environment
from trainers.job import prepare
from trainers.runs import FINAL
from trainers.train import is_finished

logger = logging.getLogger("autoseg")

_ITERATIONS = 4  # the first is not counted
_STEPS = 4
_EVALUATIONS, _REHEARSED_EVALUATIONS = 11, _STEPS + 1  # of a pretraining: each tenth of it, and at the start
_CHEAP = 3e8  # voxels of a batch times squared features of the first stage: 2 × 48³ × 8² are 1.4e7
_SECONDS_PER_UNIT = 1.5e-8
_STEP_IN_ITERATIONS = 2.0
_GIGABYTE = 1e9


@dataclass(frozen=True)
class Cost:
    """Of one piece of work."""

    seconds: float
    bytes: float
    basis: str
    """`measured`, or `assumed` and why."""


@dataclass(frozen=True)
class Forecast:
    """What is still to be done of a comparison."""

    rows: tuple[tuple[str, int, Cost], ...]
    """What, how often, and the cost of one."""
    finished: int
    """Pieces of work that are done already."""

    @property
    def seconds(self) -> float:
        return sum(count * cost.seconds for _, count, cost in self.rows)

    @property
    def bytes(self) -> float:
        return sum(count * cost.bytes for _, count, cost in self.rows)


def forecast(design: Design) -> Forecast:
    """Hours and disk of everything that is not finished. Writes nothing below the data root."""
    rows: list[tuple[str, int, Cost]] = []
    finished = 0
    for arm in design.arms:
        works = [work for fold in design.folds for work in design.pretrainings(fold) if work.arm == arm]
        left = sum(not is_pretrained(design.encoder(work)) for work in works)
        finished += len(works) - left
        if left:
            rows.append(
                (f"pretraining {arm.name}, {steps_of(design, arm)} steps", left, _pretraining_cost(design, arm))
            )
    for configuration, settings in design.train.items():
        all_of = [w for fold in design.folds for w in design.trainings(fold) if w.arm.configuration == configuration]
        left = sum(not is_finished(design.fold_folder(work)) for work in all_of)
        finished += len(all_of) - left
        if left:
            what = f"training {configuration}, {settings.epochs} × {settings.iterations} iterations"
            rows.append((what, left, _training_cost(design, configuration)))
    return Forecast(tuple(rows), finished)


def print_forecast(found: Forecast, console: Any) -> None:
    """The table and its sum."""
    from rich.markup import escape
    from rich.table import Table

    from planners.progress import duration

    table = Table("what", "runs left", "time of one", "in all", "disk", "basis", title="Forecast", title_justify="left")
    for what, count, cost in found.rows:
        each, whole = duration(cost.seconds), duration(count * cost.seconds)
        table.add_row(escape(what), str(count), each, whole, _size(count * cost.bytes), escape(cost.basis))
    console.print(table)
    done = f" ({found.finished} runs are finished already)" if found.finished else ""
    console.print(f"In all about {found.seconds / 3600:.2g} hours and {_size(found.bytes)} of disk{done}.")
    console.print(
        "One after the other on this machine as it is now; nothing was written. Leave --dry-run out to begin."
    )


def steps_of(design: Design, arm: Arm) -> int:
    """Optimiser steps of an arm's pretraining."""
    method, options = load_method(arm.method), design.pretraining_options(arm)
    small = design.device.type == "cpu" or is_small(design.plans[arm.configuration])
    preset = method.presets[options["preset"] or ("cpu" if small else "default")]
    given = {key.partition(".")[2]: value for key, value in options["settings"].items()}
    steps = {} if options["steps"] is None else {"steps": options["steps"]}
    config: Any = configure(method.Config, arm.method, preset, given, steps)
    return config.steps


def _pretraining_cost(design: Design, arm: Arm) -> Cost:
    steps = steps_of(design, arm)

    def measured() -> Cost:
        options = {**design.pretraining_options(arm), "steps": _STEPS}
        folder = pretrain(
            design.dataset_name,
            method=arm.method,
            plan=design.plan_name,
            configuration=arm.configuration,
            run="rehearsal",
            exclude_fold=design.folds[0],
            device=str(design.device),
            **options,
        )
        with (folder / "progress.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        each = [1 / float(row["steps_per_second"]) for row in rows if row.get("steps_per_second")]
        evaluations = max(0.0, float(rows[-1]["seconds"]) - sum(each)) / _REHEARSED_EVALUATIONS * _EVALUATIONS
        return Cost(float(np.median(each[1:])) * steps + evaluations, _size_of(folder), "measured")

    def assumed(why: str) -> Cost:
        each = _STEP_IN_ITERATIONS * _assumed_iteration(design, arm.configuration)
        basis = f"assumed ({why}): a step takes {each:.2g} s, as {_STEP_IN_ITERATIONS:g} iterations of training"
        # Weights, the state with its two moments, and an averaged copy.
        return Cost(steps * each, 5 * _weights_bytes(design, arm.configuration), basis)

    if _unseen_scans(design, arm.configuration):
        return assumed("the unlabelled scans are not preprocessed yet")
    return _rehearsed(design, arm.configuration, measured, assumed)


def _training_cost(design: Design, configuration: str) -> Cost:
    settings, fold = design.train[configuration], design.folds[0]
    cases = len(design.splits[fold]["val"])
    validations = settings.epochs * settings.validation_iterations

    def measured() -> Cost:
        # All cases, so that batches are as mixed as they get.
        given = {**vars(settings), "label_fraction": 1.0}
        job = prepare(design.dataset_name, plan=design.plan_name, configuration=configuration, folds=(fold,),
                      run="rehearsal", settings=given, device=str(design.device))  # fmt: skip
        home = load_dataset(design.dataset_name)
        with nnunet_quiet():
            trainer = _OneCase(copy.deepcopy(job.plan), configuration, fold, home.json, design.device)
        trainer.on_train_start()
        trainer.network.train()
        each = [_timed(lambda: trainer.train_step(next(trainer.dataloader_train))) for _ in range(_ITERATIONS)]
        trainer.network.eval()
        with torch.no_grad():
            validation = min(_timed(lambda: trainer.validation_step(next(trainer.dataloader_val))) for _ in range(2))
        trainer.on_train_end()
        folder = Path(trainer.output_folder)
        trainer.perform_actual_validation()  # the first case waits for imports
        shutil.rmtree(folder / "validation")
        case = _timed(trainer.perform_actual_validation)
        seconds = float(np.median(each[1:])) * settings.total_iterations + validation * validations + case * cases
        size = 2 * (folder / FINAL).stat().st_size + cases * _size_of(folder / "validation")
        return Cost(seconds, size, "measured")

    def assumed(why: str) -> Cost:
        each = _assumed_iteration(design, configuration)
        # The last and the best checkpoint: weights and moments.
        weights = _weights_bytes(design, configuration) * (3 if settings.optimizer == "adamw" else 2)
        return Cost(each * (settings.total_iterations + validations / 3 + cases), 2 * weights,
                    f"assumed ({why}): an iteration takes {each:.2g} s, a validation case as long")  # fmt: skip

    return _rehearsed(design, configuration, measured, assumed)


class _OneCase(AutosegTrainer):
    """Validates a single case, to see how long one takes."""

    def do_split(self) -> tuple[list[str], list[str]]:
        learn, held_out = super().do_split()
        return learn, held_out[:1]


def _rehearsed(
    design: Design, configuration: str, measured: Callable[[], Cost], assumed: Callable[[str], Cost]
) -> Cost:
    plan = design.plans[configuration]
    if not is_preprocessed(design.dataset_name, plan, configuration):
        return assumed("the data are not preprocessed yet")
    if design.device.type == "cpu" and _units(design, configuration) > _CHEAP:
        return assumed("this plan on a CPU takes too long to try")
    try:
        with _throw_away(design.dataset_name), _silent(), without_bars():
            return measured()
    except Exception as error:
        return assumed(f"the rehearsal failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


@contextlib.contextmanager
def _throw_away(dataset_name: str) -> Iterator[None]:
    """Results go to a temporary folder, and so does whatever is written beside the preprocessed data."""
    real = paths.preprocessed(dataset_name)
    with tempfile.TemporaryDirectory() as place:
        copied = Path(place) / "preprocessed" / dataset_name
        for folder, _, files in os.walk(real):
            target = copied / Path(folder).relative_to(real)
            target.mkdir(parents=True)
            for name in files:
                if not name.endswith(".lock"):
                    (target / name).symlink_to((Path(folder) / name).absolute())
        with (
            environment("nnUNet_preprocessed", str(copied.parent)),
            environment("nnUNet_results", str(Path(place) / "results")),
        ):
            yield


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _unseen_scans(design: Design, configuration: str) -> bool:
    identifier = resolved(design.plans[configuration], configuration)["data_identifier"]
    place = paths.preprocessed(design.dataset_name) / f"{identifier}_unlabelled" / "imagesUn"
    return bool(load_dataset(design.dataset_name).unlabelled) and not place.is_dir()


def _units(design: Design, configuration: str) -> float:
    """What a convolution at full resolution costs: voxels of a batch times squared features."""
    settings = resolved(design.plans[configuration], configuration)
    arguments = settings["architecture"]["arch_kwargs"]
    # A transformer with a convolutional decoder has features at full resolution there, and few tokens.
    features = arguments.get("feature_size") or arguments.get("features_per_stage", [arguments.get("embed_dim")])[0]
    return float(np.prod(settings["patch_size"], dtype=float)) * settings["batch_size"] * float(features) ** 2


def _assumed_iteration(design: Design, configuration: str) -> float:
    """Seconds: a CPU's for a small network, or a thirtieth of it on a GPU."""
    return _units(design, configuration) * _SECONDS_PER_UNIT / (1 if design.device.type == "cpu" else 30)


def _weights_bytes(design: Design, configuration: str) -> float:
    home = load_dataset(design.dataset_name)
    with torch.device("meta"):
        network = build_segmentation_network(design.plans[configuration], configuration, home.json, initialise=False)
    return 4.0 * sum(parameter.numel() for parameter in network.parameters())


def _timed(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _size(size: float) -> str:
    return f"{size / _GIGABYTE:.1f} GB" if size >= _GIGABYTE else f"{size / 1e6:.0f} MB"
