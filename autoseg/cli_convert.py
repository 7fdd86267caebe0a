"""`autoseg convert`: scans and labels into a dataset."""

from pathlib import Path
from typing import Annotated

import typer

from autoseg.cli_options import Debug, Root, begin
from planners.errors import SettingsError

app = typer.Typer(help="Turn scans and labels into a dataset.", no_args_is_help=True)

NewId = Annotated[int, typer.Option("-d", "--dataset", help="Id of the dataset to make, 1 to 999.")]


@app.command("msd")
def convert_msd(
    source: Annotated[Path, typer.Argument(help="Folder of a Medical Segmentation Decathlon task.")],
    dataset: NewId,
    name: Annotated[str | None, typer.Option("--name", help="Name of the dataset; default: the task's.")] = None,
    root: Root = None,
    debug: Debug = False,
) -> None:
    """Convert a task of the Medical Segmentation Decathlon."""
    begin(root)
    from autoseg import commands

    _converted(commands.convert_msd(source, dataset, name=name, root=root), dataset)


@app.command("folder")
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
    begin(root)
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


def _converted(folder: Path, dataset: int) -> None:
    from planners.dataset import load_dataset

    written = load_dataset(folder.name)
    unlabelled = f", {len(written.unlabelled)} unlabelled" if written.unlabelled else ""
    print(f"Wrote {folder}: {len(written.cases)} labelled cases{unlabelled}")
    print(f"Next: autoseg verify -d {dataset}")


def _remap(text: str | None) -> dict[int, int] | None:
    if text is None:
        return None
    try:
        return {int(old): int(new) for old, new in (pair.split(":") for pair in text.split(","))}
    except ValueError:
        raise SettingsError("--remap takes pairs of label values", found=text, expected="500:1,600:2") from None
