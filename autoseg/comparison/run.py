"""Do a comparison: pretrain each arm once per fold without the fold's validation cases, train all arms alike, compare.

Every piece of work is a usual run of `pretrain.loop.pretrain` or `trainers.train.train`, so each continues where it was
stopped, and what is finished is kept. What fails is reported at the end; the rest goes on.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoseg.comparison import outcomes as found
from autoseg.comparison.board import Board, Work, describe
from autoseg.comparison.budget import Forecast, forecast
from autoseg.comparison.design import SETTINGS_NAME, Design, Pretraining, Training, decide
from autoseg.comparison.report import write_report
from autoseg.comparison.statistics import Line, compare_arms
from planners.configurations import ensure_configuration
from planners.errors import PretrainedMismatch
from planners.files import read_json, write_json
from planners.locks import sole_lock
from planners.plans import folds as all_folds
from pretrain.checkpoint import load_encoder
from pretrain.loop import pretrain
from pretrain.runs import is_finished as is_pretrained
from trainers.train import is_finished, train

logger = logging.getLogger("autoseg")


@dataclass(frozen=True)
class Comparison:
    """What came out."""

    folder: Path
    lines: tuple[Line, ...]
    failures: dict[str, str]
    """What failed, in words → why."""


def compare(
    dataset: int | str,
    *,
    methods: str,
    label_fractions: Sequence[float] = (0.1, 0.25, 1.0),
    folds: Sequence[int] = (0,),
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    preset: str | None = None,
    plan: str | None = None,
    configuration: str | None = None,
    run: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    dry_run: bool = False,
) -> Comparison | Forecast:
    """Find out which pretraining helps on a dataset; repeating the call continues, and may add to what is compared.

    Args:
        methods: `scratch,voco,rotation@2d,meddinov3[stages=1]`, see `autoseg.comparison.arms`.
        label_fractions: shares of each fold's training cases; smaller ones are parts of larger ones.
        folds: each is held out in turn; its validation cases are what is measured.
        seeds: of the trainings; a seed also decides which cases a share of the labels is.
        settings: `TrainSettings` by key, for all arms alike.
        steps: of the pretraining of every method, instead of its preset's.
        preset: `cpu` or `default` of every method; None: by device and plan.
        configuration: of arms without `@`; None: the plan's usual one.
        run: a name, to keep several comparisons.
        workers: processes that make batches for pretraining.
        dry_run: forecast hours and disk instead, and write nothing.

    Returns the comparison, or the forecast. SystemExit (130, 143) after saving, when stopped by SIGINT or SIGTERM.
    """
    design = decide(
        dataset,
        methods,
        label_fractions=label_fractions,
        folds=folds,
        seeds=seeds,
        settings=settings,
        steps=steps,
        preset=preset,
        plan=plan,
        configuration=configuration,
        run=run,
        device=device,
    )
    if dry_run:
        return forecast(design)
    with sole_lock(design.folder.with_name(f".{design.folder.name}.lock"), "doing this comparison"):
        _write_down(design)
        failures: dict[str, str] = {}
        try:
            with Board(design).shown(design.folder / "log.txt") as board:
                _do_all(design, board, failures, workers)
        except (SystemExit, KeyboardInterrupt):
            _conclude(design, failures)
            logger.info("Stopped. What is finished is kept and shown in %s; the same command goes on", design.folder)
            raise
        lines = _conclude(design, failures)
    return Comparison(design.folder, lines, failures)


def _write_down(design: Design) -> None:
    """Everything that must be on disk before the first run: folds, configurations, and what must stay equal."""
    all_folds(design.dataset_name)
    for configuration in design.plans:
        ensure_configuration(design.dataset_name, design.plan_name, configuration)
    path = design.folder / SETTINGS_NAME
    kept, before = design.kept(), read_json(path) if path.is_file() else {}
    merged = {
        key: {**before.get(key, {}), **value} if isinstance(value, dict) else value for key, value in kept.items()
    }
    write_json(path, merged)


def _do_all(design: Design, board: Board, failures: dict[str, str], workers: int | None) -> None:
    for fold in design.folds:
        without_encoder = {}
        for pretraining in design.pretrainings(fold):
            problem = _attempt(design, board, pretraining, workers)
            if problem is not None:
                failures[describe(pretraining)] = without_encoder[pretraining.arm] = problem
        for training in design.trainings(fold):
            if training.arm in without_encoder:
                board.end(training, "left out, its pretraining failed", seconds=0)
            elif (problem := _attempt(design, board, training, workers)) is not None:
                failures[describe(training)] = problem


def _attempt(design: Design, board: Board, work: Work, workers: int | None) -> str | None:
    """Do one piece of work; returns what went wrong."""
    board.begin(work)
    began = time.monotonic()
    kept = (
        is_pretrained(design.encoder(work)) if isinstance(work, Pretraining) else is_finished(design.fold_folder(work))
    )
    try:
        dice = None
        if isinstance(work, Pretraining):
            _pretrain(design, work, workers)
        else:
            dice = _train(design, work)
    except Exception as error:
        logger.debug("%s failed", describe(work), exc_info=True)
        problem = str(error) if str(error) else type(error).__name__
        board.end(work, f"FAILED: {problem.splitlines()[0]}", seconds=time.monotonic() - began)
        return problem
    finally:
        # A trainer and its network refer to each other; the next one needs the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    board.end(work, "done", seconds=time.monotonic() - began, dice=dice, kept=kept)
    return None


def _pretrain(design: Design, work: Pretraining, workers: int | None) -> None:
    folder = pretrain(
        design.dataset_name,
        method=work.arm.method,
        plan=design.plan_name,
        configuration=work.arm.configuration,
        run=design.encoder(work).name.removeprefix(f"{work.arm.method}-"),
        exclude_fold=work.fold,
        device=str(design.device),
        workers=workers,
        **design.pretraining_options(work.arm),
    )
    card = load_encoder(folder)[1]
    held_out = {f"{design.dataset_name}/{case}" for case in design.splits[work.fold]["val"]}
    if seen := held_out & {*card.cases, *card.held_out}:
        raise PretrainedMismatch("The encoder has seen validation cases", where=folder, found=", ".join(sorted(seen)))


def _train(design: Design, work: Training) -> float | None:
    folder = design.fold_folder(work)
    settings = {**vars(design.train[work.arm.configuration]), "seed": work.seed, "label_fraction": work.fraction}
    train(
        design.dataset_name,
        plan=design.plan_name,
        configuration=work.arm.configuration,
        folds=(work.fold,),
        pretrained=None if work.arm.is_scratch else design.encoder(work),
        run=folder.parent.name.partition("__")[0].partition("-")[2],
        settings=settings,
        device=str(design.device),
    )
    dice = read_json(folder / "validation" / "summary.json")["foreground_mean"]["Dice"]
    return None if np.isnan(dice) else float(dice)


def _conclude(design: Design, failures: Mapping[str, str]) -> tuple[Line, ...]:
    outcomes = found.read_outcomes(design)
    if not outcomes:
        return ()
    seconds = {}
    for arm in design.arms:
        each = [
            found.pretraining_seconds(design, w)
            for fold in design.folds
            for w in design.pretrainings(fold)
            if w.arm == arm
        ]
        known = [one for one in each if one is not None]
        if known:
            seconds[arm.name] = sum(known) / len(known)
    lines = tuple(compare_arms(outcomes, design.arms, seconds))
    write_report(design, outcomes, lines, failures)
    return lines
