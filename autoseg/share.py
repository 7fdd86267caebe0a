"""Models and encoders out of a results folder: what is shared of them, and nothing else.

What leaves the machine is chosen, not filtered: weights as safetensors, the plan, the known keys of dataset.json, numbers
of the fold validation, a card. Case ids become salted hashes (`pretrain.checkpoint.hidden_case`); paths, pickles and
preprocessed data have no place. Every export is checked as an import would check it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from autoseg import archive, contents
from autoseg.model_card import encoder_card_text, model_card_text
from planners.errors import AutosegError, DatasetError, PlanError, SettingsError
from planners.files import read_json, write_json
from planners.paths import resolve_dataset, results
from planners.plans import folds as splits
from planners.plans import load_plan, plan_hash
from pretrain.checkpoint import (
    CARD_NAME,
    WEIGHTS_NAME,
    EncoderCard,
    find_encoders,
    hidden_case,
    load_encoder,
    refuse_unfinished,
    refuse_untrained,
    seen_cases,
)
from trainers.checkpoint import load_checkpoint
from trainers.runs import FINAL, SCRATCH, choose_model, finished_folds, options_of

logger = logging.getLogger("autoseg")

FORMATS = ("autoseg", "nnunet", "nnssl")
_DATASET_KEYS = (
    "name", "description", "reference", "licence", "license", "release", "citation", "channel_names", "modality",
    "labels", "regions_class_order", "numTraining", "file_ending", "overwrite_image_reader_writer",
)  # fmt: skip
_PLACE = re.compile(
    r"""(?:^|[\s'"=(])(?:/(?:home|Users|root|mnt|data|tmp|media|scratch|work|srv|var|opt)/|[A-Za-z]:\\|~/|file://)"""
)


@dataclass(frozen=True)
class Chosen:
    """What an export or a push is about."""

    folder: Path
    kind: str
    """`model` or `encoder`."""
    folds: tuple[int | str, ...] = ()


def choose(
    dataset: int | str | None,
    *,
    plan: str | None = None,
    configuration: str | None = None,
    run: str | None = None,
    folds: Sequence[int | str] | None = None,
    model_folder: str | Path | None = None,
    encoder: str | Path | None = None,
) -> Chosen:
    """The model (found as `predict` finds it) or the encoder (`encoder`: a name of this dataset's, or a path) meant."""
    if encoder is not None:
        if model_folder is not None or run is not None or folds is not None:
            raise SettingsError("An encoder has no run and no folds", remedy="give --encoder, or -m, --run, -f")
        return Chosen(_encoder_folder(dataset, str(encoder), plan, configuration), "encoder")
    if model_folder is not None:
        folder = Path(model_folder)
    elif dataset is None:
        raise SettingsError("Nothing to share", expected="-d DATASET, -m FOLDER, or -d DATASET --encoder NAME")
    else:
        folder = choose_model(resolve_dataset(dataset), plan, configuration, run, folds)
    found = finished_folds(folder)
    missing = [f"fold_{fold}/{FINAL}" for fold in folds or () if fold not in found]
    missing += [name for name in (contents.PLAN, contents.DATASET) if not (folder / name).is_file()]
    if missing or not found:
        raise DatasetError(
            "Not a model folder with a finished training",
            where=folder,
            found=f"no {', no '.join(missing)}" if missing else f"no fold with a {FINAL}",
        )
    return Chosen(folder, "model", tuple(folds or [f for f in found if f != "all"] or found))


def export(
    dataset: int | str | None = None,
    *,
    output: str | Path | None = None,
    format: str = "autoseg",
    overwrite: bool = False,
    **choice: Any,
) -> Path:
    """Write a model or an encoder into one file; returns it.

    Args:
        output: the file; default: a name that says what it is, in the current folder.
        format: `autoseg` (the zip `import_` reads), `nnunet` (a model: the zip stock nnU-Net installs; an encoder: the
            file `nnUNetv2_train -pretrained_weights` takes) or `nnssl` (an encoder in nnssl's layout).
        overwrite: replace an existing file.
        choice: as for `choose`.
    """
    if format not in FORMATS:
        raise SettingsError("Unknown format", found=format, expected=", ".join(FORMATS))
    chosen = choose(dataset, **choice)
    if format == "nnssl" and chosen.kind == "model":
        raise SettingsError(
            "The format nnssl holds encoders",
            found=f"a trained model, {chosen.folder.name}",
            remedy="--format nnunet for the model, or --encoder NAME for the encoder it started from",
        )
    with tempfile.TemporaryDirectory(prefix="autoseg-") as temporary:
        packed = Path(temporary) / "packed"
        manifest = pack(chosen, packed)
        target = Path(output) if output is not None else Path(_default_name(chosen, packed, format))
        if target.exists() and not overwrite:
            raise SettingsError(
                "The file exists already", where=target, remedy="choose another with -o, or --overwrite"
            )
        if format == "autoseg":
            archive.write_zip(packed, target)
        else:
            from autoseg.formats import write_format

            write_format(format, packed, manifest, target)
    logger.info("Wrote %s (%.1f MB)", target, target.stat().st_size / 1e6)
    return target


def pack(chosen: Chosen, folder: Path) -> archive.Manifest:
    """Put what is shared of a model or encoder into `folder`, sealed with a manifest, and check it as an import would."""
    folder.mkdir(parents=True)
    if chosen.kind == "model":
        name = _pack_model(chosen, folder)
        manifest = archive.seal(folder, "model", name)
        contents.read_model(folder, manifest)
    else:
        name = _pack_encoder(chosen.folder, folder)
        manifest = archive.seal(folder, "encoder", name)
        contents.read_encoder(folder, manifest)
    return manifest


def _pack_model(chosen: Chosen, folder: Path) -> str:
    plan, full = (read_json(chosen.folder / name) for name in (contents.PLAN, contents.DATASET))
    dataset_json = _shared_dataset_json(full)
    contents.check_plan(plan, chosen.folder / contents.PLAN)
    _write(folder / contents.PLAN, plan)
    _write(folder / contents.DATASET, dataset_json)
    if (chosen.folder / "transfer.json").is_file():
        _write(folder / "transfer.json", read_json(chosen.folder / "transfer.json"))
    folds: dict[str, contents.Fold] = {}
    for name in map(str, chosen.folds):
        source, target = chosen.folder / f"fold_{name}", folder / f"fold_{name}"
        checkpoint = load_checkpoint(source / FINAL)
        fold = _fold(checkpoint, source, plan)
        network = contents.network_of(plan, fold.configuration, dataset_json)
        state, shortest = checkpoint["network_weights"], contents.shared_names(network)
        if set(state) != set(shortest):
            different = sorted(set(state) ^ set(shortest))
            raise PlanError(
                "The plan does not describe the network whose weights these are",
                where=source / FINAL,
                found=f"{len(different)} names differ, such as {different[0]} (trained with {fold.trainer_name})",
            )
        target.mkdir()
        save_file({n: state[n].contiguous() for n in sorted(set(shortest.values()))}, target / contents.FOLD_WEIGHTS)
        _write(target / contents.FOLD, dataclasses.asdict(fold))
        folds[name] = fold
    model = contents.Model(plan, dataset_json, folds)
    (folder / archive.CARD).write_text(model_card_text(model), encoding="utf-8")
    return model.run or SCRATCH


def _fold(checkpoint: dict, source: Path, plan: dict) -> contents.Fold:
    own = checkpoint.get("autoseg", {}).get("trainer_name")
    mirroring = checkpoint.get("inference_allowed_mirroring_axes")
    if (source / contents.FOLD).is_file():  # imported: the numbers came with it
        validation = contents.read_fold(source / contents.FOLD).validation
    else:
        validation = _validation(source, plan)
    return contents.Fold(
        configuration=checkpoint["init_args"]["configuration"],
        trainer_name=checkpoint["trainer_name"],
        autoseg_trainer=own,
        mirroring_axes=None if mirroring is None else [int(axis) for axis in mirroring],
        epochs=checkpoint.get("current_epoch"),
        validation=validation,
    )


def _validation(source: Path, plan: dict) -> contents.Validation | None:
    """The numbers of nnU-Net's `summary.json` without its cases, which are file paths."""
    path = source / "validation" / "summary.json"
    if not path.is_file():
        return None
    summary = read_json(path)
    return contents.Validation(
        cases=len(summary["metric_per_case"]),
        seen_in_pretraining=_seen(source, plan),
        foreground_mean=_finite(summary["foreground_mean"]),
        mean=_finite(summary["mean"]),
    )


def _seen(source: Path, plan: dict) -> int | None:
    """How many validation cases of a fold the encoder it started from had seen; None where that is not known."""
    identity, fold = options_of(plan).get("pretrained"), source.name.removeprefix("fold_")
    if identity is None or not fold.isdigit():
        return None
    dataset_name = source.parents[1].name
    for folder in find_encoders(dataset_name, identity["name"]):
        if archive.sha256_of(folder / WEIGHTS_NAME) == identity["sha256"]:
            card = EncoderCard.from_json(read_json(folder / CARD_NAME))
            try:
                validation = splits(dataset_name)[int(fold)]["val"]
            except (AutosegError, IndexError):
                return None
            return len(seen_cases(card, identity["sha256"], dataset_name, validation))
    return None


def _pack_encoder(source: Path, folder: Path) -> str:
    tensors, card = load_encoder(source)
    refuse_unfinished(card, source)
    refuse_untrained(card, source)
    save_file(tensors, folder / WEIGHTS_NAME)
    salt = archive.sha256_of(folder / WEIGHTS_NAME)
    cases, held_out = (sorted(hidden_case(case, salt) for case in listed) for listed in (card.cases, card.held_out))
    card = dataclasses.replace(card, cases=cases, held_out=held_out)
    _write(folder / CARD_NAME, card.to_json())
    plan = _plan_of(source, card)
    if plan is not None:
        _write(folder / contents.PLAN, plan)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", source.resolve().name).strip(".-") or card.method  # usable as a run's name
    (folder / archive.CARD).write_text(encoder_card_text(card, name), encoding="utf-8")
    return name


def _plan_of(source: Path, card: EncoderCard) -> dict | None:
    """The plan an encoder was pretrained with, if it is still there as it was."""
    if (source / contents.PLAN).is_file():
        return read_json(source / contents.PLAN)
    try:
        plan = load_plan(card.dataset, card.plan_name)
        return plan if plan_hash(plan, card.configuration) == card.plan_hash else None
    except (PlanError, DatasetError):
        return None


def _encoder_folder(dataset: int | str | None, text: str, plan: str | None, configuration: str | None) -> Path:
    if "/" in text or "\\" in text or Path(text).exists():
        return Path(text).parent if text.endswith(".safetensors") else Path(text)
    if dataset is None:
        raise SettingsError("Whose encoder?", found=f"--encoder {text}", expected="-d DATASET with it, or a path")
    dataset_name = resolve_dataset(dataset)
    found = find_encoders(dataset_name, text, plan, configuration)
    if len(found) == 1:
        return found[0]
    every = found or sorted(p.parent for p in (results(dataset_name) / "pretrained").glob(f"*/*/{CARD_NAME}"))
    raise SettingsError(
        f"{dataset_name} has {'several encoders' if found else 'no encoder'} {text}",
        found=", ".join(f"{folder.name} ({folder.parent.name})" for folder in every) or "none at all",
        expected="one",
        remedy="choose with -p and -c" if found else "make one with `autoseg pretrain`, or give a path",
    )


def _shared_dataset_json(full: dict) -> dict:
    """The keys that describe; nnU-Net and the Decathlon also list cases and their files in dataset.json."""
    shared = {key: full[key] for key in _DATASET_KEYS if key in full}
    remap = full.get("autoseg", {}).get("remap")
    return {**shared, "autoseg": {"remap": remap}} if remap else shared


def _write(path: Path, content: Any) -> None:
    """Write JSON, after looking for what should not leave the machine."""
    text = json.dumps(content, ensure_ascii=False)
    if place := _PLACE.search(text):
        raise DatasetError(
            f"{path.name} names a place on this machine, which is not shared",
            found=text[max(0, place.start() - 40) : place.end() + 60],
            remedy="remove it from the file in the model's or encoder's folder",
        )
    write_json(path, content)


def _finite(value: Any) -> Any:
    """NaN, which nnU-Net writes for structures no case has, as null."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _default_name(chosen: Chosen, packed: Path, format: str) -> str:
    if chosen.kind == "model":
        name = f"{read_json(packed / contents.PLAN)['dataset_name']}__{chosen.folder.name}"
        return f"{name}.zip" if format == "autoseg" else f"{name}_nnunet.zip"
    card = read_json(packed / CARD_NAME)
    name = f"{card['dataset']}__{card['plan_name']}__{card['configuration']}__{chosen.folder.resolve().name}"
    return f"{name}.zip" if format == "autoseg" else f"{name}_{format}.pth"
