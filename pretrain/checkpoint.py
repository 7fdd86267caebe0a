"""The encoder artefact: `encoder.safetensors` (tensors) and `encoder.json` (what they are). Reading it runs no code."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from planners.errors import DatasetError, PretrainedMismatch
from planners.files import read_json, replacing, write_json
from planners.paths import results
from pretrain.transfer import distinct

WEIGHTS_NAME = "encoder.safetensors"
CARD_NAME = "encoder.json"
_HIDDEN = "sha256:"


@dataclass(frozen=True)
class EncoderCard:
    """What an encoder is and how it came about. JSON types only; no paths."""

    method: str
    """Name of the pretraining method, as `autoseg methods` lists it."""
    version: str
    """Version of autoseg that wrote it."""
    dataset: str
    """Home dataset, Dataset017_BTCV."""
    plan_name: str
    plan_hash: str
    """`planners.plans.plan_hash` of the plan and configuration."""
    configuration: str
    architecture: dict[str, Any]
    """The plan's `architecture` entry."""
    scope: Literal["encoder", "encoder+decoder"]
    """`encoder`: names are relative to the encoder; `encoder+decoder`: to the whole network."""
    spacing: list[float]
    """Target spacing in mm, (z, y, x) after the plan's transpose, or (y, x)."""
    patch_size: list[int]
    """Voxels, in the same order."""
    DA: int | None
    """Degree of anisotropy of the configuration; None in 2d."""
    channels: list[str]
    """Channel names."""
    intensity: list[Any]
    """Intensity scheme of each channel."""
    steps_done: int
    steps_asked: int
    metrics: dict[str, dict[str, float | None]]
    """Held-out metrics: name to {"value", "chance"}."""
    cases: list[str]
    """Cases whose voxels were used, as `dataset/case`; `hidden_case` of them in an encoder that was shared."""
    held_out: list[str]
    """Cases used for the held-out metrics only."""
    excluded_fold: int | None
    """Fold whose validation cases were left out."""
    licence: str
    citation: str
    trained: bool = True
    """Whether weights were learned: by a stage of this run, or where it started from. A run of PUMIT's tokenizer alone leaves
    the encoder new."""
    task: dict[str, Any] = field(default_factory=dict)
    """`views`: what the method's `plan` decided (grid, classes, sizes); `chance`: what guessing reaches. Empty in
    encoders of older versions."""

    @classmethod
    def from_json(cls, content: Any) -> EncoderCard:
        """Check every field; DatasetError lists all that are missing or of the wrong type."""
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}" for e in error.errors()]
            raise DatasetError(
                "The description of the encoder is not complete",
                found="; ".join(problems),
                remedy="pretrain again, or take a complete copy of the encoder's folder",
            ) from error

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.steps_asked


def save_encoder(
    folder: Path, module: nn.Module, card: EncoderCard, extras: Mapping[str, nn.Module] | None = None
) -> None:
    """Write all files, the description last: a folder with an `encoder.json` is complete.

    Tensors registered under several names are written once, under the shortest.

    Args:
        extras: name to module, each written as `NAME.safetensors`.
    """
    (Path(folder) / CARD_NAME).unlink(missing_ok=True)
    named = {f"{name}.safetensors": extra for name, extra in (extras or {}).items()}
    for file, content in {**named, WEIGHTS_NAME: module}.items():
        state = content.state_dict()
        tensors = {names[0]: state[names[0]].detach().cpu().contiguous() for names in distinct(state.items())}
        with replacing(Path(folder) / file) as temporary:
            save_file(tensors, temporary)
            temporary.chmod(0o644)  # safetensors writes for the owner alone; colleagues share results folders
    write_json(Path(folder) / CARD_NAME, card.to_json())


def load_extras(folder: Path, extras: Mapping[str, nn.Module]) -> list[str]:
    """Fill modules from the files that `save_encoder` wrote for them; returns the names of those that were there.

    Raises PretrainedMismatch unless a file has exactly the module's tensors.
    """
    found = [name for name in extras if (Path(folder) / f"{name}.safetensors").is_file()]
    for name in found:
        path = Path(folder) / f"{name}.safetensors"
        try:
            extras[name].load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise PretrainedMismatch(
                f"The {name} does not fit the settings of this run",
                where=path,
                found=str(error).partition("\n")[2].strip() or error,
                remedy="give the settings it was trained with (settings.json beside it)",
            ) from error
    return found


def load_encoder(folder_or_file: Path) -> tuple[dict[str, Tensor], EncoderCard]:
    """Tensors and description of an encoder, from its folder or its `encoder.safetensors`.

    Raises DatasetError when a file is missing or broken, PretrainedMismatch when the weights are not finite.
    """
    path = Path(folder_or_file)
    folder = path.parent if path.suffix == ".safetensors" else path
    weights = path if path.suffix == ".safetensors" else folder / WEIGHTS_NAME
    missing = [str(file) for file in (weights, folder / CARD_NAME) if not file.is_file()]
    if missing:
        raise DatasetError(
            "Not an encoder",
            where=path,
            found=f"no {', no '.join(missing)}",
            expected=f"{WEIGHTS_NAME} and {CARD_NAME}",
            remedy="make one with `autoseg pretrain`; one that was interrupted is finished by the same command",
        )
    card = EncoderCard.from_json(read_json(folder / CARD_NAME))
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise DatasetError(
            "Not readable as safetensors", where=weights, found=error, remedy="pretrain again"
        ) from error
    broken = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if broken:
        raise PretrainedMismatch(
            "The pretrained weights hold values that are not finite",
            where=weights,
            found=", ".join(broken[:5]),
            remedy="pretrain again with a lower learning rate",
        )
    return tensors, card


def hidden_case(case: str, weights_sha256: str) -> str:
    """What a shared encoder says instead of `dataset/case`.

    The salt is the hash of the encoder's weights file: equal exports have equal bytes, lists of two encoders cannot be
    compared, and whoever has a case can still ask whether it was used. It follows that a guessed id can be tested too:
    the hash hides ids, not the answer to a right guess.
    """
    if case.startswith(_HIDDEN):
        return case
    return _HIDDEN + hashlib.sha256(f"{weights_sha256}/{case}".encode()).hexdigest()[:16]


def seen_cases(card: EncoderCard, weights_sha256: str, dataset_name: str, cases: Iterable[str]) -> list[str]:
    """Those of a dataset's cases (names without the dataset) whose voxels pretraining used, ids hidden or not."""
    used = {hidden_case(case, weights_sha256) for case in card.cases}
    return [case for case in cases if hidden_case(f"{dataset_name}/{case}", weights_sha256) in used]


def refuse_unfinished(card: EncoderCard, folder: Path) -> None:
    """PretrainedMismatch for an encoder whose pretraining was stopped before its end."""
    if not card.finished:
        raise PretrainedMismatch(
            "Pretraining of this encoder is not finished",
            where=folder,
            found=f"{card.steps_done} of {card.steps_asked} steps",
            remedy="repeat the `autoseg pretrain` command, which continues, or give --allow-partial",
        )


def refuse_untrained(card: EncoderCard, folder: Path) -> None:
    """PretrainedMismatch for an encoder whose run had only stages that train something else."""
    if not card.trained:
        raise PretrainedMismatch(
            "This encoder is as new: the stages that were run train something else",
            where=folder,
            remedy=f"autoseg pretrain -d {card.dataset} --method {card.method} --init {Path(folder).name} --run NAME, with "
            "--stages and the other stages",
        )


def encoder_folder(dataset_name: str, plan_name: str, configuration: str, method: str, run: str | None = None) -> Path:
    """`<results>/<dataset>/pretrained/<plan>__<configuration>/<method>[-<run>]`."""
    return (
        results(dataset_name) / "pretrained" / f"{plan_name}__{configuration}" / (f"{method}-{run}" if run else method)
    )


def find_encoders(
    dataset_name: str, name: str, plan_name: str | None = None, configuration: str | None = None
) -> list[Path]:
    """Folders of the encoders called `name` (`voco`, `voco-long`) of a dataset, over all plans and configurations
    unless one is given."""
    pattern = f"{plan_name or '*'}__{configuration or '*'}/{name}/{CARD_NAME}"
    return sorted(path.parent for path in (results(dataset_name) / "pretrained").glob(pattern))
