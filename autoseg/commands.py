"""One function a command: the Python API. Importing this module imports nothing heavy; running a function does.

Every function takes `root`, the data root (`planners.paths.configure`), and raises `planners.errors.AutosegError`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planners import paths
from planners.deferred import FABRIC, PREDICTOR, TRAINER, import_quickly
from planners.errors import DatasetError, SettingsError

if TYPE_CHECKING:
    from autoseg.comparison.budget import Forecast
    from autoseg.comparison.run import Comparison
    from autoseg.evaluation import Evaluation
    from planners.planner import PlannedPair
    from planners.verify import Problem
    from pretrain.fit import Fit
    from pretrain.importers.weights import Weights
    from trainers.predict import PredictionSummary


def convert_msd(source: str | Path, dataset: int, *, name: str | None = None, root: str | Path | None = None) -> Path:
    """Turn a Medical Segmentation Decathlon task into an nnU-Net dataset; returns its folder."""
    paths.configure(root)
    from autoseg.convert.msd import convert_msd as convert

    return convert(Path(source), dataset, name)


def convert_folder(
    images: str | Path,
    labels: str | Path,
    dataset: int,
    *,
    name: str,
    channels: Sequence[str],
    label_set: str | None = None,
    remap: Mapping[int, int] | None = None,
    unlabelled: str | Path | None = None,
    root: str | Path | None = None,
) -> Path:
    """Turn folders of scans and labels into an nnU-Net dataset; returns its folder.

    Args:
        channels: names, in the order of the files of a case.
        label_set: a known set of names and values (`btcv`); without one labels are named `label_N` and gaps closed.
        remap: stored value → value in the dataset; undone when predicting.
        unlabelled: more scans of the same kind, for pretraining.
    """
    paths.configure(root)
    from autoseg.convert.folder import convert_folder as convert

    return convert(
        Path(images),
        Path(labels),
        dataset,
        name,
        channels,
        label_set=label_set,
        remap=remap,
        unlabelled=None if unlabelled is None else Path(unlabelled),
    )


def verify(dataset: int | str, *, workers: int | None = None, root: str | Path | None = None) -> list[Problem]:
    """Every problem of a raw dataset, errors first; an empty list means none."""
    paths.configure(root)
    from planners.verify import verify_dataset

    return verify_dataset(dataset, workers=workers)


def plan_and_preprocess(
    dataset: int | str,
    *,
    configurations: Sequence[str] | None = None,
    spacing: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None,
    gpu_memory_gb: float | str = 8.0,
    intensity: Sequence[str] | None = None,
    plan_name: str | None = None,
    workers: int | None = None,
    on_planned: Callable[[PlannedPair], None] | None = None,
    root: str | Path | None = None,
) -> PlannedPair:
    """Verify a dataset, decide both of its plans and preprocess it.

    Args:
        configurations: what to preprocess; None: the default one, `3d_fullres` or else `2d`. Missing ones that follow from
            their name (`3d_fullres_swin`) are added to both plans.
        spacing: target spacing (z, y, x) in mm instead of the rule's.
        patch_size: patch of `3d_fullres` (three numbers) or `2d` (two) instead of the rule's.
        gpu_memory_gb: memory the full plan may use; "auto": what the GPU has, at most 24.
        intensity: one scheme a channel instead of the rule's (`planners.intensity.SCHEMES`).
        plan_name: a tag for plans that differ from ones something was trained from.
        on_planned: called with the plans before the cases are preprocessed, which may take hours.

    Raises DatasetError when verification finds errors; nothing is planned then.
    """
    paths.configure(root)
    # What can be wrong with the options is said before anything heavy is imported.
    from planners.intensity import parse_scheme

    target_spacing = None if spacing is None else _triple(spacing)
    memory_gb = _gpu_memory(gpu_memory_gb)
    schemes = None if intensity is None else tuple(parse_scheme(text) for text in intensity)
    paths.resolve_dataset(dataset)
    from planners.configurations import ensure_configuration
    from planners.dataset import load_dataset
    from planners.fingerprint import fingerprint
    from planners.planner import Overrides, plan_dataset
    from planners.plans import default_configuration
    from planners.preprocess import preprocess_dataset
    from planners.verify import verify_dataset

    patch = None if patch_size is None else tuple(int(n) for n in patch_size)
    overrides = Overrides(target_spacing, patch, memory_gb, schemes)
    loaded = load_dataset(dataset)
    errors = [problem for problem in verify_dataset(loaded.name, workers=workers) if problem.severity == "error"]
    if errors:
        raise DatasetError(
            f"{loaded.name} has {len(errors)} error(s); nothing was planned",
            found=f"{errors[0].kind} in {errors[0].case}: {errors[0].found}" + (", …" if len(errors) > 1 else ""),
            remedy=f"autoseg verify -d {loaded.id} lists them all, each with its remedy",
        )
    pair = plan_dataset(loaded, fingerprint(loaded, workers=workers), overrides, tag=plan_name)
    wanted = list(configurations) if configurations else [default_configuration(pair.full)]
    for configuration in wanted:
        full, cpu = (
            ensure_configuration(loaded.name, plan["plans_name"], configuration) for plan in (pair.full, pair.cpu)
        )
        pair = dataclasses.replace(pair, full=full, cpu=cpu)
    if on_planned is not None:
        on_planned(pair)
    preprocess_dataset(loaded.name, pair.full["plans_name"], wanted, workers=workers)
    return pair


def pretrain(dataset: int | str, *, method: str, root: str | Path | None = None, **options: Any) -> Path:
    """Learn an encoder from a dataset's scans without their labels; options as in `pretrain.loop.pretrain`.

    Returns the folder of the encoder.
    """
    paths.configure(root)
    paths.resolve_dataset(dataset)
    from pretrain.catalog import entry

    entry(method)
    import_quickly(TRAINER, FABRIC)
    from pretrain.loop import pretrain as run

    return run(dataset, method=method, **{**options, "init": _local(options.get("init"))})


def train(dataset: int | str, *, root: str | Path | None = None, **options: Any) -> list[Path]:
    """Train folds of a segmentation model; options as in `trainers.train.train`. Returns the folders of the folds."""
    paths.configure(root)
    paths.resolve_dataset(dataset)
    import_quickly(TRAINER)
    from trainers.train import train as run

    return run(dataset, **{**options, "pretrained": _local(options.get("pretrained"))})


def inspect_weights(
    source: str | Path,
    dataset: int | str | None = None,
    *,
    plan: str | None = None,
    configuration: str | None = None,
    device: str | None = None,
    root: str | Path | None = None,
) -> tuple[Weights, Fit | None]:
    """What a file or folder of weights is and, with a dataset, what would load into its plan. Nothing is written."""
    paths.configure(root)
    name = None if dataset is None else paths.resolve_dataset(dataset)
    from pretrain.importers.reading import read_weights

    weights = read_weights(Path(_local(source) or source))
    if name is None:
        return weights, None
    from planners.dataset import load_dataset
    from planners.device import choose_device
    from planners.plans import choose_plan
    from pretrain.fit import IMPORTED_SHARE, fit

    fitted = fit(
        load_dataset(name),
        weights,
        plan_name=choose_plan(name, plan, choose_device(device).type),
        configuration=configuration,
        keep_data=plan is not None,
        minimum_share=IMPORTED_SHARE,
    )
    return weights, fitted


def predict(
    inputs: str | Path, output: str | Path, *, root: str | Path | None = None, **options: Any
) -> PredictionSummary:
    """Segment a folder of scans or one scan; options as in `trainers.predict.predict`."""
    paths.configure(root)
    if not Path(inputs).exists():
        raise DatasetError(
            "No such scan or folder", where=inputs, remedy="give a folder of scans, or one scan, with -i"
        )
    import_quickly(PREDICTOR)
    from trainers.predict import predict as run

    return run(Path(inputs), Path(output), **options)


def evaluate(
    predictions: str | Path,
    references: str | Path,
    dataset: int | str,
    *,
    tolerance_mm: float = 1.0,
    workers: int | None = None,
    root: str | Path | None = None,
) -> Evaluation:
    """Dice, NSD and HD95 per case and structure; writes metrics.csv and metrics.json beside the predictions."""
    paths.configure(root)
    paths.resolve_dataset(dataset)
    from autoseg.evaluation import evaluate as run

    return run(Path(predictions), Path(references), dataset, tolerance_mm=tolerance_mm, workers=workers)


def export(
    dataset: int | str | None = None,
    *,
    output: str | Path | None = None,
    format: str = "autoseg",
    overwrite: bool = False,
    root: str | Path | None = None,
    **choice: Any,
) -> Path:
    """Write a trained model or an encoder into one file to share; options as in `autoseg.share.export`."""
    paths.configure(root)
    if dataset is not None:
        paths.resolve_dataset(dataset)
    from autoseg.share import export as run

    return run(dataset, output=output, format=format, overwrite=overwrite, **choice)


def import_(
    archive: str | Path,
    dataset: int | str | None = None,
    *,
    name: str | None = None,
    root: str | Path | None = None,
) -> Path:
    """Install what `export` wrote, after checking all of it; options as in `autoseg.install.import_`.

    The command is `autoseg import`; Python keeps that word for itself.
    """
    paths.configure(root)
    from autoseg.install import import_ as run

    return run(archive, dataset, name=name)


def push(
    to: str, dataset: int | str | None = None, *, public: bool = False, root: str | Path | None = None, **choice: Any
) -> str:
    """Upload a trained model or an encoder to the Hugging Face Hub; options as in `autoseg.hub.push`."""
    paths.configure(root)
    from autoseg.hub_address import parse_address

    parse_address(to)  # before anything heavy is imported, here and in `pull`
    if dataset is not None:
        paths.resolve_dataset(dataset)
    from autoseg.hub import push as run

    return run(to, dataset, public=public, **choice)


def pull(
    source: str,
    dataset: int | str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    root: str | Path | None = None,
) -> Path:
    """Install a model or an encoder from the Hugging Face Hub; options as in `autoseg.hub.pull`."""
    paths.configure(root)
    from autoseg.hub_address import parse_address

    parse_address(source)
    from autoseg.hub import pull as run

    return run(source, dataset, name=name, revision=revision)


def compare(
    dataset: int | str, *, methods: str, root: str | Path | None = None, **options: Any
) -> Comparison | Forecast:
    """Find out which pretraining helps on a dataset; options as in `autoseg.comparison.run.compare`."""
    paths.configure(root)
    paths.resolve_dataset(dataset)
    from autoseg.comparison.arms import parse_arms

    parse_arms(methods, "")  # a misspelt method is told before anything heavy is imported
    from autoseg.comparison.run import compare as run

    return run(dataset, methods=methods, **options)


def demo(root: str | Path = "autoseg_demo") -> Path:
    """The main job on phantoms, offline: plan, pretrain, train, predict, evaluate. Returns the overlay picture."""
    from autoseg.demonstration import run_demo

    return run_demo(Path(root))


def methods() -> tuple[str, ...]:
    """Names of the pretraining methods."""
    from pretrain.catalog import METHODS

    return tuple(METHODS)


def _local(weights: str | Path | None) -> str | Path | None:
    """`hf:owner/repo` as the local path it was downloaded to; anything else as it is."""
    if not str(weights).startswith("hf:"):
        return weights
    from autoseg.hub import fetch

    return fetch(str(weights))


def _triple(spacing: Sequence[float]) -> tuple[float, float, float]:
    values = tuple(float(s) for s in spacing)
    if len(values) != 3 or min(values) <= 0:
        raise SettingsError("A target spacing is three positive lengths in mm", found=values, expected="Z,Y,X")
    return values


def _gpu_memory(asked: float | str) -> float:
    if asked == "auto":
        import torch

        if not torch.cuda.is_available():
            raise SettingsError("--gpu-memory auto needs a GPU", remedy="give the target's memory: --gpu-memory 8")
        return min(24.0, torch.cuda.get_device_properties(0).total_memory / 2**30)
    try:
        memory = float(asked)
    except ValueError:
        memory = 0.0
    if not 1 <= memory <= 1000:
        raise SettingsError("Not a memory size", found=asked, expected="gigabytes, or auto", remedy="--gpu-memory 8")
    return memory
