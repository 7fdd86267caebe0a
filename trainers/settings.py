"""Training options: their meaning, their defaults by rule, and where each value came from.

The rule (DESIGN §5, Trainer) depends on the network, how many iterations there are in all, whether the encoder is pretrained,
and the device; scratch and pretrained runs of one length share the optimiser, so that they can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.settings import configure

LONG_ITERATIONS = 50_000
"""From here on a pretrained network is fine-tuned with a warm-up to a tenth of the rate."""
SHORT_ITERATIONS = 2_000
"""Below this AdamW: nnU-Net's SGD leaves the background only after some 500 iterations."""


@dataclass(frozen=True)
class TrainSettings:
    """What `--set train.KEY=VALUE` can change. Saved with the run; all its folds share it."""

    epochs: Annotated[int, Field(ge=1)] = 1000
    """Epochs; the learning rate reaches its end with the last, however short the run."""
    iterations: Annotated[int, Field(ge=1)] = 250
    """Training iterations of an epoch; a fifth as many validation iterations follow."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` with Nesterov momentum 0.99, as nnU-Net, or `adamw`."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-2
    """Highest learning rate."""
    lr_end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end."""
    llrd: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Layer-wise decay of the rate: each block of a transformer has this share of the rate of the block after it, the tokens
    and positions that of the first block, and the decoder the whole. Below 1 only for `3d_fullres_sac` and `2d_vit`."""
    encoder_lr: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the rate that the encoder has, all its layers alike."""
    schedule: Literal["poly", "linear", "cosine"] = "poly"
    """How the rate falls to its end: `poly` as (1 - progress)^0.9, as nnU-Net, `linear`, or `cosine` as half a wave."""
    weight_decay: Annotated[float, Field(ge=0)] = 3e-5
    """Weight decay."""
    decayed: Literal["all", "matrices"] = "all"
    """What decays: `all` weights, or `matrices` and kernels alone, not norms, biases, scales and tokens."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """How much of AdamW's average of squared gradients is kept at each iteration."""
    clip: Annotated[float, Field(gt=0, le=12)] = 12.0
    """Largest norm of the gradient of all weights; a longer one is shortened to it. 12 is nnU-Net's."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of all iterations in which the rate of all layers rises linearly from zero."""
    frozen_epochs: Annotated[int, Field(ge=0)] = 0
    """First epochs in which the encoder is left as it is."""
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    """End after this time of training, final validation not counted; the schedule is shortened to fit, so that the
    learning rate still reaches its end."""
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the fold's training cases that is used, at least one; chosen by the seed, and a smaller share is a part of a
    larger one. The validation cases are all used."""
    augment_on: Literal["cpu", "device"] = "cpu"
    """Where training patches are turned and changed: `cpu`, in processes beside the training, as nnU-Net does, or `device`,
    where the network trains, so that the processes only read: for a GPU that waits for them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 12345
    """Seed of the new weights, of the choice of cases and, on a CPU, of every batch."""

    @property
    def total_iterations(self) -> int:
        return self.epochs * self.iterations

    @property
    def validation_iterations(self) -> int:
        return max(1, self.iterations // 5)


KEYS = tuple(field.name for field in dataclasses.fields(TrainSettings))


@dataclass(frozen=True)
class Resolved:
    """Complete settings and the origin of each value: `default`, `rule`, `run` (an existing run's) or `flag`."""

    settings: TrainSettings
    origins: dict[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(setting, value, origin) for `--show-config`."""
        values = dataclasses.asdict(self.settings)
        return [(f"train.{key}", f"{values[key]}", self.origins[key]) for key in KEYS]


TRANSFORMERS = ("SwinUNETR", "Primus", "PUMIT", "MedDINOv3")
"""Networks that are trained with AdamW by their published recipes, however long."""


def resolve(given: Mapping[str, Any], *, budget: str, device: str, pretrained: bool, network: str = "") -> Resolved:
    """Fill what is not given.

    Args:
        given: values by key, as strings or typed; SettingsError lists every unknown key and wrong value at once.
        budget: `cpu` or `full`, whom the plan was made for.
        device: `cpu`, `cuda` or `mps`.
        pretrained: whether the encoder starts from pretrained weights.
        network: class of the network, the last part of the plan's `network_class_name`.
    """
    values, origins = dataclasses.asdict(TrainSettings()), dict.fromkeys(KEYS, "default")

    def by_rule(**chosen: Any) -> None:
        values.update(chosen)
        origins.update(dict.fromkeys(chosen, "rule"))

    if budget == "cpu" and device == "cpu":
        by_rule(epochs=30, iterations=50)
    # Validated before the rule reads the length, and once more with everything.
    total = validated({**values, **given}).total_iterations
    if network in TRANSFORMERS or total < SHORT_ITERATIONS:
        by_rule(optimizer="adamw")
    optimizer = given.get("optimizer", values["optimizer"])
    if optimizer == "adamw" and network == "SwinUNETR":
        # Luffy03/Large-Scale-Medical:Downstream/monai/BTCV/main.py: 20 of 1000 epochs, for scratch and pretrained alike
        by_rule(lr=3e-4, weight_decay=1e-5, warm_up=0.02, schedule="cosine")
    elif optimizer == "adamw" and network == "Primus":
        # MIC-DKFZ/nnUNet, the trainers for nnssl's weights: 50 of 1000 epochs
        by_rule(lr=1e-4 if pretrained else 3e-4, weight_decay=5e-2, warm_up=0.05)
    elif optimizer == "adamw" and network == "PUMIT":
        # function2-llx/PUMIT:downstream/btcv: 5,000 of 50,000 steps; the decay of pretrained layers is EVA-02's, not PUMIT's
        by_rule(lr=1e-4, lr_end=1e-6, weight_decay=5e-2, warm_up=0.1, schedule="cosine", clip=1.0)
        if pretrained:
            by_rule(llrd=0.85)
    elif optimizer == "adamw" and network == "MedDINOv3":
        # ricklisz/MedDINOv3, the trainers of its own weights; the warm-up and what does not decay are ours
        by_rule(lr=3e-4, weight_decay=5e-2, decayed="matrices", beta2=0.98, warm_up=0.01, schedule="linear")
        if pretrained:
            by_rule(encoder_lr=0.1)
    elif optimizer == "adamw":
        by_rule(lr=2e-3)
    elif pretrained and total >= LONG_ITERATIONS:
        by_rule(lr=1e-3, warm_up=0.05)
    values.update(given)
    origins.update(dict.fromkeys(given, "flag"))
    return Resolved(validated(values), origins)


def validated(values: Mapping[str, Any]) -> TrainSettings:
    """Settings from complete or partial values; SettingsError names all that is wrong with them."""
    return configure(TrainSettings, "train", values)


def learning_rate(settings: TrainSettings, progress: float) -> float:
    """The rate at `progress` in [0, 1): a linear rise over `warm_up`, then the schedule's fall to `lr_end`."""
    if progress < settings.warm_up:
        return settings.lr * progress / settings.warm_up
    rest = min((progress - settings.warm_up) / (1 - settings.warm_up), 1.0)
    share = (1 + cos(pi * rest)) / 2 if settings.schedule == "cosine" else 1 - rest
    if settings.schedule == "poly":
        share **= 0.9
    return settings.lr_end + (settings.lr - settings.lr_end) * share
