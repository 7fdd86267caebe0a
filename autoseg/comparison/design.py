"""What a comparison keeps equal: plan, settings of training, length of pretraining, folds, label subsets. Writes nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg.comparison.arms import Arm, encoder_run, parse_arms, training_run
from planners import paths
from planners.configurations import ensure_configuration
from planners.dataset import load_dataset
from planners.device import choose_device
from planners.errors import SettingsError
from planners.files import read_json
from planners.plans import choose_plan, default_configuration, load_plan, plan_hash, resolved
from planners.plans import folds as all_folds
from planners.run_names import check_run_name
from pretrain.catalog import entry, load_method
from pretrain.checkpoint import encoder_folder
from pretrain.encoders import encoder_info
from pretrain.loop import check_needs
from pretrain.method import Target
from pretrain.settings import configure
from trainers.data import label_subset
from trainers.runs import run_folder
from trainers.settings import TrainSettings, resolve, validated

SETTINGS_NAME = "settings.json"
_OF_PRETRAIN = ("preset", "steps", "stages")


@dataclass(frozen=True)
class Pretraining:
    """Learn the encoder of an arm without one fold's validation cases."""

    arm: Arm
    fold: int


@dataclass(frozen=True)
class Training:
    """Train an arm on a share of one fold's training cases, and validate it on the fold's validation cases."""

    arm: Arm
    fold: int
    fraction: float
    seed: int


@dataclass(frozen=True)
class Design:
    """Everything that is decided before anything is done."""

    dataset_name: str
    run: str | None
    plan_name: str
    plans: dict[str, dict]
    """Configuration → the plan that has it."""
    arms: tuple[Arm, ...]
    fractions: tuple[float, ...]
    folds: tuple[int, ...]
    seeds: tuple[int, ...]
    train: dict[str, TrainSettings]
    """Configuration → settings that all its arms share."""
    preset: str | None
    steps: int | None
    splits: tuple[dict, ...]
    """Of each fold: its train and val cases."""
    device: Any

    @property
    def folder(self) -> Path:
        """`<results>/Dataset017_BTCV/comparison[-NAME]`."""
        return paths.results(self.dataset_name) / (f"comparison-{self.run}" if self.run else "comparison")

    def pretrainings(self, fold: int) -> list[Pretraining]:
        return [Pretraining(arm, fold) for arm in self.arms if not arm.is_scratch]

    def trainings(self, fold: int) -> list[Training]:
        """Few labels first, and all arms of one kind together, so that an unfinished comparison already compares."""
        return [
            Training(arm, fold, fraction, seed)
            for seed, fraction, arm in itertools.product(self.seeds, self.fractions, self.arms)
        ]

    def encoder(self, work: Pretraining | Training) -> Path:
        run = encoder_run(self.run, work.arm, work.fold)
        return encoder_folder(self.dataset_name, self.plan_name, work.arm.configuration, work.arm.method, run)

    def fold_folder(self, work: Training) -> Path:
        run = training_run(self.run, work.arm, work.fold, work.fraction, work.seed)
        model = run_folder(self.dataset_name, "AutosegTrainer", run, self.plan_name, work.arm.configuration)
        return model / f"fold_{work.fold}"

    def cases(self, fold: int, fraction: float, seed: int) -> list[str]:
        """The training cases behind a share of the labels."""
        return label_subset(self.splits[fold]["train"], fraction, seed)

    def pretraining_options(self, arm: Arm) -> dict[str, Any]:
        """Arguments of `pretrain.loop.pretrain` beyond where and without what."""
        own = dict(arm.options)
        return {
            "preset": own.get("preset", self.preset),
            "steps": int(own["steps"]) if "steps" in own else self.steps,
            "stages": own.get("stages"),
            "settings": {f"{arm.method}.{key}": value for key, value in arm.options if key not in _OF_PRETRAIN},
        }

    def kept(self) -> dict[str, Any]:
        """What must not change when a comparison goes on. Arms, shares, folds and seeds may be added."""
        return {
            "plan": self.plan_name,
            "plan_hash": {name: plan_hash(plan, name) for name, plan in self.plans.items()},
            "train": {name: dataclasses.asdict(settings) for name, settings in self.train.items()},
            "preset": self.preset,
            "steps": self.steps,
        }


def decide(
    dataset: int | str,
    methods: str,
    *,
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
) -> Design:
    """Check everything that can be checked before hours are spent; arguments as for `autoseg.comparison.run.compare`.

    Raises SettingsError or PlanError, also when a comparison of that name was begun with other settings.
    """
    name = paths.resolve_dataset(dataset)
    given = dict(settings or {})
    for key, flag in (("seed", "--seeds"), ("label_fraction", "--label-fractions")):
        if key in given:
            raise SettingsError(f"The comparison decides train.{key} itself", remedy=f"give it with {flag}")
    validated(given)
    for fraction in label_fractions:
        validated({"label_fraction": fraction})
    for seed in seeds:
        validated({"seed": seed})
    chosen_device = choose_device(device)
    plan_name = choose_plan(name, plan, chosen_device.type)
    usual = configuration or default_configuration(load_plan(name, plan_name))
    arms = parse_arms(methods, usual)
    plans = {
        one: ensure_configuration(name, plan_name, one, write=False)
        for one in dict.fromkeys(arm.configuration for arm in arms)
    }
    splits = all_folds(name, write=False)
    wrong = [fold for fold in folds if not 0 <= fold < len(splits)]
    if wrong or not (folds and seeds and label_fractions):
        raise SettingsError(
            "Nothing to compare on" if not wrong else "No such fold",
            found=", ".join(map(str, wrong)) or "an empty list of folds, seeds or label fractions",
            expected=f"folds from 0 to {len(splits) - 1}",
        )
    design = Design(
        dataset_name=name,
        run=None if run is None else check_run_name(run),
        plan_name=plan_name,
        plans=plans,
        arms=tuple(arms),
        fractions=tuple(sorted(set(label_fractions))),
        folds=tuple(dict.fromkeys(folds)),
        seeds=tuple(dict.fromkeys(seeds)),
        train={one: _settings(plan_with, one, given, chosen_device.type) for one, plan_with in plans.items()},
        preset=preset,
        steps=steps,
        splits=tuple(splits),
        device=chosen_device,
    )
    _check_arms(design)
    _refuse_changes(design)
    return design


def _settings(plan: dict, configuration: str, given: Mapping[str, Any], device: str) -> TrainSettings:
    """By the rule for new weights, for all arms: a rate that suits only one side would decide the comparison."""
    network = resolved(plan, configuration)["architecture"]["network_class_name"].rpartition(".")[2]
    budget = plan.get("autoseg", {}).get("budget", "full")
    return resolve(given, budget=budget, device=device, pretrained=False, network=network).settings


def _check_arms(design: Design) -> None:
    home = load_dataset(design.dataset_name)
    for arm in design.arms:
        if arm.is_scratch:
            continue
        plan = design.plans[arm.configuration]
        target = Target(plan, arm.configuration, encoder_info(plan, arm.configuration, home.json))
        needs, method = entry(arm.method), load_method(arm.method)
        check_needs(arm.name, needs.dims, needs.networks, target)
        own = dict(arm.options)
        if "steps" in own and not own["steps"].isdigit():
            raise SettingsError("Not a number of steps", found=arm.name)
        options = design.pretraining_options(arm)
        if options["preset"] not in (None, *method.presets):
            raise SettingsError("No such preset", found=f"{options['preset']} for {arm.name}",
                                expected=", ".join(method.presets))  # fmt: skip
        configure(
            method.Config,
            arm.method,
            {key.partition(".")[2]: value for key, value in options["settings"].items()},
            {} if options["steps"] is None else {"steps": options["steps"]},
        )


def _refuse_changes(design: Design) -> None:
    path = design.folder / SETTINGS_NAME
    if not path.is_file():
        return
    stored, wanted = read_json(path), design.kept()
    # What an older autoseg had no setting for was done as its default does it.
    stored["train"] = {one: {**dataclasses.asdict(TrainSettings()), **kept} for one, kept in stored["train"].items()}
    changed = []
    for key, value in wanted.items():
        if isinstance(value, dict):
            shared = [one for one in value if one in stored[key]]
            changed += [f"{key} of {one}" if key != "train" else _difference(stored[key][one], value[one], one)
                        for one in shared if stored[key][one] != value[one]]  # fmt: skip
        elif stored[key] != value:
            changed.append(f"{key} {value} (was {stored[key]})")
    if changed:
        raise SettingsError(
            "A comparison with other settings is there already; equal settings are its point",
            where=design.folder,
            found="\n            ".join(changed),
            remedy="give the same options, or begin another one with --run NAME",
        )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], configuration: str) -> str:
    texts = [f"train.{key} {value} (was {before.get(key)})" for key, value in now.items() if before.get(key) != value]
    return f"{configuration}: {', '.join(texts)}"
