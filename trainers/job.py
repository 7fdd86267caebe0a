"""What `train` is going to do: weights, plan, configuration, settings and folder are decided, and nothing is written."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planners import plans
from planners.configurations import derivable, with_configuration
from planners.dataset import load_dataset
from planners.device import choose_device
from planners.errors import PlanError, SettingsError
from planners.paths import resolve_dataset
from planners.run_names import check_run_name
from pretrain.fit import Fit, fit, try_transfer
from pretrain.networks.registry import check_architecture
from pretrain.transfer import TransferReport
from trainers.base import AutosegTrainer
from trainers.runs import (
    FINAL,
    LATEST,
    SCRATCH,
    options_of,
    run_folder,
    stored_plan,
)
from trainers.settings import KEYS, Resolved, resolve, validated
from trainers.sources import Source, find_source

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
    """Decide everything `train` needs, without writing anything. Arguments as for `train`."""
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
    there = len(plans.folds(dataset_name, write=False)) if any(fold != "all" for fold in folds) else 0
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
