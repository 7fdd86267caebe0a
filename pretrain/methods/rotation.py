"""Rotation: tell by how many quarters of a circle, and about which axis, a crop was turned.

3D-Rotation of Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv:2006.03829, after Gidaris,
Singh, Komodakis, ICLR 2018, arXiv:1803.07728. Consulted: HealthML/self-supervised-3d-tasks
(self_supervised_3d_tasks/algorithms/rotation.py).

Differs from the authors' code on purpose: volumes are not squeezed into a cube; instead the set of turns follows from the
voxel sizes of plan and scans (`pretrain.turns`), so that no turn can be told from the texture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from planners.decisions import times
from planners.errors import PlanError
from pretrain.classes import class_loss, still_guessing
from pretrain.crops import best_of, is_air, other_scanner, volume_or_plane
from pretrain.encoders import encoder_of
from pretrain.heads import classifier, last_stage
from pretrain.method import Batch, Export, PretrainMethod, Stage, Step, Target, Terms
from pretrain.schedule import Schedule
from pretrain.turns import TurnableCrop, turnable_crop
from pretrain.volumes import CaseInfo, Volume

logger = logging.getLogger("autoseg")

_FEWEST_CROPS = 4  # of a step


@dataclass(frozen=True)
class RotationConfig(Schedule):
    """What `--set rotation.NAME=VALUE` can change."""

    crops: Annotated[int, Field(ge=1)] | None = None
    """Crops of a batch; none: as many as the plan's batch has, and two batches or more a step where that is less than 4."""
    turns_per_crop: Annotated[int, Field(ge=1, le=4)] = 1
    """Different turns of each crop, all in one batch: a steadier loss for more memory."""
    hidden: Annotated[int, Field(ge=8)] = 512
    """Width of the layer between the encoder's features and the answer."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of that layer."""
    intensity: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of another contrast, brightness and noise for a crop, before it is turned."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""


@dataclass(frozen=True)
class RotationSpec:
    """What is cut from every volume."""

    crop: TurnableCrop
    spacing: tuple[float, ...]
    """mm of the voxels the network sees."""
    crops: int
    accumulate: int
    turns_per_crop: int
    intensity: float


class Rotation(PretrainMethod):
    """A crop from inside the scan is turned exactly, without interpolation or padding; the network names the turn."""

    Config = RotationConfig
    presets = {  # noqa: RUF012
        "default": {},
        # 300 steps on two cores: minutes. At 1e-3 so short a run hardly leaves the start.
        "cpu": {"steps": 300, "crops": 8, "hidden": 128, "dropout": 0.0, "learning_rate": 3e-3},
    }
    citation = "Taleb et al.: 3D Self-Supervised Methods for Medical Imaging (NeurIPS 2020, arXiv:2006.03829)"

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: RotationConfig) -> RotationSpec:
        crop = turnable_crop(target, pool, method="rotation")
        dims = target.encoder.spatial_dims
        names = ", ".join(turn.name(dims) for turn in crop.turns)
        if config.turns_per_crop > len(crop.turns):
            raise PlanError(
                "There are not so many turns that leave the voxels as they are",
                where=target.configuration,
                found=f"rotation.turns_per_crop={config.turns_per_crop}",
                expected=f"at most {len(crop.turns)}: {names}",
                remedy=f"--set rotation.turns_per_crop={len(crop.turns)}",
            )
        crops = config.crops or int(target.settings["batch_size"])
        logger.info(
            "Rotation turns crops of %s voxels in %d ways (%s), which guessing gets right in %.3f",
            times(crop.size),
            len(crop.turns),
            names,
            1 / len(crop.turns),
        )
        if crop.zoom > 1:
            logger.warning("The scans are small for this network: crops of %s voxels are enlarged", times(crop.cut))
        return RotationSpec(
            crop=crop,
            spacing=tuple(s * c / n for s, c, n in zip(target.spacing, crop.cut, crop.size, strict=True)),
            crops=crops,
            accumulate=1 if config.crops else math.ceil(_FEWEST_CROPS / crops),
            turns_per_crop=config.turns_per_crop,
            intensity=config.intensity,
        )

    @staticmethod
    def draw(
        spec: RotationSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step
    ) -> list[tuple[str, list[int]]]:
        """Each crop with the numbers of its turns, every turn equally likely."""
        cases = rng.choice(len(pool), spec.crops, replace=spec.crops > len(pool))
        return [
            (pool[case].id, rng.choice(len(spec.crop.turns), spec.turns_per_crop, replace=False).tolist())
            for case in cases
        ]

    @staticmethod
    def sample(
        spec: RotationSpec, case: Volume, parameters: list[int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """One crop, turned in several ways.

        Returns:
            crops (turns, channels, *size), turns (turns,): their classes, valid (turns,): whether there is something to see.
        """
        source = volume_or_plane(case, len(spec.spacing), rng)

        def one() -> tuple[np.ndarray, float]:
            crop, large_enough = spec.crop.read(source, rng)
            return crop, float(large_enough and not is_air(crop, source.info))

        crop, usable = best_of(10, one, 1.0)
        if rng.random() < spec.intensity:
            space = tuple(range(1, crop.ndim))
            crop = other_scanner(crop, crop.mean(space, keepdims=True), crop.std(space, keepdims=True), rng)
        return {
            "crops": np.stack([spec.crop.turns[number](crop) for number in parameters]),
            "turns": np.array(parameters),
            "valid": np.full(len(parameters), bool(usable)),
        }

    def __init__(self, network: nn.Module, spec: RotationSpec, config: RotationConfig) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = encoder_of(network)
        wake_residual_branches(self.encoder)
        self.head = classifier(self.encoder.output_channels[-1], config.hidden, len(spec.crop.turns), config.dropout)

    def stages(self) -> Sequence[Stage]:
        return [self.config.stage(self.spec.accumulate, self.config.clip_norm)]

    def answers(self, crops: Tensor) -> Tensor:
        """Logits (N, turns) of crops (N, channels, *size)."""
        return self.head(last_stage(self.encoder, crops)).float()

    def loss(self, batch: Batch, step: Step) -> Terms:
        """Cross entropy of the turns; metric `acc`."""
        logits = self.answers(batch["crops"].flatten(0, 1))
        return class_loss(logits, batch["turns"].flatten(), batch["valid"].flatten())

    def chance(self) -> Mapping[str, float]:
        return {"acc": 1 / len(self.spec.crop.turns)}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        advice = "If it stays so, the crops may show too little, or the scans may not be oriented alike"
        return still_guessing(recent, step, len(self.spec.crop.turns), advice)

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.rotation_picture import draw_task

        return draw_task(self.spec, batch, self.answers(batch["crops"].flatten(0, 1)).softmax(1))

    def export(self) -> Export:
        return Export(self.encoder, "encoder")


def wake_residual_branches(encoder: nn.Module) -> None:
    """Give the norms that start at zero a weight of one.

    nnU-Net begins with residual branches that contribute nothing. What is then left of an image in the mean of the deepest map
    hardly depends on the image, and the task starts slowly. Weights that were loaded stay.
    """
    for module in encoder.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.any():
            nn.init.ones_(weight)
