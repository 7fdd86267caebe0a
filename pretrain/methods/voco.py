"""VoCo: predict where a crop lies in a volume from how similar it is to a grid of base crops.

Wu, Zhuang, Chen, "VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical Image Analysis", CVPR 2024,
arXiv:2402.17300 (`variant=v1`), and its follow-up "Large-Scale 3D Medical Image Pre-training with Geometric Context Priors",
arXiv:2410.09890 (`variant=v2`, the default). Consulted: Luffy03/VoCo:models/voco_head.py and
Luffy03/Large-Scale-Medical:Self-supervised/models/voco_head.py (Apache-2.0).

Differs from the authors' code on purpose: no dropout of whole crops; teachers start as copies of the student; the regulariser
gives every base crop its gradient; random crops reach the last cell; with one volume there is no term between volumes; crops
and grid follow the plan, so anisotropic and 2D data work; the teacher moves after the optimiser's step.
"""

from __future__ import annotations

import copy
import logging
import math
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
from pretrain.crops import best_of, mirrored, read_window, resize, shifted, turned, volume_or_plane
from pretrain.encoders import encoder_of
from pretrain.heads import pooled_stages, projector
from pretrain.method import Batch, Export, MomentumPair, ParameterGroup, PretrainMethod, Stage, Step, Target, Terms
from pretrain.methods.voco_geometry import (
    Layout,
    choose_layout,
    draw_offset,
    place_window,
    typical_labels,
    valid_bases,
)
from pretrain.volumes import CaseInfo, Volume

logger = logging.getLogger("autoseg")

_EPSILON = 1e-6
_WANTED_FOREGROUND = 0.3
_SAMPLES = 32
_FEW_VOXELS = 2  # of the deepest map, on each axis
_HOPELESS_FOREGROUND = 0.05  # below: air, whose place nobody could tell
_SOON = 50  # steps, before which nothing can be said
_NO_SKILL = 0.05  # above always answering the centre
_STALLED = 0.975  # of the loss of a constant answer


@dataclass(frozen=True)
class VoCoConfig:
    """What `--set voco.NAME=VALUE` can change."""

    steps: Annotated[int, Field(ge=1)] = 50_000
    """Optimiser steps; the schedule ends with them."""
    variant: Literal["v2", "v1"] = "v2"
    """v2: shared encoder, averaged projector, a term between volumes. v1: averaged second network, no such term."""
    volumes: Annotated[int, Field(ge=1)] = 2
    """Volumes of a batch; with 1 there is no term between volumes."""
    random_crops: Annotated[int, Field(ge=1)] = 4
    """Random crops of each volume."""
    max_bases: Annotated[int, Field(ge=4, le=16)] = 9
    """Most base crops of a volume; fewer need less memory."""
    grid: tuple[int, ...] | None = None
    """Base crops per axis instead of the rule's, in the order (z, y, x): 1,3,3 is the authors' choice."""
    region: Literal["crop", "full"] = "crop"
    """crop: the grid is cut out of the volume. full: the whole foreground is resized to it, which ignores the spacing and
    suits scans that all show the same part of the body."""
    hidden: Annotated[int, Field(ge=8)] = 1024
    """Width of the projector; the authors used 2048 for v1."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of the teacher: it keeps this share of itself at each step."""
    feature_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of single features before the projector."""
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Probability of mirroring a crop, for each axis."""
    turn: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Probability of turning a crop in the plane of the last two axes, where their sizes and spacings are equal."""
    shift: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of adding a number to a crop, up to a tenth of the region's standard deviation."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Highest rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of AdamW."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the steps in which the rate rises; after it a cosine to zero."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""
    export_teacher: bool = False
    """v1 only: keep the averaged encoder instead of the trained one."""


@dataclass(frozen=True)
class VoCoSpec:
    """What is cut from every volume."""

    layout: Layout
    spacing: tuple[float, ...]
    """mm, on the axes of the crops."""
    volumes: int
    random_crops: int
    mirror: float
    turn: float
    shift: float


class VoCo(PretrainMethod):
    """Random crops are compared with the base crops of their volume; the similarities must be the shares of overlap."""

    Config = VoCoConfig
    presets = {  # noqa: RUF012
        "default": {},
        # 300 steps on two cores: minutes
        "cpu": {"steps": 300, "hidden": 256, "learning_rate": 1e-3},
    }
    citation = "Wu, Zhuang, Chen: VoCo (CVPR 2024, arXiv:2402.17300; arXiv:2410.09890)"

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: VoCoConfig) -> VoCoSpec:
        dims = target.encoder.spatial_dims
        shape = [float(n) for n in np.median([case.shape for case in pool], axis=0)][-dims:]
        layout = choose_layout(
            target.patch_size,
            target.encoder.total_stride,
            shape,
            target.spacing,
            max_bases=config.max_bases,
            grid=config.grid,
        )
        if config.region == "full":
            layout = Layout(layout.crop, layout.grid, True, layout.upsampling)
        if config.export_teacher and config.variant != "v1":
            raise PlanError(
                "Only v1 averages the encoder",
                where="voco.export_teacher",
                found=f"voco.variant={config.variant}",
                expected="v1",
                remedy="--set voco.variant=v1, or leave voco.export_teacher out",
            )
        logger.info(
            "VoCo cuts %s base crops (%s) and %d random crops of %s voxels from each of %d volumes",
            layout.bases,
            times(layout.grid),
            config.random_crops,
            times(layout.crop),
            config.volumes,
        )
        deepest = [c // s for c, s in zip(layout.crop, target.encoder.total_stride, strict=True)]
        if math.prod(deepest) < _FEW_VOXELS**dims:
            logger.warning(
                "Such a crop is only %s voxels in the network's deepest map, which is little to tell where it lies; larger "
                "scans or patches, or a network with fewer halvings (3d_fullres), have more",
                times(deepest),
            )
        if layout.whole:
            logger.info("VoCo resizes each volume's whole foreground, enlarged at most %.2f-fold", layout.upsampling)
        if min(config.volumes, len(pool)) == 1:
            logger.warning("VoCo has one volume a batch, so it leaves out the term between volumes")
        return VoCoSpec(
            layout=layout,
            spacing=target.spacing,
            volumes=config.volumes,
            random_crops=config.random_crops,
            mirror=config.mirror,
            turn=config.turn,
            shift=config.shift,
        )

    @staticmethod
    def draw(spec: VoCoSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, None]]:
        chosen = rng.choice(len(pool), size=min(spec.volumes, len(pool)), replace=False)
        return [(pool[index].id, None) for index in chosen]

    @staticmethod
    def sample(spec: VoCoSpec, case: Volume, parameters: None, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One volume: K base crops, n random crops and the shares by which these overlap.

        Returns:
            base (K, channels, *crop), random (n, channels, *crop), labels (n, K); bases_valid (K,) and crops_valid (n,):
            what counts; offsets (n, axes) in voxels of the region and overview (levels, y, x), for the picture.
        """
        layout = spec.layout
        (region, box), foreground = best_of(10, lambda: _region(spec, case, rng), _WANTED_FOREGROUND)
        bases_valid = valid_bases(layout, box)
        drawn = [draw_offset(layout, box, bases_valid, rng) for _ in range(spec.random_crops)]
        spread = _thinned(region).reshape(len(region), -1).std(1)

        def crops_at(offsets: Sequence[np.ndarray]) -> np.ndarray:
            crops = np.empty((len(offsets), len(region), *layout.crop), region.dtype)
            for place, offset in zip(crops, offsets, strict=True):
                box = (slice(None), *(slice(o, o + c) for o, c in zip(offset, layout.crop, strict=True)))
                crop = mirrored(region[box], rng, spec.mirror)
                crop = turned(crop, rng, spec.turn, spec.spacing)
                place[...] = shifted(crop, rng, spec.shift, 0.1 * spread)
            return crops

        return {
            "base": crops_at([np.multiply(cell, layout.crop) for cell in np.ndindex(*layout.grid)]),
            "random": crops_at([offset for offset, _, _ in drawn]),
            "labels": np.stack([labels for _, labels, _ in drawn]).astype(np.float32),
            "bases_valid": bases_valid,
            "crops_valid": np.array([complete and foreground >= _HOPELESS_FOREGROUND for _, _, complete in drawn]),
            "offsets": np.stack([offset for offset, _, _ in drawn]),
            "overview": _overview(region[0], layout),
        }

    def __init__(self, network: nn.Module, spec: VoCoSpec, config: VoCoConfig) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = encoder_of(network)
        features = sum(self.encoder.output_channels)
        self.student = projector(features, config.hidden)
        # Copies, so that student and teacher begin alike.
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_encoder: nn.Module | None = None
        if config.variant == "v1":
            self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        labels = typical_labels(spec.layout)
        top = np.bincount(labels.argmax(1), minlength=spec.layout.bases) / len(labels)
        self._central, self._central_share = int(top.argmax()), float(top.max())
        self.plateau = constant_answer_loss(torch.from_numpy(labels), config.variant)

    def stages(self) -> Sequence[Stage]:
        config = self.config
        return [
            Stage(
                "main",
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                amsgrad=True,
                warm_up=config.warm_up,
                clip_norm=config.clip_norm,
            )
        ]

    def parameter_groups(self, stage: Stage) -> Sequence[ParameterGroup]:
        return [ParameterGroup([*self.encoder.parameters(), *self.student.parameters()])]

    def momentum_pairs(self) -> Sequence[MomentumPair]:
        pairs = [MomentumPair(self.student, self.teacher, lambda step: self.config.momentum)]
        if self.teacher_encoder is not None:
            pairs.append(MomentumPair(self.encoder, self.teacher_encoder, lambda step: self.config.momentum))
        return pairs

    def loss(self, batch: Batch, step: Step) -> Terms:
        """Terms `intra` (place in the own volume; `pos` and `neg` are its parts), `inter` (between volumes, v2) and `reg`
        (base crops apart), all weights 1; metrics `acc`, `always_centre` and `dead_fraction`."""
        student, teacher = self.embed(batch)
        return self._terms(batch, student, teacher)

    def embed(self, batch: Batch) -> tuple[Embeddings, Embeddings]:
        """Embeddings of all crops, (volumes, n, H) and (volumes, K, H), by the student and by the teacher (no gradient)."""
        random, base = batch["random"], batch["base"]
        crops = torch.cat([random.flatten(0, 1), base.flatten(0, 1)])
        described = pooled_stages(self.encoder, crops)
        with torch.no_grad():
            averaged = described if self.teacher_encoder is None else pooled_stages(self.teacher_encoder, crops)
        with torch.autocast(crops.device.type, enabled=False):
            student = self.student(functional.dropout(described, self.config.feature_dropout, self.training))
            with torch.no_grad():
                teacher = self.teacher(averaged.detach())
        return split_embeddings(student, random, base), split_embeddings(teacher, random, base)

    def _terms(self, batch: Batch, student: Embeddings, teacher: Embeddings) -> Terms:
        v1 = self.config.variant == "v1"
        labels, bases_valid, crops_valid = batch["labels"], batch["bases_valid"], batch["crops_valid"]
        counted = crops_valid[:, :, None] & bases_valid[:, None, :]
        cosine = cosines(student.random, teacher.base)
        similarity = cosine.relu()
        if v1:
            similarity = 0.5 * (similarity + cosines(teacher.random, student.base).relu())
        pos, neg = position_loss(labels, similarity, counted, self.config.variant)
        terms = {"intra": pos + neg, "reg": spread_loss(student.base, bases_valid)}
        if not v1 and len(labels) > 1:
            target = cosines(teacher.random, teacher.base.roll(-1, 0)).relu().detach()
            other = cosines(student.random, student.base.roll(-1, 0)).relu()
            elsewhere = crops_valid[:, :, None] & bases_valid.roll(-1, 0)[:, None, :]
            terms["inter"] = sum(position_loss(target, other, elsewhere, "v2"))  # type: ignore[assignment]
        terms["loss"] = sum(terms.values())  # type: ignore[assignment]
        with torch.no_grad():
            positive = (labels > 0.1) & counted
            # A crop may lie in two base crops by the same share: then both are right.
            right = (labels > labels.amax(2, keepdim=True) - _EPSILON) & (labels > 0)
            answers = cosine.masked_fill(~bases_valid[:, None, :], -2).argmax(2, keepdim=True)
            terms |= {
                "pos": pos.detach(),
                "neg": neg.detach(),
                "acc": _share(right.gather(2, answers)[:, :, 0], crops_valid),
                "always_centre": _share(right[:, :, self._central], crops_valid),
                "dead_fraction": _share(cosine <= 0, positive),
            }
        return terms

    def chance(self) -> Mapping[str, float]:
        return {"acc": 1 / self.spec.layout.bases, "always_centre": self._central_share}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        if step.progress < 0.1 or step.index < _SOON:
            return None
        if recent["dead_fraction"] > 0.5:
            return (
                f"{recent['dead_fraction']:.0%} of the crops are not similar at all to the base crops they overlap, and learn "
                "nothing from that; a lower learning rate or more steps of warm-up may help"
            )
        if recent["intra"] > _STALLED * self.plateau and recent["acc"] < self._central_share + _NO_SKILL:
            return (
                f"VoCo does not tell places apart yet: {recent['acc']:.2f} are right, {self._central_share:.2f} by always "
                f"answering the centre; intra is {recent['intra']:.3f}, one answer for every crop gives {self.plateau:.3f}. "
                "If it stays so, try another learning rate, or scans oriented alike"
            )
        return None

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.voco_picture import draw_task

        student, teacher = self.embed(batch)
        return draw_task(self.spec.layout, batch, cosines(student.random, teacher.base).relu())

    def export(self) -> Export:
        if self.config.export_teacher and self.teacher_encoder is not None:
            return Export(self.teacher_encoder, "encoder")
        return Export(self.encoder, "encoder")


@dataclass(frozen=True)
class Embeddings:
    """Of one network: random (volumes, n, H) and base (volumes, K, H)."""

    random: Tensor
    base: Tensor


def split_embeddings(rows: Tensor, random: Tensor, base: Tensor) -> Embeddings:
    """Rows (volumes·n + volumes·K, H), all random crops first and volume by volume, back to their volumes."""
    volumes, n = random.shape[:2]
    return Embeddings(
        rows[: volumes * n].unflatten(0, (volumes, n)), rows[volumes * n :].unflatten(0, (volumes, base.shape[1]))
    )


def cosines(random: Tensor, base: Tensor) -> Tensor:
    """Cosine of each random crop (volumes, n, H) with each base crop (volumes, K, H) of its volume: (volumes, n, K)."""
    return torch.einsum("vnh,vkh->vnk", functional.normalize(random, dim=-1), functional.normalize(base, dim=-1))


def position_loss(labels: Tensor, similarity: Tensor, counted: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """The positive and the negative part of VoCo's loss, each a mean over the volumes that have counted entries.

    Args:
        labels: wanted similarity (volumes, n, K); similarity: the answer, in [0, 1]; counted: entries that are not masked.
        variant: v2 punishes an answer where none is wanted by -log(1 - s), v1 by its square.
    """
    distance = (labels - similarity).abs()
    weight = labels * counted
    positive = -(1 - distance + _EPSILON).clamp(max=1).log()
    pos = (weight * positive).sum((1, 2)) / (weight.sum((1, 2)) + _EPSILON)
    absent = ((labels == 0) & counted).to(similarity.dtype)
    negative = similarity**2 if variant == "v1" else -(1 - similarity + _EPSILON).clamp(max=1).log()
    neg = (absent * negative).sum((1, 2)) / (absent.sum((1, 2)) + _EPSILON)
    used = counted.any(2).any(1).to(similarity.dtype)
    return (pos * used).sum() / used.sum().clamp(min=1), (neg * used).sum() / used.sum().clamp(min=1)


def spread_loss(base: Tensor, valid: Tensor) -> Tensor:
    """Mean of relu(cosine)² over the pairs of a volume's valid base crops (volumes, K, H); every base gets its gradient."""
    cosine = cosines(base, base).relu()
    pairs = (valid[:, :, None] & valid[:, None, :]).triu(1)
    return ((cosine**2 * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)).mean()


def constant_answer_loss(labels: Tensor, variant: str) -> float:
    """The lowest loss that one similarity for everything reaches on labels (crops, K): where a useless run stays."""
    counted = torch.ones_like(labels, dtype=torch.bool)[None]
    answers = torch.linspace(0, 0.6, 61)
    losses = [sum(position_loss(labels[None], torch.full_like(labels, s)[None], counted, variant)) for s in answers]
    return float(min(losses))


def _share(hits: Tensor, counted: Tensor) -> Tensor:
    return (hits & counted).sum() / counted.sum().clamp(min=1)


def _region(
    spec: VoCoSpec, case: Volume, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, list[tuple[int, int]]], float]:
    """The region (channels, *region), the part of it that holds image on each axis, and its share of foreground."""
    source = volume_or_plane(case, len(spec.spacing), rng)
    if spec.layout.whole:
        box = source.info.foreground_box
        start, size = [low for low, _ in box], [high - low for low, high in box]
    else:
        start, size = place_window(spec.layout, source.info.shape, source.info.foreground_box, rng)
    window, inside = read_window(source, start, size)
    image_box = (slice(None), *(slice(low, high) for low, high in inside))
    foreground = float((_thinned(window[image_box]).mean(0) > source.info.foreground_threshold).mean())
    region = resize(window, spec.layout.region)
    scales = [n / w for n, w in zip(region.shape[1:], size, strict=True)]
    box = tuple((int(np.ceil(low * f)), int(high * f)) for (low, high), f in zip(inside, scales, strict=True))
    return (region, list(box)), foreground


def _thinned(image: np.ndarray) -> np.ndarray:
    """Every few voxels of (channels, *space), with at least _SAMPLES on each axis that has them: for shares and deviations,
    which took longer of all voxels than to read them."""
    every = (slice(None, None, max(1, n // _SAMPLES)) for n in image.shape[1:])
    thinned = (slice(None), *every)
    return image[thinned]


def _overview(image: np.ndarray, layout: Layout) -> np.ndarray:
    """Slices (levels, y, x) through the middle of each level of the grid; one for a plane."""
    if image.ndim == 2:
        return image[None].astype(np.float16)
    middles = [layout.crop[0] * level + layout.crop[0] // 2 for level in range(layout.grid[0])]
    return image[middles].astype(np.float16)
