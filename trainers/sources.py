"""Which encoder `--pretrained` means, and which plan and configuration it decides."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from planners.errors import PlanError, SettingsError
from planners.paths import results
from planners.plans import CPU_SUFFIX, load_plan, plan_hash
from pretrain.checkpoint import CARD_NAME, WEIGHTS_NAME, EncoderCard, find_encoders, load_encoder, refuse_unfinished


@dataclass(frozen=True)
class Source:
    """An encoder to start from."""

    name: str
    """Names the run: the last part of its path."""
    tensors: dict[str, Tensor]
    card: EncoderCard
    sha256: str
    plan_name: str | None
    """The plan it decides; None when it was not pretrained with a plan of this dataset as it is now."""

    def identity(self) -> dict:
        """What a run keeps of its origin: no paths."""
        return {"name": self.name, "method": self.card.method, "dataset": self.card.dataset, "sha256": self.sha256}


def find_source(
    dataset_name: str,
    pretrained: str | Path,
    plan_name: str | None,
    configuration: str | None,
    device_type: str,
    *,
    allow_partial: bool = False,
) -> Source:
    """Resolve `--pretrained`: the name of an encoder of this dataset (all plans and configurations unless given), or a
    path to an encoder's folder or file.

    Raises SettingsError when it is not clear which encoder is meant or when `plan_name` or `configuration` contradict
    it, PretrainedMismatch for an unfinished one.
    """
    text = str(pretrained)
    if text.startswith("hf:"):
        raise SettingsError(
            "Encoders cannot be fetched from the Hugging Face Hub yet",
            found=text,
            remedy="download it and give the folder that holds encoder.safetensors and encoder.json",
        )
    if "/" in text or "\\" in text or Path(text).exists():
        folder = Path(text).parent if text.endswith(".safetensors") else Path(text)
    else:
        folder = _named(dataset_name, text, plan_name, configuration, device_type)
    tensors, card = load_encoder(folder)
    if not allow_partial:
        refuse_unfinished(card, folder)
    decided = _plan_of(dataset_name, card)
    for asked, own, option in ((plan_name, decided, "-p"), (configuration, card.configuration, "-c")):
        if asked is not None and decided is not None and asked != own:
            raise SettingsError(
                "The encoder was pretrained with something else",
                where=folder,
                found=f"{option} {asked}",
                expected=f"{option} {own}",
                remedy=f"leave {option} out, or pretrain again with it",
            )
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", folder.resolve().name).strip(".-") or card.method
    sha256 = hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    return Source(name, tensors, card, sha256, decided)


def _named(dataset_name: str, name: str, plan_name: str | None, configuration: str | None, device_type: str) -> Path:
    found = find_encoders(dataset_name, name, plan_name, configuration)
    if len(found) > 1 and plan_name is None:
        fitting = [f for f in found if f.parent.name.split("__")[0].endswith(CPU_SUFFIX) == (device_type == "cpu")]
        found = fitting or found
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingsError(
            f"{dataset_name} has several encoders {name}",
            found="\n            ".join("-p {} -c {}".format(*f.parent.name.split("__")) for f in found),
            expected="one",
            remedy="choose with -p and -c",
        )
    every = sorted((results(dataset_name) / "pretrained").glob(f"*/*/{CARD_NAME}"))
    raise SettingsError(
        f"{dataset_name} has no encoder {name}"
        + (" for that plan and configuration" if plan_name or configuration else ""),
        found=", ".join(f"{p.parent.name} ({p.parent.parent.name})" for p in every) or "none at all",
        remedy=f"autoseg pretrain -d {dataset_name} --method {name}, or give the path of an encoder",
    )


def _plan_of(dataset_name: str, card: EncoderCard) -> str | None:
    """The plan of this dataset the encoder was pretrained with, or None for an encoder from elsewhere."""
    if card.dataset != dataset_name:
        return None
    try:
        plan = load_plan(dataset_name, card.plan_name)
        return card.plan_name if plan_hash(plan, card.configuration) == card.plan_hash else None
    except PlanError:
        return None
