"""The command line. Options only; what a command does stands in `autoseg.commands`, imported when it runs.

Annotations are evaluated where they stand, here and in the other modules of commands: typer would evaluate all their texts
anew at each start, which takes a sixth of the time of `--help`.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from autoseg import cli_convert, cli_sharing
from autoseg.cli_options import (
    Configuration,
    DatasetOption,
    Debug,
    Device,
    ModelFolder,
    Overwrite,
    Plan,
    Root,
    Settings,
    ShowConfig,
    Workers,
    begin,
    folds,
    numbers,
    settings_given,
)
from pretrain.catalog import METHODS

app = typer.Typer(
    name="autoseg",
    help="Medical image segmentation that configures itself and pretrains on your unlabelled scans.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: loading rich for its frames would take a third of the time
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_convert.app, name="convert")
app.add_typer(cli_sharing.app)


@app.command("verify")
def verify(dataset: DatasetOption, workers: Workers = None, root: Root = None, debug: Debug = False) -> None:
    """Find every problem of a dataset and say how to mend each."""
    begin(root)
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
    begin(root)
    from autoseg import commands, console

    commands.plan_and_preprocess(
        dataset,
        configurations=configuration,
        spacing=numbers(spacing, "--spacing", float),
        patch_size=numbers(patch_size, "--patch-size", int),
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
    begin(root)
    from autoseg import commands
    from planners.files import read_json

    home, *others = dataset
    folder = commands.pretrain(
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
        settings=settings_given(settings),
        seed=seed,
        device=device,
        workers=workers,
        overwrite=overwrite,
        root=root,
    )
    # Stages that leave the encoder as new have said how to go on.
    if not show_config and read_json(folder / "encoder.json").get("trained", True):
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
    begin(root)
    from autoseg import commands

    given = {"epochs": epochs, "iterations": iterations, "max_minutes": max_minutes, "lr": lr}
    commands.train(
        dataset,
        plan=plan,
        configuration=configuration,
        folds=folds(fold),
        pretrained=pretrained,
        run=run,
        settings={**settings_given(settings, prefix="train."), **{k: v for k, v in given.items() if v is not None}},
        allow_partial=allow_partial,
        show_config=show_config,
        dry_run=dry_run,
        on_dry_run=_show_job if dry_run else None,
        device=device,
        overwrite=overwrite,
        root=root,
    )


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
    precision: Annotated[
        str, typer.Option("--precision", help="Of the network on a CPU: float32, or bfloat16 (faster, nearly equal).")
    ] = "float32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the network first: pays for many scans; needs a C++ compiler.")
    ] = False,
    device: Device = None,
    overwrite: Overwrite = False,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Segment a folder of scans, on the scans' own grid."""
    begin(root)
    from autoseg import commands

    commands.predict(
        inputs,
        output,
        dataset=dataset,
        model_folder=model_folder,
        plan=plan,
        configuration=configuration,
        run=run,
        folds=None if fold is None else folds(fold),
        mirroring=mirroring,
        step_size=step_size,
        save_probabilities=probabilities,
        precision=precision,
        compiled=compiled,
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
    begin(root)
    from autoseg import commands

    result = commands.evaluate(predictions, references, dataset, tolerance_mm=tolerance_mm, workers=workers, root=root)
    from autoseg.evaluation import print_evaluation

    print_evaluation(result)


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
    begin(root)
    from autoseg import commands

    given = {"epochs": epochs, "iterations": iterations}
    result: Any = commands.compare(
        dataset,
        methods=methods,
        label_fractions=numbers(fractions, "--label-fractions", float),
        folds=numbers(folds, "--folds", int),
        seeds=numbers(seeds, "--seeds", int),
        settings={**settings_given(settings, prefix="train."), **{k: v for k, v in given.items() if v is not None}},
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
    begin(root)
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
        from importlib.metadata import version as installed_version

        print(installed_version("autoseg"))
        raise typer.Exit


def _show_job(job: Any, report: Any) -> None:
    """What `train --dry-run` shows beside the settings."""
    from autoseg import console

    if job.fit is not None:
        console.print_fit(job.fit)
    elif report is not None:
        console.print_transfer(report)
    print("Nothing was written; leave --dry-run out to train.")
