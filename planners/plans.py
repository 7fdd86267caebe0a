"""Plans on disk: which exist, which one a command takes, what one configuration amounts to, and its hash."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from planners import paths
from planners.errors import DatasetError, PlanError
from planners.files import content_hash, read_json, write_json

logger = logging.getLogger("autoseg")

FULL_PLAN = "autosegPlans"
CPU_SUFFIX = "_cpu"
# What preprocessing reads from the top level of a plan, beside the configuration itself.
_PREPROCESSING_KEYS = (
    "transpose_forward",
    "image_reader_writer",
    "label_manager",
    "foreground_intensity_properties_per_channel",
)
_PREPROCESSING_KEYS_OF_CONFIGURATION = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
# Files beside the plans in a preprocessed dataset's folder.
_NOT_PLANS = {"dataset.json", "dataset_fingerprint.json", "splits_final.json"}


def plan_path(dataset_name: str, plan_name: str) -> Path:
    """`<preprocessed>/Dataset017_BTCV/autosegPlans.json`."""
    return paths.preprocessed(dataset_name) / f"{plan_name}.json"


def available_plans(dataset_name: str) -> list[str]:
    """Names of the plans made for a dataset, stock nnU-Net's included."""
    folder = paths.preprocessed(dataset_name)
    if not folder.is_dir():
        return []
    candidates = (p for p in folder.glob("*.json") if p.name not in _NOT_PLANS and not p.name.startswith("."))
    return sorted(p.stem for p in candidates if "configurations" in read_json(p))


def load_plan(dataset_name: str, plan_name: str) -> dict:
    """A plan as written; PlanError lists the plans there are when it is not one of them."""
    path = plan_path(dataset_name, plan_name)
    if not path.is_file():
        raise PlanError(
            f"{dataset_name} has no plan {plan_name}",
            where=path.parent,
            found=", ".join(available_plans(dataset_name)) or "no plan",
            remedy=f"autoseg plan_and_preprocess -d {paths.dataset_id(dataset_name)}, or name one with -p",
        )
    plan = read_json(path)
    if not isinstance(plan, dict) or "configurations" not in plan or "plans_name" not in plan:
        raise PlanError("Not an nnU-Net plan", where=path, expected="the keys plans_name and configurations")
    return plan


def choose_plan(dataset_name: str, plan_name: str | None, device: str) -> str:
    """The plan a command works with: the one named, else autosegPlans, or autosegPlans_cpu where there is no GPU."""
    if plan_name is not None:
        load_plan(dataset_name, plan_name)
        return plan_name
    chosen = FULL_PLAN + (CPU_SUFFIX if device == "cpu" else "")
    load_plan(dataset_name, chosen)
    if device == "cpu":
        logger.info("No GPU: using the small plan %s (-p %s for the full one)", chosen, FULL_PLAN)
    return chosen


def default_configuration(plan: dict) -> str:
    """3d_fullres where the plan has it, else 2d."""
    return next((c for c in ("3d_fullres", "2d") if c in plan["configurations"]), next(iter(plan["configurations"])))


def resolved(plan: dict, configuration: str) -> dict:
    """One configuration with `inherits_from` followed, as nnU-Net does it."""
    if configuration not in plan["configurations"]:
        raise PlanError(
            f"Plan {plan['plans_name']} has no configuration {configuration}",
            found=", ".join(plan["configurations"]),
            remedy="choose one of these with -c",
        )
    seen: list[str] = []
    merged: dict[str, Any] = {}
    name: str | None = configuration
    while name is not None:
        if name in seen or name not in plan["configurations"]:
            raise PlanError(f"Configuration {configuration} inherits from {name}, which cannot be followed", found=seen)
        seen.append(name)
        current = plan["configurations"][name]
        merged = {**current, **merged}
        name = current.get("inherits_from")
    return merged


def plan_hash(plan: dict, configuration: str) -> str:
    """Hash of what the data and the network depend on: one resolved configuration and what preprocessing reads beside it.

    Training options, decisions' explanations and other configurations do not change it.
    """
    own = {k: v for k, v in resolved(plan, configuration).items() if k not in ("autoseg", "inherits_from")}
    return content_hash({"configuration": own, **{key: plan.get(key) for key in _PREPROCESSING_KEYS}})


def preprocessing_hash(plan: dict, configuration: str) -> str:
    """Hash of what the preprocessed voxels depend on: equal for the full and the cpu plan of a dataset."""
    own = resolved(plan, configuration)
    return content_hash(
        {
            "configuration": {key: own.get(key) for key in _PREPROCESSING_KEYS_OF_CONFIGURATION},
            **{key: plan.get(key) for key in _PREPROCESSING_KEYS},
        }
    )


def trained_from(dataset_name: str, plan_name: str, configuration: str) -> list[Path]:
    """Result folders of models and encoders that came from one configuration of a plan."""
    base = paths.results(dataset_name)
    models = [p.parents[1] for p in base.glob(f"*__{plan_name}__{configuration}/fold_*/checkpoint_*.pth")]
    encoders = [p.parent for p in base.glob(f"pretrained/{plan_name}__{configuration}/*/encoder.json")]
    return sorted({*models, *encoders})


def folds(dataset_name: str, *, write: bool = True) -> list[dict]:
    """The cross-validation splits, made by nnU-Net's function (seed 12345, k = min(5, cases)) when there are none yet, and
    then written down, unless `write` is off."""
    path = paths.preprocessed(dataset_name) / "splits_final.json"
    if path.is_file():
        return read_json(path)
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    from planners.dataset import load_dataset

    names = sorted(case.name for case in load_dataset(dataset_name).cases)
    if len(names) < 2:
        raise DatasetError(
            f"{dataset_name} has too few labelled cases to hold some out",
            found=len(names),
            expected="at least 2",
            remedy="train on everything with -f all",
        )
    splits = [
        {part: [str(name) for name in split[part]] for part in ("train", "val")}
        for split in generate_crossval_split(names, seed=12345, n_splits=min(5, len(names)))
    ]
    if write:
        write_json(path, splits)
    return splits
