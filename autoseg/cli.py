"""The command line. Options only; what a command does stands in `autoseg.commands`, imported when it runs."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer

from planners.errors import SettingsError
from pretrain.catalog import METHODS

app = typer.Typer(
    name="autoseg",
    help="Medical image segmentation that configures itself and pretrains on your unlabelled scans.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(help="Turn scans and labels into a dataset.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
weights_app = typer.Typer(help="Look at pretrained weights.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

Root = Annotated[Path | None, typer.Option("--root", help="Data folder; else AUTOSEG_ROOT, else ./autoseg_data.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DatasetOption = Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name: 17 or Dataset017_BTCV.")]
NewId = Annotated[int, typer.Option("-d", "--dataset", help="Id of the dataset to make, 1 to 999.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Processes; default: by cores and free memory.")]
Plan = Annotated[str | None, typer.Option("-p", "--plan", help="Plan; default autosegPlans, without a GPU its _cpu.")]
Configuration = Annotated[
    str | None, typer.Option("-c", "--configuration", help="Configuration of the plan; default 3d_fullres, else 2d.")
]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cpu or mps; default: what the machine has.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again instead of continuing or keeping.")]
ModelFolder = Annotated[Path | None, typer.Option("-m", "--model", help="A model folder instead, stock nnU-Net's too.")]
EncoderOption = Annotated[
    str | None, typer.Option("--encoder", help="An encoder instead of a model: its name with -d, or a path.")
]
SharedDataset = Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset whose model or encoder to share.")]
SharedPlan = Annotated[str | None, typer.Option("-p", "--plan", help="Of this plan only.")]
SharedConfiguration = Annotated[str | None, typer.Option("-c", "--configuration", help="Of this configuration only.")]
SharedRun = Annotated[str | None, typer.Option("--run", help="Models of this run only; scratch: without encoder.")]
SharedFolds = Annotated[str | None, typer.Option("-f", "--fold", help="Folds to share; default: all finished.")]
NewHome = Annotated[
    str | None, typer.Option("-d", "--dataset", help="Dataset to install for; default: the one it was made from.")
]
NewName = Annotated[str | None, typer.Option("--as", help="Another name for the run or encoder.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One more setting, KEY=VALUE; may be repeated.")]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print every setting, its value and who decided it, and stop.")
]


@convert_app.command("msd")
def convert_msd(
    source: Annotated[Path, typer.Argument(help="Folder of a Medical Segmentation Decathlon task.")],
    dataset: NewId,
    name: Annotated[str | None, typer.Option("--name", help="Name of the dataset; default: the task's.")] = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Convert a task of the Medical Segmentation Decathlon."""
    _begin(root)
    from autoseg import commands

    _converted(commands.convert_msd(source, dataset, name=name, root=root), dataset)


@convert_app.command("folder")
def convert_folder(
    dataset: NewId,
    images: Annotated[Path, typer.Option("--images", help="Scans: files by suffix, or one folder per case.")],
    labels: Annotated[Path, typer.Option("--labels", help="Label files, named as their cases.")],
    channels: Annotated[str, typer.Option("--channels", help="Channel names in order: T1c,Flair or CT.")],
    name: Annotated[str, typer.Option("--name", help="Name of the dataset.")] = "Dataset",
    label_set: Annotated[str | None, typer.Option("--label-set", help="Known names and values: btcv.")] = None,
    remap: Annotated[str | None, typer.Option("--remap", help="Stored to new values: 500:1,600:2.")] = None,
    unlabelled: Annotated[
        Path | None, typer.Option("--unlabelled", help="More scans of the same kind, for pretraining.")
    ] = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Convert folders of NIfTI, NRRD or MHA files."""
    _begin(root)
    from autoseg import commands

    folder = commands.convert_folder(
        images,
        labels,
        dataset,
        name=name,
        channels=[c.strip() for c in channels.split(",") if c.strip()],
        label_set=label_set,
        remap=_remap(remap),
        unlabelled=unlabelled,
        root=root,
    )
    _converted(folder, dataset)


@app.command("verify")
def verify(dataset: DatasetOption, workers: Workers = None, root: Root = None, debug: Debug = False) -> None:
    """Find every problem of a dataset and say how to mend each."""
    _begin(root)
    from autoseg import commands, console

    problems = commands.verify(dataset, workers=workers, root=root)
    console.print_problems(dataset, problems)
    if any(problem.severity == "error" for problem in problems):
        raise typer.Exit(2)
    print(f"Next: autoseg plan_and_preprocess -d {dataset}")


@app.command("plan_and_preprocess")
def plan_and_preprocess(
    dataset: DatasetOption,
    configuration: Annotated[
        list[str] | None, typer.Option("-c", "--configuration", help="What to preprocess; may be repeated.")
    ] = None,
    spacing: Annotated[str | None, typer.Option("--spacing", help="Target spacing in mm: Z,Y,X.")] = None,
    patch_size: Annotated[str | None, typer.Option("--patch-size", help="Patch in voxels: Z,Y,X, for 2d Y,X.")] = None,
    gpu_memory: Annotated[str, typer.Option("--gpu-memory", help="GB the full plan may use, or auto.")] = "8",
    intensity: Annotated[
        str | None, typer.Option("--intensity", help="Schemes, one a channel: ct-abdomen, zscore, ct:-100,300, …")
    ] = None,
    plan_name: Annotated[str | None, typer.Option("--plan-name", help="Tag of another pair of plans.")] = None,
    workers: Workers = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Look at the data, decide spacing, patch, intensities and network, and preprocess."""
    _begin(root)
    from autoseg import commands, console

    commands.plan_and_preprocess(
        dataset,
        configurations=configuration,
        spacing=_numbers(spacing, "--spacing", float),
        patch_size=_numbers(patch_size, "--patch-size", int),
        gpu_memory_gb=gpu_memory,
        intensity=intensity.split() if intensity else None,
        plan_name=plan_name,
        workers=workers,
        on_planned=console.print_plans,
        root=root,
    )
    print(f"Next: autoseg pretrain -d {dataset} --method voco   or   autoseg train -d {dataset}")


@app.command("pretrain")
def pretrain(
    dataset: Annotated[
        list[str], typer.Option("-d", "--dataset", help="Dataset; repeated: the first is home, the others add scans.")
    ],
    method: Annotated[str, typer.Option("--method", help=f"One of: {', '.join(METHODS)}.")],
    plan: Plan = None,
    configuration: Configuration = None,
    run: Annotated[str | None, typer.Option("--run", help="Name of this run, to keep several.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="cpu or default; default: by device.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps instead of the preset's.")] = None,
    stages: Annotated[str | None, typer.Option("--stages", help="Stages to run, e.g. 1,2; default: all.")] = None,
    init: Annotated[
        str | None, typer.Option("--init", help="Start from these weights: as --pretrained of train.")
    ] = None,
    images: Annotated[Path | None, typer.Option("--images", help="A folder of more scans.")] = None,
    exclude_fold: Annotated[
        int | None, typer.Option("--exclude-fold", help="Leave out this fold's validation cases.")
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Take an --init whose pretraining is not finished.")
    ] = False,
    settings: Settings = None,
    show_config: ShowConfig = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides views and initial weights; default 0.")] = None,
    device: Device = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Learn an encoder from the scans alone."""
    _begin(root)
    from autoseg import commands

    home, *others = dataset
    commands.pretrain(
        home,
        method=method,
        more_datasets=tuple(others),
        plan=plan,
        configuration=configuration,
        run=run,
        preset=preset,
        steps=steps,
        stages=stages,
        init=init,
        images=images,
        exclude_fold=exclude_fold,
        allow_partial=allow_partial,
        show_config=show_config,
        settings=_settings(settings),
        seed=seed,
        device=device,
        workers=workers,
        overwrite=overwrite,
        root=root,
    )
    if not show_config:
        print(f"Next: autoseg train -d {home} --pretrained {method + '-' + run if run else method}")


@app.command("train")
def train(
    dataset: DatasetOption,
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--pretrained", help="A method's name (this dataset's encoder), a file or folder, or hf:owner/repo."
        ),
    ] = None,
    plan: Plan = None,
    configuration: Configuration = None,
    fold: Annotated[str, typer.Option("-f", "--fold", help="0, several as 0,1,2, or all.")] = "0",
    run: Annotated[str | None, typer.Option("--run", help="Name of this run; default: the encoder's name.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs; the schedule ends with them.")] = None,
    iterations: Annotated[int | None, typer.Option("--iterations", help="Training iterations an epoch.")] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help="Stop training after so long.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Initial learning rate.")] = None,
    settings: Settings = None,
    allow_partial: Annotated[
        bool,
        typer.Option("--allow-partial", help="Take unfinished encoders, and weights that fill only a part of one."),
    ] = False,
    show_config: ShowConfig = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the settings and what becomes of every pretrained tensor, and stop.")
    ] = False,
    device: Device = None,
    overwrite: Overwrite = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Train a segmentation model, from scratch or from an encoder."""
    _begin(root)
    from autoseg import commands

    given = {"epochs": epochs, "iterations": iterations, "max_minutes": max_minutes, "lr": lr}
    commands.train(
        dataset,
        plan=plan,
        configuration=configuration,
        folds=_folds(fold),
        pretrained=pretrained,
        run=run,
        settings={**_settings(settings, prefix="train."), **{k: v for k, v in given.items() if v is not None}},
        allow_partial=allow_partial,
        show_config=show_config,
        dry_run=dry_run,
        on_dry_run=_show_job if dry_run else None,
        device=device,
        overwrite=overwrite,
        root=root,
    )


@weights_app.command("inspect")
def weights_inspect(
    source: Annotated[str, typer.Argument(help="A file or folder of weights, or hf:owner/repo.")],
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Say what would load into its plan.")] = None,
    plan: Plan = None,
    configuration: Configuration = None,
    device: Device = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Say what a file of weights is, and what of it would load into a dataset's plan."""
    _begin(root)
    from autoseg import commands, console

    weights, fitted = commands.inspect_weights(
        source, dataset, plan=plan, configuration=configuration, device=device, root=root
    )
    console.print_weights(weights)
    if fitted is not None:
        console.print_fit(fitted, every_tensor=False)
        print(f"Next: autoseg train -d {dataset} --pretrained {source}   (--dry-run lists every tensor)")


@app.command("predict")
def predict(
    inputs: Annotated[Path, typer.Option("-i", "--input", help="A folder of scans, or one scan.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the masks.")],
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset whose model to use.")] = None,
    model_folder: ModelFolder = None,
    plan: Annotated[str | None, typer.Option("-p", "--plan", help="Models of this plan only.")] = None,
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="Models of this configuration only.")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Models of this run only; scratch: without encoder.")] = None,
    fold: Annotated[str | None, typer.Option("-f", "--fold", help="Folds to average; default: all finished.")] = None,
    mirroring: Annotated[bool, typer.Option("--mirroring/--no-mirroring", help="Average over mirrored views.")] = True,
    step_size: Annotated[float, typer.Option("--step-size", help="Step of the window as share of the patch.")] = 0.5,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Save probabilities (.npz) too.")] = False,
    device: Device = None,
    overwrite: Overwrite = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Segment a folder of scans, on the scans' own grid."""
    _begin(root)
    from autoseg import commands

    commands.predict(
        inputs,
        output,
        dataset=dataset,
        model_folder=model_folder,
        plan=plan,
        configuration=configuration,
        run=run,
        folds=None if fold is None else _folds(fold),
        mirroring=mirroring,
        step_size=step_size,
        save_probabilities=probabilities,
        device=device,
        overwrite=overwrite,
        root=root,
    )
    if dataset is not None:
        print(f"Next: autoseg evaluate -i {output} -r REFERENCES -d {dataset}")


@app.command("evaluate")
def evaluate(
    predictions: Annotated[Path, typer.Option("-i", "--input", help="Folder of predicted masks.")],
    references: Annotated[Path, typer.Option("-r", "--reference", help="Folder of reference masks.")],
    dataset: DatasetOption,
    tolerance_mm: Annotated[float, typer.Option("--tolerance-mm", help="Tolerance of NSD in mm.")] = 1.0,
    workers: Workers = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Dice, NSD and HD95 per case and structure."""
    _begin(root)
    from autoseg import commands
    from autoseg.evaluate import print_evaluation

    result = commands.evaluate(predictions, references, dataset, tolerance_mm=tolerance_mm, workers=workers, root=root)
    print_evaluation(result)


@app.command("export")
def export(
    dataset: SharedDataset = None,
    plan: SharedPlan = None,
    configuration: SharedConfiguration = None,
    run: SharedRun = None,
    fold: SharedFolds = None,
    model_folder: ModelFolder = None,
    encoder: EncoderOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file; default: named by what it is.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="autoseg, nnunet (stock nnU-Net reads it) or nnssl (encoders).")
    ] = "autoseg",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Write a trained model or an encoder into one file to share, without case names and paths."""
    _begin(root)
    from autoseg import commands

    file = commands.export(
        dataset,
        plan=plan,
        configuration=configuration,
        run=run,
        folds=None if fold is None else _folds(fold),
        model_folder=model_folder,
        encoder=encoder,
        output=output,
        format=format,
        overwrite=overwrite,
        root=root,
    )
    if format == "autoseg":
        print(f"Next, where it is wanted: autoseg import {file}")


@app.command("import")
def import_(
    archive: Annotated[Path, typer.Argument(help="The zip that `autoseg export` wrote.")],
    dataset: NewHome = None,
    name: NewName = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Install a shared model or encoder, after checking all of it. Nothing is overwritten."""
    _begin(root)
    from autoseg import commands

    commands.import_(archive, dataset, name=name, root=root)


@app.command("push")
def push(
    to: Annotated[str, typer.Argument(help="hf:OWNER/REPO on the Hugging Face Hub; made if it does not exist.")],
    dataset: SharedDataset = None,
    plan: SharedPlan = None,
    configuration: SharedConfiguration = None,
    run: SharedRun = None,
    fold: SharedFolds = None,
    model_folder: ModelFolder = None,
    encoder: EncoderOption = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Upload a trained model or an encoder to the Hugging Face Hub: the files of an export, nothing else."""
    _begin(root)
    from autoseg import commands

    commands.push(
        to,
        dataset,
        plan=plan,
        configuration=configuration,
        run=run,
        folds=None if fold is None else _folds(fold),
        model_folder=model_folder,
        encoder=encoder,
        public=public,
        root=root,
    )


@app.command("pull")
def pull(
    source: Annotated[str, typer.Argument(help="hf:OWNER/REPO or hf:OWNER/REPO@REVISION.")],
    dataset: NewHome = None,
    name: NewName = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch; default: newest.")] = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Install a model or an encoder from the Hugging Face Hub, after checking all of it."""
    _begin(root)
    from autoseg import commands

    commands.pull(source, dataset, name=name, revision=revision, root=root)


@app.command("compare")
def compare(
    dataset: DatasetOption,
    methods: Annotated[
        str,
        typer.Option("--methods", help="Arms: scratch,voco,rotation@2d,meddinov3[stages=1]; @ names a configuration."),
    ],
    fractions: Annotated[
        str, typer.Option("--label-fractions", help="Shares of the training cases; small ones lie in large ones.")
    ] = "0.1,0.25,1",
    folds: Annotated[str, typer.Option("-f", "--folds", help="Folds to hold out, one after the other.")] = "0",
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds; several show the chance of training.")] = "0",
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of every training.")] = None,
    iterations: Annotated[int | None, typer.Option("--iterations", help="Training iterations an epoch.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Pretraining steps of every method.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="cpu or default; default: by device.")] = None,
    plan: Plan = None,
    configuration: Configuration = None,
    run: Annotated[str | None, typer.Option("--run", help="Name of this comparison, to keep several.")] = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Forecast hours and disk, and stop.")] = False,
    device: Device = None,
    workers: Workers = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Compare pretraining methods with training from scratch, at equal budget."""
    _begin(root)
    from autoseg import commands

    given = {"epochs": epochs, "iterations": iterations}
    result: Any = commands.compare(
        dataset,
        methods=methods,
        label_fractions=_numbers(fractions, "--label-fractions", float),
        folds=_numbers(folds, "--folds", int),
        seeds=_numbers(seeds, "--seeds", int),
        settings={**_settings(settings, prefix="train."), **{k: v for k, v in given.items() if v is not None}},
        steps=steps,
        preset=preset,
        plan=plan,
        configuration=configuration,
        run=run,
        dry_run=dry_run,
        device=device,
        workers=workers,
        root=root,
    )
    from autoseg import console

    if dry_run:
        console.print_forecast(result)
        return
    console.print_comparison(result)
    if result.failures:
        raise typer.Exit(1)


@app.command("demo")
def demo(
    root: Annotated[Path, typer.Option("--root", help="Where to work.")] = Path("autoseg_demo"), debug: Debug = False
) -> None:
    """The whole path on phantoms, offline, in minutes."""
    _begin(root)
    from autoseg import commands

    commands.demo(root)


@app.command("methods")
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to list its settings.")] = None, debug: Debug = False
) -> None:
    """List the pretraining methods, or the settings of one."""
    from autoseg import console

    console.print_methods(name)


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(installed_version("autoseg"))
        raise typer.Exit


def _begin(root: Path | None) -> None:
    """Choose and print the data root, and let the packages' messages through to the screen."""
    from planners import paths

    logger = logging.getLogger("autoseg")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    print(f"Data: {paths.configure(root)}")


def _show_job(job: Any, report: Any) -> None:
    """What `train --dry-run` shows beside the settings."""
    from autoseg import console

    if job.fit is not None:
        console.print_fit(job.fit)
    elif report is not None:
        console.print_transfer(report)
    print("Nothing was written; leave --dry-run out to train.")


def _converted(folder: Path, dataset: int) -> None:
    from planners.dataset import load_dataset

    written = load_dataset(folder.name)
    unlabelled = f", {len(written.unlabelled)} unlabelled" if written.unlabelled else ""
    print(f"Wrote {folder}: {len(written.cases)} labelled cases{unlabelled}")
    print(f"Next: autoseg verify -d {dataset}")


def _numbers(text: str | None, option: str, kind: type) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} takes numbers separated by commas", found=text, expected="1 or 3,1,1") from None


def _folds(text: str) -> tuple[int | str, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "all" or part.isdigit() for part in parts):
        raise SettingsError("-f takes folds", found=text, expected="0, or 0,1,2, or all")
    return tuple(part if part == "all" else int(part) for part in parts)


def _remap(text: str | None) -> dict[int, int] | None:
    if text is None:
        return None
    try:
        return {int(old): int(new) for old, new in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        raise SettingsError("--remap takes pairs of label values", found=text, expected="500:1,600:2") from None


def _settings(texts: list[str] | None, prefix: str = "") -> dict[str, str]:
    settings: dict[str, str] = {}
    for text in texts or []:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise SettingsError("--set takes KEY=VALUE", found=text)
        if prefix and not key.startswith(prefix):
            raise SettingsError("Not a setting of this command", found=key, expected=f"{prefix}NAME=VALUE")
        settings[key.removeprefix(prefix)] = value
    return settings
