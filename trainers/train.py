"""The whole training job: make missing plans and data, start from weights, train, validate."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planners import plans
from planners.dataset import load_dataset
from planners.errors import SettingsError
from planners.files import write_json
from planners.locks import sole_lock
from planners.preprocess import is_preprocessed, preprocess_dataset
from planners.quiet import nnunet_quiet
from pretrain.checkpoint import seen_cases
from pretrain.transfer import TransferReport
from trainers.base import AutosegTrainer
from trainers.job import Job, prepare
from trainers.runs import (
    FINAL,
    LATEST,
    describe,
    options_of,
    stock_command,
)
from trainers.settings import SHORT_ITERATIONS, TRANSFORMERS
from trainers.sources import Source

logger = logging.getLogger("autoseg")


def train(
    dataset: int | str,
    *,
    plan: str | None = None,
    configuration: str | None = None,
    folds: Sequence[int | str] = (0,),
    pretrained: str | Path | None = None,
    run: str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    overwrite: bool = False,
    validation_only: bool = False,
    allow_partial: bool = False,
    show_config: bool = False,
    dry_run: bool = False,
    on_dry_run: Callable[[Job, TransferReport | None], None] | None = None,
) -> list[Path]:
    """Train folds of a dataset in turn; returns their folders.

    Repeating the call continues what was interrupted and does nothing where everything is finished. On an existing run,
    options that are not given are the run's own.

    Args:
        settings: `TrainSettings` by key, as values or strings.
        pretrained: name or path of an encoder, see `trainers.sources`.
        run: name of the run; `scratch` for the one without a name.
        overwrite: train these folds again from the start.
        validation_only: predict and measure the validation cases of finished folds again where masks are missing.
        allow_partial: accept an encoder whose pretraining is not finished, and weights that fill little of the encoder.
        show_config: only say what would be trained: every setting, its value and where it came from.
        dry_run: the same, and what would become of every pretrained tensor; nothing is written.
        on_dry_run: called with the job and the report of the transfer, if there are weights to transfer.
    """
    job = prepare(
        dataset,
        plan=plan,
        configuration=configuration,
        folds=folds,
        pretrained=pretrained,
        run=run,
        settings=settings,
        device=device,
        overwrite=overwrite,
        allow_partial=allow_partial,
    )
    if show_config or dry_run:
        for setting, value, origin in job.rows():
            logger.info("%-24s %-24s %s", setting, value, origin)
        if dry_run and on_dry_run is not None:
            on_dry_run(job, job.expected_transfer())
        return []
    if validation_only or not all(is_finished(job.folder / f"fold_{fold}") for fold in job.folds) or overwrite:
        _say_what_will_happen(job)
    if any(fold != "all" for fold in job.folds):
        plans.folds(job.dataset_name)  # written now: nnU-Net would make five of however few cases
    for plan_to_write in job.unwritten:
        write_json(plans.plan_path(job.dataset_name, plan_to_write["plans_name"]), plan_to_write)
        logger.info("Wrote plan %s", plan_to_write["plans_name"])
    if not is_preprocessed(job.dataset_name, job.plan, job.configuration):
        logger.info("The data of %s are not preprocessed yet; doing that first", job.configuration)
        preprocess_dataset(job.dataset_name, job.plan_name, [job.configuration])
    folders = [_train_fold(job, fold, overwrite, validation_only) for fold in job.folds]
    logger.info("Predict with it:   autoseg predict -i SCANS -o MASKS -d %s %s", _id(job), describe(job.folder))
    ours = job.architecture["network_class_name"].startswith("pretrain.")
    logger.info(
        "%s %s",
        "With nnU-Net, where autoseg is installed:" if ours else "Without autoseg:  ",
        stock_command(job.folder, job.folds, job.device.type),
    )
    return folders


def _say_what_will_happen(job: Job) -> None:
    for decision in () if job.fit is None else job.fit.decisions:
        logger.info("%s: %s — %s (%s)", decision.name, decision.value, decision.because, decision.change)
    if job.source is not None:
        if job.source.weights.licence:
            logger.info("Licence of %s: %s", job.source.name, job.source.weights.licence)
        for warning in job.source.weights.warnings:
            logger.warning("%s: %s", job.source.name, warning)
    settings = job.resolved.settings
    start = "new weights" if job.source is None else f"the weights {job.source.name}"
    if job.resolved.origins["epochs"] == "run" and options_of(job.plan).get("pretrained"):
        start = f"the weights {options_of(job.plan)['pretrained']['name']}"
    logger.info(
        "Training %s of %s on %s from %s: %d epoch(s) of %d iterations, %s at %g",
        job.configuration,
        job.plan_name,
        job.device,
        start,
        settings.epochs,
        settings.iterations,
        settings.optimizer,
        settings.lr,
    )
    if job.resolved.origins["epochs"] == "rule":
        logger.info("No GPU: a short training by default (--set train.epochs, train.iterations change it)")
    network = job.architecture["network_class_name"].rpartition(".")[2]
    if network in TRANSFORMERS and "rule" in job.resolved.origins.values():
        logger.info("Optimiser and rate are those published for %s (--show-config lists them)", network)
    elif job.resolved.origins["optimizer"] == "rule":
        logger.info(
            "Fewer than %d iterations: AdamW, because nnU-Net's SGD would hardly leave the background "
            "(--set train.optimizer=sgd for nnU-Net's)",
            SHORT_ITERATIONS,
        )


def is_finished(fold_folder: Path) -> bool:
    """Whether a fold was trained to the end and validated."""
    return (fold_folder / FINAL).is_file() and (fold_folder / "validation" / "summary.json").is_file()


def _train_fold(job: Job, fold: int | str, overwrite: bool, validation_only: bool) -> Path:
    folder = job.folder / f"fold_{fold}"
    with sole_lock(job.folder / f".fold_{fold}.lock", f"training fold {fold} of this run"):
        return _train_fold_alone(job, fold, folder, overwrite, validation_only)


def _train_fold_alone(job: Job, fold: int | str, folder: Path, overwrite: bool, validation_only: bool) -> Path:
    if overwrite and not validation_only and folder.exists():
        shutil.rmtree(folder)
    final, latest = folder / FINAL, folder / LATEST
    if is_finished(folder) and not validation_only:
        logger.info("Fold %s is finished: %s (--overwrite trains it again)", fold, folder)
        return folder
    if validation_only and not final.is_file():
        raise SettingsError("Only a finished fold can be validated", where=folder, found=f"no {FINAL}")
    write_json(job.folder / "plans.json", job.plan)
    with nnunet_quiet():
        trainer = AutosegTrainer(
            copy.deepcopy(job.plan), job.configuration, fold, load_dataset(job.dataset_name).json, job.device
        )
    begun = final if final.is_file() else latest if latest.is_file() else None
    if job.source is not None and begun is None:
        trainer.pretrained, trainer.minimum_share = job.source.weights, job.source.minimum_share
    trainer.initialize()
    if job.source is not None and trainer.transfer_report is not None:
        _report_transfer(job, job.source, trainer, fold)
    if begun is not None:
        trainer.load_checkpoint(str(begun))
    if begun != final or begun is None:
        trainer.run_training()
    trainer.perform_actual_validation()
    return folder


def _report_transfer(job: Job, source: Source, trainer: AutosegTrainer, fold: int | str) -> None:
    report = trainer.transfer_report
    if report is None:
        return
    trainer.say(f"Weights of {source.name} ({source.weights.kind}): {report.summary()}")
    for name, rule in report.adapted:
        trainer.say(f"    adapted  {name}  {rule}")
    write_json(job.folder / "transfer.json", {"source": source.identity(), **report.to_json()})
    if fold == "all" or source.weights.card is None:
        return
    held_out = plans.folds(job.dataset_name)[int(fold)]["val"]
    known = seen_cases(source.weights.card, source.weights.sha256, job.dataset_name, held_out)
    if known:
        logger.warning(
            "The encoder has seen %d of the %d validation cases of fold %s (without labels); for a clean comparison "
            "pretrain with --exclude-fold %s",
            len(known),
            len(held_out),
            fold,
            fold,
        )


def _id(job: Job) -> int:
    return int(job.dataset_name[len("Dataset") :].split("_")[0])
