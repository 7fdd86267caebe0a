"""What the files of an archive must say: checked after packing and, above all, before anything of it is installed.

A plan names classes and functions that nnU-Net looks up, and parts of paths. Each of them must be in a literal table or
match a pattern; the network is then built without memory, and the weights must be its tensors, no more and no fewer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoseg.archive import Manifest, parse_json
from planners.dataset import channel_names, label_values
from planners.errors import AutosegError, DatasetError, PlanError, PretrainedMismatch, UnsafeFile
from planners.paths import dataset_id
from planners.plans import resolved
from planners.quiet import nnunet_quiet
from planners.run_names import check_run_name
from pretrain.checkpoint import CARD_NAME, WEIGHTS_NAME, EncoderCard
from pretrain.encoders import build_segmentation_network, encoder_of
from pretrain.networks.registry import build_network, check_architecture
from trainers.runs import SCRATCH, options_of, run_folder_name

FOLD, FOLD_WEIGHTS, PLAN, DATASET = "fold.json", "weights.safetensors", "plans.json", "dataset.json"

# What nnU-Net 2.8 would look up by name and call.
_PLAN_NAMES = {
    "image_reader_writer": {
        "SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO", "Tiff3DIO",
    },
    "label_manager": {"LabelManager"},
}  # fmt: skip
_RESAMPLING = {
    "resample_data_or_seg_to_shape",
    "resample_torch_simple",
    "resample_torch_fornnunet",
    "no_resampling_hack",
}
_CONFIGURATION_NAMES = {
    "preprocessor_name": {"DefaultPreprocessor"},
    "resampling_fn_data": _RESAMPLING,
    "resampling_fn_seg": _RESAMPLING,
    "resampling_fn_probabilities": _RESAMPLING,
}
_NORMALIZATIONS = {
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
    "ZScoreNormalization",
}
_PATH_PART = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9_.-]*")  # nnU-Net splits folder names at `__`
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TRAINER = re.compile(r"(?!.*__)[A-Za-z][A-Za-z0-9_]*")
_REMEDY = "ask whoever made it for a new export; nothing was installed"
_ENDING = re.compile(r"(\.[A-Za-z0-9]+){1,2}")


@dataclass(frozen=True)
class Validation:
    """Numbers of a fold's validation cases, without the cases."""

    cases: int
    seen_in_pretraining: int | None
    """How many of them the encoder had seen, without labels; None where that is not known."""
    foreground_mean: dict[str, float | None]
    mean: dict[str, dict[str, float | None]]
    """Of each label or region, as nnU-Net names them."""


@dataclass(frozen=True)
class Fold:
    """`fold.json`: what a checkpoint says beside its weights."""

    configuration: str
    trainer_name: str
    """The class stock nnU-Net predicts with; `nnUNetTrainer` for autoseg's models."""
    autoseg_trainer: str | None
    """The class that trained it, if it is one of autoseg's."""
    mirroring_axes: list[int] | None
    epochs: int | None
    validation: Validation | None


@dataclass(frozen=True)
class Model:
    """A checked model of an archive."""

    plan: dict
    dataset_json: dict
    folds: dict[str, Fold]
    """`0`, `1`, … or `all`."""

    @property
    def configuration(self) -> str:
        return next(iter(self.folds.values())).configuration

    @property
    def trainer(self) -> str:
        """What the model's folder name begins with."""
        first = next(iter(self.folds.values()))
        return first.autoseg_trainer or first.trainer_name

    @property
    def run(self) -> str | None:
        return options_of(self.plan).get("run")

    @property
    def folder_name(self) -> str:
        """`AutosegTrainer-voco__autosegPlans__3d_fullres`."""
        return f"{run_folder_name(self.trainer, self.run)}__{self.plan['plans_name']}__{self.configuration}"


def read_model(folder: Path, manifest: Manifest) -> Model:
    """Check every file of a model that `archive.unpack` or `archive.seal` left in `folder`."""
    names = {name.split("/")[0].removeprefix("fold_") for name in manifest.files if "/" in name}
    needed = {PLAN, DATASET, *(f"fold_{name}/{file}" for name in names for file in (FOLD, FOLD_WEIGHTS))}
    _need(needed if names else {*needed, f"fold_0/{FOLD}"}, manifest, folder)
    plan, dataset_json = (_json(folder / name) for name in (PLAN, DATASET))
    check_dataset_json(dataset_json, folder / DATASET)
    check_plan(plan, folder / PLAN)
    if "transfer.json" in manifest.files:
        _json(folder / "transfer.json")
    folds = {name: read_fold(folder / f"fold_{name}" / FOLD) for name in sorted(names, key=_fold_order)}
    model = Model(plan, dataset_json, folds)
    if len({(fold.configuration, fold.trainer_name, fold.autoseg_trainer) for fold in folds.values()}) > 1:
        raise DatasetError("The folds are not of one model", where=folder)
    if manifest.name != (model.run or SCRATCH):
        raise DatasetError("The manifest and the plan name different runs", where=folder, found=manifest.name)
    network = network_of(plan, model.configuration, dataset_json)
    for name in folds:
        read_tensors(folder / f"fold_{name}" / FOLD_WEIGHTS, network)
    return model


def read_encoder(folder: Path, manifest: Manifest) -> EncoderCard:
    """Check every file of an encoder that `archive.unpack` or `archive.seal` left in `folder`."""
    _need({WEIGHTS_NAME, CARD_NAME}, manifest, folder)
    check_run_name(manifest.name)
    card = EncoderCard.from_json(_json(folder / CARD_NAME))
    dataset_id(card.dataset)
    for part in (card.plan_name, card.configuration):
        _check_part(part, folder / CARD_NAME)
    if PLAN in manifest.files:
        check_plan(_json(folder / PLAN), folder / PLAN)
    network = network_of_card(card)
    read_tensors(folder / WEIGHTS_NAME, encoder_of(network) if card.scope == "encoder" else network, card.scope)
    return card


def check_plan(plan: dict, where: object) -> None:
    """Refuse a plan that names anything nnU-Net does not bring, or parts of paths that are more than names."""
    try:
        dataset_id(plan["dataset_name"])
        _check_part(plan["plans_name"], where)
        for key, allowed in _PLAN_NAMES.items():
            _check_name(key, plan[key], allowed, where)
        run = options_of(plan).get("run")
        if run is not None:
            check_run_name(run)
        for name in plan["configurations"]:
            _check_part(name, where)
            _check_configuration(resolved(plan, name), f"configurations.{name}", where)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError("The plan is not as nnU-Net writes it", where=where, found=repr(error)) from error


def check_dataset_json(dataset_json: dict, where: object) -> None:
    """Refuse a dataset.json that does not describe channels, labels and files as nnU-Net needs them."""
    try:
        names, labels = channel_names(dataset_json), label_values(dataset_json)
        ending = dataset_json["file_ending"]
        # Masks are written as case + ending: it may not lead anywhere else.
        sound = bool(names) and labels.get("background") == 0 and _ENDING.fullmatch(ending) is not None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError("dataset.json is not as nnU-Net writes it", where=where, found=repr(error)) from error
    if not sound:
        raise DatasetError(
            "dataset.json is not as nnU-Net writes it",
            where=where,
            found=f"channels {names}, background {labels.get('background')}, file_ending {ending!r}",
            expected="named channels, background 0, an ending such as .nii.gz",
            remedy=_REMEDY,
        )


def network_of(plan: dict, configuration: str, dataset_json: dict) -> nn.Module:
    """The network of a plan on the meta device: names and shapes without memory."""
    try:
        with torch.device("meta"), nnunet_quiet():
            return build_segmentation_network(
                plan, configuration, dataset_json, deep_supervision=False, initialise=False
            )
    except AutosegError:
        raise
    except Exception as error:  # whatever a constructor says of arguments nobody checked
        raise PlanError("The plan does not describe a network", found=f"{type(error).__name__}: {error}") from error


def network_of_card(card: EncoderCard) -> nn.Module:
    """A whole network with the card's encoder on the meta device."""
    try:
        with torch.device("meta"), nnunet_quiet():
            return build_network(card.architecture, len(card.channels), 2, deep_supervision=False, initialise=False)
    except AutosegError:
        raise
    except Exception as error:
        raise PlanError("The encoder's network cannot be built", found=f"{type(error).__name__}: {error}") from error


def shared_names(module: nn.Module) -> dict[str, str]:
    """Every name of a module's state → the shortest name of the same tensor, which is the one that files hold."""
    groups: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: min(names, key=len) for names in groups.values() for name in names}


def read_tensors(path: Path, module: nn.Module, scope: str = "network") -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must be those of `module`.

    With the scope `encoder+decoder` some of the decoder may be missing: methods leave out the last layer.
    Raises DatasetError for a file that is none, PretrainedMismatch for other tensors, or values that are not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DatasetError("Not readable as safetensors", where=path, found=error, remedy=_REMEDY) from error
    shortest = set(shared_names(module).values())
    expected = {name: tensor for name, tensor in module.state_dict().items() if name in shortest}
    missing = [name for name in expected if name not in tensors]
    if scope == "encoder+decoder":
        missing = [name for name in missing if name.startswith("encoder.")]
    problems = [f"{name}: missing" for name in missing]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"{name}: not in the network")
        elif (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            problems.append(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype}, the network has {tuple(expected[name].shape)} "
                f"{expected[name].dtype}"
            )
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            problems.append(f"{name}: not finite")
    if problems:
        raise PretrainedMismatch(
            "The weights are not those of the network that the plan describes",
            where=path,
            found="\n            ".join(problems[:8] + ([f"… and {len(problems) - 8} more"] if problems[8:] else [])),
            remedy=_REMEDY,
        )
    return tensors


def _check_configuration(settings: Mapping[str, Any], entry: str, where: object) -> None:
    for key, allowed in _CONFIGURATION_NAMES.items():
        if key in settings:
            _check_name(f"{entry}.{key}", settings[key], allowed, where)
    for scheme in settings.get("normalization_schemes", ()):
        _check_name(f"{entry}.normalization_schemes", scheme, _NORMALIZATIONS, where)
    if "data_identifier" in settings:
        _check_part(settings["data_identifier"], where, _FOLDER)
    if "architecture" in settings:
        check_architecture(settings["architecture"])


def _check_name(entry: str, found: object, allowed: set[str], where: object) -> None:
    if not isinstance(found, str) or found not in allowed:
        raise UnsafeFile(
            "The plan names code that nnU-Net does not bring; nothing was imported",
            where=f"{where}, {entry}",
            found=repr(found),
            expected=", ".join(sorted(allowed)),
            remedy="use plans of nnU-Net or autoseg; do not use a file from a source you do not trust",
        )


def _check_part(found: object, where: object, pattern: re.Pattern[str] = _PATH_PART) -> None:
    if not isinstance(found, str) or pattern.fullmatch(found) is None:
        raise UnsafeFile(
            "A name that becomes part of a path is more than a name; nothing was installed",
            where=where,
            found=repr(found),
            expected="letters, digits, '_', '.' and '-'",
        )


def _fold_order(name: str) -> tuple[bool, int]:
    return name == "all", int(name) if name.isdigit() else 0


def read_fold(path: Path) -> Fold:
    """`fold.json`, every field checked."""
    _json(path)
    try:
        fold = TypeAdapter(Fold).validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}" for e in error.errors()]
        raise DatasetError(f"{FOLD} is not as autoseg writes it", where=path, found="; ".join(problems)) from error
    for trainer in (fold.trainer_name, fold.autoseg_trainer):
        if trainer is not None:
            _check_part(trainer, path, _TRAINER)
    _check_part(fold.configuration, path)
    if fold.mirroring_axes is not None and not set(fold.mirroring_axes) <= {0, 1, 2}:
        raise DatasetError("No such axes to mirror", where=path, found=fold.mirroring_axes, expected="of 0, 1, 2")
    return fold


def _json(path: Path) -> dict:
    return parse_json(path.read_bytes(), path.name, path)


def _need(names: set[str], manifest: Manifest, folder: Path) -> None:
    missing = sorted(names - set(manifest.files))
    if missing:
        raise DatasetError(f"Not a whole {manifest.kind}", where=folder, found=f"no {', no '.join(missing)}")
