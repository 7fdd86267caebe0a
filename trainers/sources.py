"""Which weights `--pretrained` means, and which plan and configuration they decide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planners.errors import PlanError, SettingsError
from planners.paths import results
from planners.plans import CPU_SUFFIX, load_plan, plan_hash
from pretrain.catalog import METHODS
from pretrain.checkpoint import CARD_NAME, EncoderCard, find_encoders, refuse_unfinished, refuse_untrained
from pretrain.fit import IMPORTED_SHARE
from pretrain.importers.weights import Weights

_ANY_SHARE = 1e-6
"""With --allow-partial: something must be loaded."""


@dataclass(frozen=True)
class Source:
    """Weights to start from."""

    weights: Weights
    plan_name: str | None
    """The plan they decide; None when they were not pretrained with a plan of this dataset as it is now."""
    minimum_share: float
    """Share of the encoder they must fill."""

    @property
    def name(self) -> str:
        """Names the run: the last part of their path."""
        return self.weights.name

    def identity(self) -> dict:
        """What a run keeps of its origin: no paths."""
        card = self.weights.card
        return {
            "name": self.name,
            "kind": self.weights.kind,
            "method": self.weights.method,
            "dataset": card.dataset if card else None,
            "sha256": self.weights.sha256,
        }


def find_source(
    dataset_name: str,
    pretrained: str | Path,
    plan_name: str | None,
    configuration: str | None,
    device_type: str,
    *,
    allow_partial: bool = False,
) -> Source:
    """Resolve `--pretrained`: the name of an encoder of this dataset (all plans and configurations unless given), or a path
    to weights: an encoder's folder or file, or a file somebody else published (`pretrain.importers`).

    Raises SettingsError when it is not clear which encoder is meant or when `plan_name` or `configuration` contradict
    it, PretrainedMismatch for one that is unfinished or was not trained at all.
    """
    # It imports timm, a second that training from scratch need not wait.
    from pretrain.importers.reading import read_weights

    text = str(pretrained)
    if "/" in text or "\\" in text or Path(text).exists():
        path = Path(text)
    else:
        path = _named(dataset_name, text, plan_name, configuration, device_type)
    weights = read_weights(path)
    card = weights.card
    if card is None:
        return Source(weights, None, _ANY_SHARE if allow_partial else IMPORTED_SHARE)
    if not allow_partial:
        refuse_unfinished(card, path)
        refuse_untrained(card, path)
    decided = _plan_of(dataset_name, card)
    for asked, own, option in ((plan_name, decided, "-p"), (configuration, card.configuration, "-c")):
        if asked is not None and decided is not None and asked != own:
            raise SettingsError(
                "The encoder was pretrained with something else",
                where=path,
                found=f"{option} {asked}",
                expected=f"{option} {own}",
                remedy=f"leave {option} out, or pretrain again with it",
            )
    return Source(weights, decided, 1.0)


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
    # A run that was called `long` is the encoder `voco-long`.
    meant = sorted({p.parent.name for p in every if p.parent.name.partition("-")[2] == name})
    method = name if name in METHODS else "METHOD"
    raise SettingsError(
        f"{dataset_name} has no encoder {name}"
        + (" for that plan and configuration" if plan_name or configuration else ""),
        found=", ".join(f"{p.parent.name} ({p.parent.parent.name})" for p in every) or "none at all",
        remedy=" or ".join(f"--pretrained {one}" for one in meant)
        or f"autoseg pretrain -d {dataset_name} --method {method}, or give the path of an encoder",
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
