"""`autoseg weights`, `export`, `import`, `push`, `pull`: weights that come from others or go to them."""

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli_options import Configuration, Debug, Device, ModelFolder, Plan, Root, begin, folds

app = typer.Typer()
weights_app = typer.Typer(help="Look at pretrained weights.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")

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
    begin(root)
    from autoseg import commands, console

    weights, fitted = commands.inspect_weights(
        source, dataset, plan=plan, configuration=configuration, device=device, root=root
    )
    console.print_weights(weights)
    if fitted is not None:
        console.print_fit(fitted, every_tensor=False)
        print(f"Next: autoseg train -d {dataset} --pretrained {source}   (--dry-run lists every tensor)")


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
    begin(root)
    from autoseg import commands

    file = commands.export(
        dataset,
        plan=plan,
        configuration=configuration,
        run=run,
        folds=None if fold is None else folds(fold),
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
    begin(root)
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
    begin(root)
    from autoseg import commands

    commands.push(
        to,
        dataset,
        plan=plan,
        configuration=configuration,
        run=run,
        folds=None if fold is None else folds(fold),
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
    begin(root)
    from autoseg import commands

    commands.pull(source, dataset, name=name, revision=revision, root=root)
