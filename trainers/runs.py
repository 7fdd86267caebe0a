"""Where a training run lies, what it is called, and which options it was started with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planners.errors import PlanError, SettingsError
from planners.files import read_json
from planners.paths import results

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
SCRATCH = "scratch"
"""On the command line: the run without a name, which trains from new weights."""
COMPARED = "cmp-"
"""Begins the names of a comparison's runs."""


def run_folder_name(trainer_name: str, run: str | None) -> str:
    """`AutosegTrainer` or `AutosegTrainer-voco`: what nnU-Net takes for the trainer's name (`-tr`)."""
    return f"{trainer_name}-{run}" if run else trainer_name


def run_folder(dataset_name: str, trainer_name: str, run: str | None, plan_name: str, configuration: str) -> Path:
    """`<results>/Dataset017_BTCV/AutosegTrainer-voco__autosegPlans__3d_fullres`."""
    return results(dataset_name) / f"{run_folder_name(trainer_name, run)}__{plan_name}__{configuration}"


def options_of(plan: dict) -> dict:
    """What `train` wrote into a run's copy of the plan: settings, run, pretrained; empty in a plan file."""
    return plan.get("autoseg", {}).get("train", {})


def finished_folds(model: Path) -> list[int | str]:
    """Folds of a model folder that have a final checkpoint; numbers first, then `all`."""
    names = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{FINAL}"))
    return [*sorted(int(n) for n in names if n.isdigit()), *(n for n in names if n == "all")]


def find_models(
    dataset_name: str,
    plan_name: str | None = None,
    configuration: str | None = None,
    run: str | None = None,
    folds: Sequence[int | str] | None = None,
) -> list[Path]:
    """Model folders of autoseg's trainers that have a finished fold (all of `folds`, if given), narrowed by what is given.

    The many runs of a comparison are found by their name only.
    """
    found = []
    for model in sorted(results(dataset_name).glob("Autoseg*__*__*")):
        trainer, _, rest = model.name.partition("__")
        plan, _, its_configuration = rest.partition("__")
        its_run = trainer.partition("-")[2] or SCRATCH
        finished = finished_folds(model)
        wanted = its_run == run or (run is None and not its_run.startswith(COMPARED))
        fits = plan_name in (None, plan) and configuration in (None, its_configuration) and wanted
        if fits and finished and set(folds or []) <= set(finished):
            found.append(model)
    return found


def choose_model(
    dataset_name: str,
    plan_name: str | None = None,
    configuration: str | None = None,
    run: str | None = None,
    folds: Sequence[int | str] | None = None,
) -> Path:
    """The one model that is left; SettingsError lists them when there are several, PlanError when there is none."""
    found = find_models(dataset_name, plan_name, configuration, run, folds)
    if len(found) == 1:
        return found[0]
    if not found:
        everything = [f"{model.name}, folds {finished_folds(model)}" for model in find_models(dataset_name)]
        raise PlanError(
            f"{dataset_name} has no trained model of that kind",
            where=results(dataset_name),
            found="\n            ".join(everything) or "no finished training at all",
            remedy="train one with `autoseg train`, or name another with -p, -c, --run, -f or -m",
        )
    raise SettingsError(
        f"{dataset_name} has {len(found)} trained models",
        found="\n            ".join(f"{model.name}: {describe(model)}" for model in found),
        expected="one",
        remedy="choose with -p PLAN, -c CONFIGURATION, --run NAME (scratch for the one without a name), -f FOLD or -m FOLDER",
    )


def describe(model: Path) -> str:
    """`-p autosegPlans -c 3d_fullres --run voco`: the options that choose this model."""
    trainer, plan, configuration = model.name.split("__", 2)
    return f"-p {plan} -c {configuration} --run {trainer.partition('-')[2] or SCRATCH}"


def stock_command(model: Path, folds: Sequence[int | str], device_type: str) -> str:
    """The line that predicts a model with nnU-Net alone."""
    trainer, plan, configuration = model.name.split("__", 2)
    dataset = int(model.parent.name[len("Dataset") :].split("_")[0])
    device = "" if device_type == "cuda" else f" -device {device_type}"
    return (
        f"nnUNetv2_predict -i INPUT -o OUTPUT -d {dataset} -p {plan} -c {configuration} -tr {trainer} "
        f"-f {' '.join(map(str, folds))}{device}"
    )


def stored_plan(model: Path) -> dict | None:
    """The plan a run was started with, or None where there is no run."""
    path = model / "plans.json"
    return read_json(path) if path.is_file() else None
