"""Models and encoders into a results folder: checked as a whole, written beside their place, then renamed onto it."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoseg import archive, contents
from planners.errors import SettingsError
from planners.files import copy_file, write_json
from planners.paths import dataset_id, existing_datasets, new_dataset_name, resolve_dataset, results
from planners.run_names import check_run_name
from pretrain.checkpoint import CARD_NAME, WEIGHTS_NAME, EncoderCard, encoder_folder
from trainers.checkpoint import save_checkpoint
from trainers.runs import FINAL, SCRATCH, describe

logger = logging.getLogger("autoseg")

ORIGIN = "origin.json"
"""Where an installed model or encoder came from: the archive's name and hash, or the repository and its commit."""


def import_(path: str | Path, dataset: int | str | None = None, *, name: str | None = None) -> Path:
    """Install an archive that `export` wrote; returns the folder of the model or encoder. Nothing is overwritten.

    Args:
        dataset: where to, as an id or a name; default: the dataset it was made from, whether or not its scans are here.
        name: another name for the run or the encoder, where its own is taken.

    Raises UnsafeFile, DatasetError, PlanError or PretrainedMismatch for what cannot be trusted or used, before anything
    is written to the data root; SettingsError when its place is taken.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="autoseg-") as temporary:
        folder = Path(temporary) / path.name  # messages name files by where they are unpacked
        manifest = archive.unpack(path, folder)
        origin = {"archive": path.name, "sha256": archive.sha256_of(path)}
        return install(folder, manifest, origin, dataset, name=name)


def install(
    folder: Path, manifest: archive.Manifest, origin: dict[str, str], dataset: int | str | None, *, name: str | None
) -> Path:
    """Check the meaning of an unpacked archive and put it in its place."""
    if name is not None:
        check_run_name(name)
    if manifest.kind == "model":
        return _install_model(folder, contents.read_model(folder, manifest), origin, dataset, name)
    return _install_encoder(folder, manifest, contents.read_encoder(folder, manifest), origin, dataset, name)


def write_model_folder(source: Path, model: contents.Model, target: Path) -> None:
    """A model folder as nnU-Net has it, from the checked files of an archive."""
    target.mkdir(parents=True)
    write_json(target / contents.PLAN, model.plan)
    write_json(target / contents.DATASET, model.dataset_json)
    for extra in (archive.CARD, "transfer.json"):
        if (source / extra).is_file():
            copy_file(source / extra, target / extra)
    network = contents.network_of(model.plan, model.configuration, model.dataset_json)
    shortest = contents.shared_names(network)
    for name, fold in model.folds.items():
        tensors = contents.read_tensors(source / f"fold_{name}" / contents.FOLD_WEIGHTS, network)
        folder = target / f"fold_{name}"
        checkpoint: dict[str, Any] = {
            "network_weights": {alias: tensors[shortest[alias]] for alias in shortest},
            "trainer_name": fold.trainer_name,
            "init_args": {"configuration": fold.configuration, "fold": int(name) if name.isdigit() else name},
            "inference_allowed_mirroring_axes": fold.mirroring_axes and tuple(fold.mirroring_axes),
            "current_epoch": fold.epochs,
        }
        if fold.autoseg_trainer is not None:
            checkpoint["autoseg"] = {"trainer_name": fold.autoseg_trainer}
        save_checkpoint(folder / FINAL, checkpoint)
        copy_file(source / f"fold_{name}" / contents.FOLD, folder / contents.FOLD)
        if fold.validation is not None:
            numbers = {"foreground_mean": fold.validation.foreground_mean, "mean": fold.validation.mean}
            write_json(folder / "validation" / "summary.json", {**numbers, "metric_per_case": []})


def _install_model(
    source: Path, model: contents.Model, origin: dict[str, str], dataset: int | str | None, name: str | None
) -> Path:
    dataset_name = _home(model.plan["dataset_name"], dataset)
    model.plan["dataset_name"] = dataset_name
    if name is not None:
        if model.trainer.startswith("nnUNet"):
            raise SettingsError("A model of stock nnU-Net has no run that could be renamed", found=f"--as {name}")
        model.plan.setdefault("autoseg", {}).setdefault("train", {})["run"] = None if name == SCRATCH else name
    target = results(dataset_name) / model.folder_name
    with _placed(target) as temporary:
        write_model_folder(source, model, temporary)
        write_json(temporary / ORIGIN, origin)
    logger.info("Installed the model %s: fold %s", target, ", ".join(model.folds))
    ours = model.trainer.startswith("Autoseg")
    chosen = f"-d {dataset_id(dataset_name)} {describe(target)}" if ours else f"-m {target}"
    logger.info("Next: autoseg predict -i SCANS -o MASKS %s", chosen)
    return target


def _install_encoder(
    source: Path,
    manifest: archive.Manifest,
    card: EncoderCard,
    origin: dict[str, str],
    dataset: int | str | None,
    name: str | None,
) -> Path:
    dataset_name = _home(card.dataset, dataset)
    name = name or manifest.name
    target = encoder_folder(dataset_name, card.plan_name, card.configuration, name)
    with _placed(target) as temporary:
        temporary.mkdir(parents=True)
        for file in (WEIGHTS_NAME, CARD_NAME, contents.PLAN, archive.CARD):
            if (source / file).is_file():
                copy_file(source / file, temporary / file)
        write_json(temporary / ORIGIN, origin)
    logger.info("Installed the encoder %s", target)
    logger.info("Next: autoseg train -d %s --pretrained %s", dataset_id(dataset_name), name)
    return target


def _home(own: str, asked: int | str | None) -> str:
    """The dataset to install for: the one it was made from, or the one asked for."""
    known = existing_datasets()
    if asked is not None:
        identifier = str(asked)
        if identifier in known or not identifier.isdigit():
            return resolve_dataset(asked)
        if any(dataset_id(name) == int(identifier) for name in known):
            return resolve_dataset(asked)
        return new_dataset_name(int(identifier), own.partition("_")[2])
    taken = [name for name in known if dataset_id(name) == dataset_id(own) and name != own]
    if own not in known and taken:
        free = next(i for i in range(1, 1000) if i not in {dataset_id(name) for name in known})
        raise SettingsError(
            f"The id {dataset_id(own)} is another dataset here",
            found=taken[0],
            expected=own,
            remedy=f"-d {taken[0]} installs it for that one, -d {free} beside it as "
            f"{new_dataset_name(free, own.partition('_')[2])}",
        )
    return own


@contextmanager
def _placed(target: Path) -> Iterator[Path]:
    """A folder to write to, renamed onto `target` when the block ends well, removed otherwise."""
    if target.exists():
        there = sorted(path.name for path in target.iterdir())
        raise SettingsError(
            "Something of that name is installed already; it is kept",
            where=target,
            found=", ".join(there[:6]) or "an empty folder",
            remedy="give this one another name with --as NAME, or remove the folder",
        )
    temporary = target.with_name(f".{os.getpid()}.importing.{target.name}")
    made = _missing_parents(target)
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _missing_parents(target: Path) -> list[Path]:
    return [parent for parent in target.parents if not parent.exists()]
