"""Exemplar: two changed views of one place shall look alike to the encoder, and unlike views of other scans.

3D-Exemplar of Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv:2006.03829, after
Dosovitskiy et al., arXiv:1406.6909; the triplet loss with semi-hard negatives of Schroff, Kalenichenko, Philbin, "FaceNet",
CVPR 2015, arXiv:1503.03832. Consulted: HealthML/self-supervised-3d-tasks
(self_supervised_3d_tasks/algorithms/exemplar.py).

Differs from the authors' code on purpose: both views are changed, so that "was changed" tells nothing; one head for all views
instead of three, which could reach a loss of zero without looking at the image; distances on unit vectors; negatives are
mined; views are sampled from a larger window, so no corner is empty.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from planners.decisions import times
from planners.errors import PlanError
from pretrain.crops import best_of, volume_or_plane
from pretrain.encoders import encoder_of
from pretrain.heads import classifier, last_stage
from pretrain.method import Batch, Export, PretrainMethod, Stage, Step, Target, Terms
from pretrain.methods.exemplar_views import Changes, draw_views, room_of_views
from pretrain.turns import TurnableCrop, turnable_crop
from pretrain.volumes import CaseInfo, Volume

logger = logging.getLogger("autoseg")

_NOBODY = -1  # the case of a place in the queue that is empty, or of a crop that does not count
_FEWEST_VOLUMES = 4  # of a step
_SOON = 50  # steps, before which nothing can be said
_COLLAPSED = 0.05  # of the spread of embeddings that have nothing in common


@dataclass(frozen=True)
class ExemplarConfig:
    """What `--set exemplar.NAME=VALUE` can change."""

    steps: Annotated[int, Field(ge=1)] = 50_000
    """Optimiser steps; the schedule ends with them."""
    loss: Literal["triplet", "infonce"] = "triplet"
    """triplet: the partner nearer than one chosen negative, by a margin. infonce: the partner found among all negatives."""
    volumes: Annotated[int, Field(ge=2)] | None = None
    """Volumes of a batch, each with two views, negatives of each other; none: as many as the plan's batch has, at least 2,
    and two batches or more a step where that is less than 4."""
    queue: Annotated[int, Field(ge=1)] = 256
    """Views of the steps before, which stand in for the loss where a batch has no negative: when a single scan is held out."""
    margin: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Of the triplet loss; squared distances of unit vectors reach from 0 to 4."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Of infonce."""
    embedding: Annotated[int, Field(ge=2)] = 128
    """Numbers that describe a view."""
    hidden: Annotated[int, Field(ge=8)] = 512
    """Width of the layer between the encoder's features and these."""
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of mirroring a view, for each axis."""
    turn: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of turning a view by quarters of a circle and tilting its plane by up to 15 degrees."""
    zoom: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Probability of zooming by 0.8 to 1.2."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of another brightness and contrast."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Highest rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the rate rises; after it a cosine to zero."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""


@dataclass(frozen=True)
class ExemplarSpec:
    """What is cut from every volume."""

    crop: TurnableCrop
    spacing: tuple[float, ...]
    """mm of the voxels the network sees."""
    volumes: int
    accumulate: int
    changes: Changes


class Exemplar(PretrainMethod):
    """Views of one place form a pair; views of other cases are the negatives."""

    Config = ExemplarConfig
    presets = {  # noqa: RUF012
        "default": {},
        # 300 steps on two cores: minutes
        "cpu": {"steps": 300, "volumes": 8, "embedding": 64, "hidden": 128},
    }
    citation = "Taleb et al.: 3D Self-Supervised Methods for Medical Imaging (NeurIPS 2020, arXiv:2006.03829)"

    queue: Tensor
    queue_cases: Tensor
    written: Tensor

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: ExemplarConfig) -> ExemplarSpec:
        dims = target.encoder.spatial_dims
        volumes = min(len(pool), config.volumes or max(2, int(target.settings["batch_size"])))
        if len(pool) < 2:
            raise PlanError(
                "Exemplar compares scans, and there is only one to learn from",
                found=pool[0].id,
                expected="at least two, so three in all: one scan in ten, and at least one, is held out",
                remedy="add scans with --images FOLDER, or take a method that learns from one (rotation)",
            )
        crop = turnable_crop(target, pool, room=room_of_views(dims), method="exemplar")
        logger.info(
            "Exemplar cuts two views of %s voxels from each of %d volumes; turns: %s",
            times(crop.size),
            volumes,
            ", ".join(turn.name(dims) for turn in crop.turns),
        )
        if crop.zoom > 1:
            logger.warning("The scans are small for this network: crops of %s voxels are enlarged", times(crop.cut))
        return ExemplarSpec(
            crop=crop,
            spacing=tuple(s * c / n for s, c, n in zip(target.spacing, crop.cut, crop.size, strict=True)),
            volumes=volumes,
            accumulate=1 if config.volumes else math.ceil(_FEWEST_VOLUMES / volumes),
            changes=Changes(config.mirror, config.turn, config.zoom, config.contrast),
        )

    @staticmethod
    def draw(
        spec: ExemplarSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step
    ) -> list[tuple[str, int]]:
        """Different cases, each with the number that tells it from others."""
        chosen = rng.choice(len(pool), size=min(spec.volumes, len(pool)), replace=False)
        return [(pool[index].id, case_number(pool[index].id)) for index in chosen]

    @staticmethod
    def sample(spec: ExemplarSpec, case: Volume, parameters: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Two views of one place.

        Returns:
            views (2, channels, *size), case (): its number, or -1 where there is nothing to see.
        """
        source = volume_or_plane(case, len(spec.spacing), rng)

        views, usable = best_of(10, lambda: draw_views(spec.crop, spec.changes, source, 2, rng), 1.0)
        return {"views": views, "case": np.array(parameters if usable else _NOBODY)}

    def __init__(self, network: nn.Module, spec: ExemplarSpec, config: ExemplarConfig) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = encoder_of(network)
        # No dropout: at the start embeddings differ less from each other than dropout moves them, and all collapse.
        self.head = classifier(self.encoder.output_channels[-1], config.hidden, config.embedding)
        self.register_buffer("queue", torch.zeros(config.queue, config.embedding))
        self.register_buffer("queue_cases", torch.full((config.queue,), _NOBODY))
        self.register_buffer("written", torch.zeros((), dtype=torch.long))

    def stages(self) -> Sequence[Stage]:
        config = self.config
        return [
            Stage(
                "main",
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                warm_up=config.warm_up,
                clip_norm=config.clip_norm,
                accumulate=self.spec.accumulate,
            )
        ]

    def embed(self, views: Tensor) -> Tensor:
        """Unit vectors (volumes, 2, embedding) of views (volumes, 2, channels, *size)."""
        embedded = self.head(last_stage(self.encoder, views.flatten(0, 1)))
        return functional.normalize(embedded.float(), dim=1).unflatten(0, views.shape[:2])

    def loss(self, batch: Batch, step: Step) -> Terms:
        """The chosen loss over the views of all processes, and `shown`, the share of the views that have a negative.

        Metrics: `acc` (partner found among one view each of `volumes` scans), `told_apart` (share of the other scans'
        views that are less alike than the partner), `spread` (standard deviation of the embeddings) and, of triplets,
        `active` (share that is not solved). Where no view has a negative, loss (0) and `shown` are all.
        """
        own = self.embed(batch["views"])
        with torch.autocast(own.device.type, enabled=False):
            z, cases = self.gather(own), self.gather(batch["case"])
            anchors, anchor_cases = _in_rows(z, cases)
            similarity = anchors @ torch.cat([anchors, self.queue]).T
            here, before = (may_be_negative(anchor_cases, other) for other in (anchor_cases, self.queue_cases))
            # Where the batch offers negatives the queue must not: its views were embedded by other weights, which the loss
            # can tell apart more easily than scans, and all embeddings collapse.
            negative = torch.cat([here, before & ~here.any(1, keepdim=True)], 1)
            rows = torch.arange(len(anchors), device=anchors.device)
            partner = similarity[rows, rows.roll(len(z))]
            if self.config.loss == "triplet":
                terms = triplet_terms(partner, similarity, negative, self.config.margin)
            else:
                terms = infonce_terms(partner, similarity, negative, self.config.temperature)
        with torch.no_grad():
            shown = negative.any(1).float().mean()
            if shown:
                terms["spread"] = own.flatten(0, 1).std(0).mean()
                # Never of the queue: what other weights embedded is less alike than any partner, so an encoder that knows
                # nothing would be right. Where fewer than `volumes` scans are held out, `told_apart` alone is left.
                first_views = here[:, : len(z)]
                terms |= found_among(partner, similarity[:, : len(z)], first_views, self.spec.volumes - 1)
                terms |= told_apart(partner, similarity[:, : len(anchors)], here)
            else:
                terms = {"loss": terms["loss"]}
        return {**terms, "shown": shown, "embeddings": z.detach(), "cases": cases}

    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        """Put the views of all processes into the queue, over the oldest."""
        rows, cases = (part[: len(self.queue)] for part in _in_rows(terms["embeddings"], terms["cases"]))
        place = (self.written + torch.arange(len(rows), device=rows.device)) % len(self.queue)
        self.queue[place], self.queue_cases[place] = rows, cases
        self.written += len(rows)

    def chance(self) -> Mapping[str, float]:
        return {"acc": 1 / self.spec.volumes, "told_apart": 0.5}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        unrelated = self.config.embedding**-0.5
        if step.progress < 0.1 or step.index < _SOON or recent.get("spread", unrelated) > _COLLAPSED * unrelated:
            return None
        return (
            f"Exemplar describes all views alike: the spread of the embeddings is {recent['spread']:.4f}, of unrelated ones it "
            f"would be {unrelated:.3f}. If it stays so, try a lower learning rate or --set exemplar.loss=infonce"
        )

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.exemplar_picture import draw_task

        return draw_task(self.spec, batch, self.embed(batch["views"]))

    def export(self) -> Export:
        return Export(self.encoder, "encoder")


def case_number(case_id: str) -> int:
    """A number for a case that is the same in every pool and process; never negative."""
    return zlib.crc32(case_id.encode())


def may_be_negative(anchor_cases: Tensor, candidate_cases: Tensor) -> Tensor:
    """Which candidates (M,) an anchor (N,) may be compared with: views of other cases; (N, M), empty rows for anchors that do
    not count."""
    counted = (anchor_cases != _NOBODY)[:, None] & (candidate_cases != _NOBODY)[None]
    return counted & (anchor_cases[:, None] != candidate_cases[None])


def triplet_terms(partner: Tensor, similarity: Tensor, negative: Tensor, margin: float) -> Terms:
    """Mean of max(0, D(anchor, partner) - D(anchor, negative) + margin), D = 2 - 2 cosine, over anchors with a negative.

    Args:
        partner: cosine with the partner (N,); similarity: with all candidates (N, M); negative: which may be taken (N, M).
    """
    near, far = 2 - 2 * partner, 2 - 2 * similarity
    chosen = semi_hard(near.detach(), far.detach(), negative, margin)
    hinge = (near - far.gather(1, chosen[:, None])[:, 0] + margin).relu()
    counted = negative.any(1)
    count = counted.sum().clamp(min=1)
    return {"loss": (hinge * counted).sum() / count, "active": ((hinge > 0) & counted).sum() / count}


def semi_hard(near: Tensor, far: Tensor, negative: Tensor, margin: float) -> Tensor:
    """The negative (N,) for each anchor: the nearest of those farther than the partner but within the margin, else the nearest.

    near: distances to the partner (N,); far: to the candidates (N, M).
    """
    open_ended = far.masked_fill(~negative, torch.inf)
    within = negative & (far > near[:, None]) & (far < near[:, None] + margin)
    return torch.where(within.any(1), far.masked_fill(~within, torch.inf).argmin(1), open_ended.argmin(1))


def infonce_terms(partner: Tensor, similarity: Tensor, negative: Tensor, temperature: float) -> Terms:
    """Mean over the anchors with a negative of -log of the partner's softmax share among itself and the negatives."""
    logits = torch.cat([partner[:, None], similarity.masked_fill(~negative, -torch.inf)], 1) / temperature
    counted = negative.any(1)
    return {"loss": (-logits.log_softmax(1)[:, 0] * counted).sum() / counted.sum().clamp(min=1)}


def found_among(partner: Tensor, similarity: Tensor, negative: Tensor, others: int) -> Terms:
    """`acc`: how often the partner is more similar than each of `others` negatives, the first there are.

    Chance is 1/(others + 1), so anchors with fewer negatives do not count; where all have fewer there is no `acc`.
    """
    first = negative & (negative.cumsum(1) <= others)
    enough = first.sum(1) == others
    right = (similarity.masked_fill(~first, -torch.inf).amax(1) < partner) & enough
    return {"acc": right.sum() / enough.sum()} if enough.any() else {}


def told_apart(partner: Tensor, similarity: Tensor, negative: Tensor) -> Terms:
    """`told_apart`: share of an anchor's negatives that are less similar than its partner, equal ones by half; the mean over
    the anchors with a negative. Chance is 0.5, however many negatives there are. Without any there is none."""
    counted = negative.any(1)
    below = (similarity < partner[:, None]) + 0.5 * (similarity == partner[:, None])
    share = (below * negative).sum(1) / negative.sum(1).clamp(min=1)
    return {"told_apart": share[counted].mean()} if counted.any() else {}


def _in_rows(z: Tensor, cases: Tensor) -> tuple[Tensor, Tensor]:
    """(volumes, 2, embedding) and (volumes,) → (2 volumes, embedding) and (2 volumes,), all first views before all second."""
    return z.transpose(0, 1).flatten(0, 1), cases.repeat(2)
