"""The whole training job: choose plan and settings, make missing data, start from an encoder, train, validate."""

from __future__ import annotations

import copy
import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planners import plans
from planners.configurations import derivable, with_configuration
from planners.dataset import load_dataset
from planners.device import choose_device
from planners.errors import PlanError, SettingsError
from planners.files import write_json
from planners.locks import sole_lock
from planners.paths import resolve_dataset
from planners.preprocess import is_preprocessed, preprocess_dataset
from planners.quiet import nnunet_quiet
from planners.run_names import check_run_name
from pretrain.checkpoint import seen_cases
from pretrain.fit import Fit, fit, try_transfer
from pretrain.networks.registry import check_architecture
from pretrain.transfer import TransferReport
from trainers.base import AutosegTrainer
from trainers.runs import (
    FINAL,
    LATEST,
    SCRATCH,
    describe,
    options_of,
    run_folder,
    stock_command,
    stored_plan,
)
from trainers.settings import KEYS, SHORT_ITERATIONS, TRANSFORMERS, Resolved, resolve, validated
from trainers.sources import Source, find_source

logger = logging.getLogger("autoseg")

_TRAINER = AutosegTrainer.__name__


@dataclass(frozen=True)
class Job:
    """A training that is decided but not begun."""

    dataset_name: str
    plan: dict
    """A copy of the plan with `autoseg.train` written into it; what the run's plans.json holds."""
    plan_name: str
    configuration: str
    run: str | None
    resolved: Resolved
    source: Source | None
    device: torch.device
    folder: Path
    folds: tuple[int | str, ...]
    fit: Fit | None
    """How weights from elsewhere and the plan were brought together."""
    unwritten: tuple[dict, ...]
    """Plans that must be on disk before the training begins."""

    def rows(self) -> list[tuple[str, str, str]]:
        """(setting, value, origin) for `--show-config`."""
        source = "none" if self.source is None else f"{self.source.name} ({self.source.weights.sha256[:12]})"
        return [
            ("plan", self.plan_name, ""),
            ("configuration", self.configuration, ""),
            ("run", self.run or SCRATCH, ""),
            ("pretrained", source, ""),
            ("device", str(self.device), ""),
            *self.resolved.rows(),
        ]

    @property
    def architecture(self) -> dict:
        """The plan's entry for the network."""
        return plans.resolved(self.plan, self.configuration)["architecture"]

    def expected_transfer(self) -> TransferReport | None:
        """What will become of every tensor of the weights, found out on a network that is thrown away."""
        if self.fit is not None or self.source is None:
            return None if self.fit is None else self.fit.report
        return try_transfer(
            self.plan,
            self.configuration,
            load_dataset(self.dataset_name).json,
            self.source.weights,
            self.source.minimum_share,
        )


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


def prepare(
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
    allow_partial: bool = False,
) -> Job:
    """Decide everything `train` needs, without writing any plan, data or result. Arguments as for `train`."""
    name = resolve_dataset(dataset)
    chosen_device = choose_device(device)
    given = dict(settings or {})
    validated(given)  # wrong settings are refused before anything is read
    source = None
    if pretrained is not None:
        source = find_source(name, pretrained, plan, configuration, chosen_device.type, allow_partial=allow_partial)
    plan_name = plan or (source.plan_name if source else None)
    plan_name = plans.choose_plan(name, plan_name, chosen_device.type)
    content = plans.load_plan(name, plan_name)
    fitted: Fit | None = None
    unwritten: tuple[dict, ...] = ()
    if source is not None and source.plan_name is None:
        fitted = fit(
            load_dataset(name),
            source.weights,
            plan_name=plan_name,
            configuration=configuration,
            keep_data=plan is not None,
            minimum_share=source.minimum_share,
        )
        content, configuration, unwritten = fitted.plan, fitted.configuration, fitted.unwritten
        plan_name = fitted.plan_name
    elif source is not None and source.weights.card is not None:
        configuration = source.weights.card.configuration
    configuration = configuration or plans.default_configuration(content)
    if configuration not in content["configurations"] and derivable(configuration):
        content = with_configuration(content, configuration)
        unwritten = (content,)
    resolved_configuration = plans.resolved(content, configuration)
    check_architecture(resolved_configuration["architecture"])
    if resolved_configuration.get("previous_stage"):
        raise PlanError(
            "The second stage of a cascade cannot be trained here yet",
            found=f"-c {configuration}",
            remedy="train 3d_fullres, or use nnUNetv2_train for the cascade",
        )
    run = _run_name(run, source)
    folder = run_folder(name, _TRAINER, run, plan_name, configuration)
    folds = _checked_folds(name, folds)

    stored = None if overwrite and not _other_folds(folder, folds) else stored_plan(folder)
    if stored is not None:
        resolved = _existing(stored, content, configuration, given, source, folder)
        source = source or _source_of(stored, name, folder, folds, chosen_device.type)
        job_plan = stored
    else:
        budget = content.get("autoseg", {}).get("budget", "full")
        network = resolved_configuration["architecture"]["network_class_name"].rpartition(".")[2]
        resolved = resolve(
            given, budget=budget, device=chosen_device.type, pretrained=source is not None, network=network
        )
        job_plan = copy.deepcopy(content)
        job_plan.setdefault("autoseg", {})["train"] = {
            **dataclasses.asdict(resolved.settings),
            "run": run,
            "pretrained": source.identity() if source else None,
        }
    return Job(
        name, job_plan, plan_name, configuration, run, resolved, source, chosen_device, folder, folds, fitted, unwritten
    )


def _run_name(run: str | None, source: Source | None) -> str | None:
    if run == SCRATCH:
        if source is not None:
            raise SettingsError(
                "--run scratch is the run that trains from new weights",
                found=f"--pretrained {source.name}",
                remedy="leave --run out, or choose another name",
            )
        return None
    if run is not None:
        return check_run_name(run)
    return source.name if source else None


def _checked_folds(dataset_name: str, folds: Sequence[int | str]) -> tuple[int | str, ...]:
    there = len(plans.folds(dataset_name)) if any(fold != "all" for fold in folds) else 0
    wrong = [fold for fold in folds if fold != "all" and not (isinstance(fold, int) and 0 <= fold < there)]
    if wrong or not folds:
        raise SettingsError(
            "No such fold", found=", ".join(map(str, wrong)) or "none", expected=f"0 to {there - 1}, or all"
        )
    return tuple(dict.fromkeys(folds))


def _other_folds(folder: Path, folds: Sequence[int | str]) -> list[str]:
    names = {f"fold_{fold}" for fold in folds}
    return [
        path.name for path in folder.glob("fold_*") if path.name not in names and any(path.glob("checkpoint_*.pth"))
    ]


def _existing(
    stored: dict, content: dict, configuration: str, given: dict, source: Source | None, folder: Path
) -> Resolved:
    """The settings of an existing run, after checking that what is given now agrees with them."""
    options = options_of(stored)
    settings = validated({key: options[key] for key in KEYS if key in options})
    asked = dataclasses.asdict(validated({**dataclasses.asdict(settings), **given}))
    own = dataclasses.asdict(settings)
    different = [f"train.{key}={asked[key]} (the run has {own[key]})" for key in given if asked[key] != own[key]]
    if source is not None and (options.get("pretrained") or {}).get("sha256") != source.weights.sha256:
        different.append(f"--pretrained {source.name} (the run has {options.get('pretrained') or 'none'})")
    if plans.plan_hash(stored, configuration) != plans.plan_hash(content, configuration):
        different.append(f"plan {content['plans_name']} (it has changed since the run was begun)")
    if different:
        raise SettingsError(
            "This run was begun with other options",
            where=folder,
            found="\n            ".join(different),
            remedy="leave these options out, give the run another name with --run, or begin again with --overwrite",
        )
    return Resolved(settings, dict.fromkeys(KEYS, "run"))


def _source_of(
    stored: dict, dataset_name: str, folder: Path, folds: Sequence[int | str], device_type: str
) -> Source | None:
    """The encoder an existing run starts from, when a fold is still to begin."""
    identity = options_of(stored).get("pretrained")
    begun = all(any((folder / f"fold_{fold}" / name).is_file() for name in (LATEST, FINAL)) for fold in folds)
    if identity is None or begun:
        return None
    missing = SettingsError(
        "The weights this run was begun with are not found",
        where=folder,
        expected=f"{identity['name']}, SHA-256 {identity['sha256'][:12]}…",
        remedy="give them with --pretrained PATH, or begin again with --overwrite",
    )
    try:
        source = find_source(dataset_name, identity["name"], None, None, device_type, allow_partial=True)
    except SettingsError as error:
        raise missing from error
    if source.weights.sha256 != identity["sha256"]:
        raise missing
    return source


def _say_what_will_happen(job: Job) -> None:
    for decision in () if job.fit is None else job.fit.decisions:
        logger.info("%s: %s — %s (%s)", decision.name, decision.value, decision.because, decision.change)
    if job.source is not None:
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
