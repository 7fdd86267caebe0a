"""PCRL: contrast that preserves. Encodings of a scan are told apart from other scans, and a decoder restores the scan
from them.

Zhou, Lu, Yang, Han, Yu, "Preservational Learning Improves Self-supervised Medical Image Models by Reconstructing
Diverse Contexts", ICCV 2021, arXiv:2109.04379 (mode `paper`); its released code, Luchixiang/PCRL (mode `official`); and
PCRLv2, TPAMI 2023, arXiv:2301.00772 (mode `v2`). Consulted: Luchixiang/PCRL, RL4M/PCRLv2 (MIT),
EndoluminalSurgicalVision-IMR/Medical-SSL.

Encoder and decoder of the plan's U-Net are pretrained. Differs from the authors' code on purpose: targets are clean and
aligned with the inputs; one coefficient mixes maps and targets; keys enter the queue once, with their case, so that a
scan is no negative of itself; pooled features are centred, because behind instance norms they hardly differ; windows
follow the plan, so anisotropic, 2D and multi-channel data work.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from planners.decisions import times
from planners.errors import PlanError
from pretrain.crops import best_of, volume_or_plane
from pretrain.method import Batch, Export, MomentumPair, PretrainMethod, Stage, Step, Target, Terms
from pretrain.methods.pcrl_contexts import Contexts, contexts_of
from pretrain.methods.pcrl_corruption import Corruption, corrupt, disturb
from pretrain.methods.pcrl_parts import Graph
from pretrain.methods.pcrl_views import cut, draw_around, draw_pair
from pretrain.volumes import CaseInfo, Volume

logger = logging.getLogger("autoseg")

_OVERLAP = {"paper": 0.25, "official": 0.25, "v2": 0.3}
_WANTED_SHOWN = 0.15
_LOCAL_ZOOMS = (0.5, 1.0, 1.5, 2.0)
_SOON = 50  # steps, before which nothing can be said
# Cosine of different scans. v2's is of features whose mean is not taken off: behind instance norms it is 0.9997 to 0.99995 for
# an untrained network. Above a millionth from 1 they differ by a tenth of what the predictors' norms take for rounding.
_COLLAPSED = {"paper": 0.95, "official": 0.95, "v2": 0.999999}
_HARDLY_ANY = 0.05
_SHOWN = 2
_LONGEST_QUEUE = 16_384


@dataclass(frozen=True)
class PCRLConfig:
    """What `--set pcrl.NAME=VALUE` can change."""

    steps: Annotated[int, Field(ge=1)] = 60_000
    """Optimiser steps; the schedule ends with them."""
    mode: Literal["paper", "official", "v2"] = "paper"
    """paper: PCRL as published. official: as its code was released. v2: PCRLv2, no skips, small views, no queue."""
    batch: Annotated[int, Field(ge=1)] | None = None
    """Scans of a batch; none: the plan's."""
    patch: tuple[int, ...] | None = None
    """Voxels of a view, multiples of the network's halvings; none: the plan's. Smaller ones need less memory and
    time."""
    zooms: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.75, 1.0, 1.25, 1.5)
    """Windows are the patch times one of these, resized to the patch."""
    identity: Annotated[float, Field(ge=0, le=1)] = 0.25
    """paper, official: extra probability that a target is neither mirrored nor turned."""
    blur: Annotated[float, Field(ge=0, le=1)] = 0.4
    """paper, official: probability of blurring what the encoder sees, by up to 2 mm."""
    shuffle: Annotated[float, Field(ge=0, le=1)] = 0.5
    """paper, official: probability of exchanging voxels inside many small blocks."""
    paint: Annotated[float, Field(ge=0, le=1)] = 0.9
    """paper, official: probability of painting noise over parts."""
    outward: Annotated[float, Field(ge=0, le=1)] = 0.8
    """paper, official: share of the paintings that leave only a few windows."""
    embedding: Annotated[int, Field(ge=2)] = 128
    """paper, official: numbers of an embedding."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    """paper, official: of the contrast."""
    queue: Annotated[int, Field(ge=1)] | None = None
    """paper, official: keys to be told apart from; none: as many as come while the average encoder stays itself."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """paper, official: of the average encoder; runs below 5,000 steps begin with 0.99."""
    mask_same_case: bool = True
    """paper, official: other views of the same scan are no negatives."""
    hybrid_contrast: bool = True
    """paper: the hybrid encoding is a second positive."""
    momentum_reconstruction: bool = True
    """paper: also restore from the momentum encoding; without it a step takes less time."""
    pooling: Literal["avg+max", "avg"] = "avg+max"
    """paper, official: of the deepest map, before the embedding. The authors: avg."""
    running_norm: bool = True
    """paper, official: centre the pooled features. Without it contrast hardly learns behind instance norms."""
    local_views: Annotated[int, Field(ge=1)] = 6
    """v2: small views of a scan."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Highest rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the rate rises; after it a cosine to zero."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 12.0
    """Largest norm of the gradient."""
    keep: Literal["encoder+decoder", "encoder", "average"] = "encoder+decoder"
    """What is handed on; average (paper, official): the momentum encoder alone."""


@dataclass(frozen=True)
class PCRLSpec:
    """What is cut from every scan."""

    mode: str
    patch: tuple[int, ...]
    local: tuple[int, ...]
    """Voxels of a small view."""
    spacing: tuple[float, ...]
    """mm, on the axes of the patch."""
    channels: int
    batch: int
    images: int
    """Scans to learn from."""
    queue: int
    zooms: tuple[float, ...]
    contexts: Contexts
    corruption: Corruption
    local_views: int
    scales: int
    """Stages of the decoder."""


class PCRL(PretrainMethod):
    """Views of a scan are corrupted; their encodings must be alike, and a shared decoder restores what was there."""

    Config = PCRLConfig
    presets = {  # noqa: RUF012
        "default": {},
        # 300 steps on two cores: some ten minutes
        "cpu": {"steps": 300, "queue": 256},
    }
    citation = "Zhou et al.: PCRL (ICCV 2021, arXiv:2109.04379); PCRLv2 (TPAMI 2023, arXiv:2301.00772)"

    # What is cut ------------------------------------------------------------------------------------------------------------

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: PCRLConfig) -> PCRLSpec:
        stride = target.encoder.total_stride
        patch = _checked_patch(config.patch or target.patch_size, stride)
        batch = min(config.batch or int(target.settings["batch_size"]), len(pool))
        if config.keep == "average" and config.mode == "v2":
            raise PlanError(
                "PCRLv2 has no average encoder",
                where="pcrl.keep",
                found="average",
                expected="encoder+decoder or encoder",
                remedy="leave pcrl.keep out, or take another pcrl.mode",
            )
        contexts = contexts_of(patch, target.spacing, config.identity)
        queue = config.queue or queue_size(batch, config.momentum)
        cls._announce(config, patch, batch, queue, contexts, len(pool))
        return PCRLSpec(
            mode=config.mode,
            patch=patch,
            local=local_size(patch, stride),
            spacing=target.spacing,
            channels=target.encoder.channels,
            batch=batch,
            images=len(pool),
            queue=queue,
            zooms=config.zooms,
            contexts=contexts,
            corruption=Corruption(config.blur, config.shuffle, config.paint, config.outward),
            local_views=config.local_views,
            scales=len(target.encoder.features) - 1,
        )

    @staticmethod
    def _announce(
        config: PCRLConfig, patch: Sequence[int], batch: int, queue: int, contexts: Contexts, scans: int
    ) -> None:
        logger.info(
            "PCRL (%s) cuts overlapping views of %s voxels from %d scans a step", config.mode, times(patch), batch
        )
        if config.mode == "v2":
            if batch == 1:
                logger.warning("With one scan a step, PCRLv2 compares a scan with nothing else")
            return
        why = ""
        if config.queue is None and queue < _LONGEST_QUEUE:
            why = (
                f", not {_LONGEST_QUEUE}: with {batch} scans a step older ones are of an encoder that has changed since"
            )
        logger.info("PCRL tells a view from the last %d keys%s", queue, why)
        if len(contexts.turns) == 2:
            logger.info("Targets are turned by 180° only: sizes or spacings in the plane differ")
        if config.mode == "official" or not config.momentum_reconstruction:
            why = "as in the authors' code, to save memory" if config.mode == "official" else "as set"
            logger.info("The momentum encoding is not restored (%s)", why)
        if scans == 1 and config.mask_same_case:
            logger.warning("With one scan there is nothing to tell it from: PCRL only restores")

    @staticmethod
    def draw(
        spec: PCRLSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step
    ) -> list[tuple[str, dict[str, np.ndarray]]]:
        """Different scans, and what the batch shares: `mix`, the coefficients of the mixtures (the first one of the
        maps), and for `official` each sample's `partner`; for `v2` the `scales` that are compared."""
        chosen = rng.choice(len(pool), size=min(spec.batch, len(pool)), replace=False)
        if spec.mode == "v2":
            scales = rng.integers(spec.scales, size=1 + 2 * spec.local_views)
            return [(pool[index].id, {"scales": scales}) for index in chosen]
        mix = rng.uniform(size=3 if spec.mode == "official" else 1)
        mix = np.maximum(mix, 1 - mix).astype(np.float32)
        shared = {"mix": mix if spec.mode == "official" else mix[0]}
        if spec.mode == "paper":
            return [(pool[index].id, shared) for index in chosen]
        partners = rng.permutation(len(chosen))
        return [(pool[i].id, {**shared, "partner": partner}) for i, partner in zip(chosen, partners, strict=True)]

    @staticmethod
    def sample(
        spec: PCRLSpec, case: Volume, parameters: dict[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Two overlapping views of one scan.

        Returns:
            clean (2, channels, *patch), input (the same, corrupted), case (a number that only this scan has), valid
            (whether there is enough to see), and what the batch shares; for `paper` and `official` codes (3, length):
            the contexts of the ordinary, the momentum and the hybrid target; for `v2` local (views, channels, *local).
        """
        source = volume_or_plane(case, len(spec.patch), rng)
        shape = source.info.shape

        def views() -> tuple[Any, float]:
            pair = draw_pair(shape, spec.patch, spec.zooms, _OVERLAP[spec.mode], rng)
            crops = [cut(source, window, spec.patch, rng) for window in pair]
            return (pair, np.stack([crop for crop, _ in crops])), min(share for _, share in crops)

        (pair, clean), shown = best_of(10, views, _WANTED_SHOWN)
        result = {
            "clean": clean,
            "case": np.int64(zlib.crc32(case.info.id.encode())),
            "valid": np.float32(shown >= _WANTED_SHOWN),
            **parameters,
        }
        if spec.mode != "v2":
            result["input"] = np.stack([corrupt(crop, spec.corruption, spec.spacing, rng) for crop in clean])
            result["codes"] = np.stack([spec.contexts.draw(rng) for _ in range(3)])
            return result
        result["input"] = np.stack([disturb(crop, spec.spacing, rng, swap=True) for crop in clean])
        local = np.empty((spec.local_views, len(clean[0]), *spec.local), np.float32)
        for view in local:
            window = draw_around(pair, shape, spec.local, _LOCAL_ZOOMS, rng)
            view[...] = disturb(cut(source, window, spec.local, rng)[0], spec.spacing, rng, swap=False)
        return {**result, "local": local}

    # What is learned --------------------------------------------------------------------------------------------------------

    def __init__(self, network: nn.Module, spec: PCRLSpec, config: PCRLConfig) -> None:
        super().__init__()
        from pretrain.methods.pcrl_official import TwoPasses
        from pretrain.methods.pcrl_pyramid import Pyramid
        from pretrain.methods.pcrl_three import ThreeContexts

        self.config, self.spec = config, spec
        task = {"paper": ThreeContexts, "official": TwoPasses, "v2": Pyramid}[spec.mode]
        self.task: Any = task(network, spec, config)

    def stages(self) -> Sequence[Stage]:
        config = self.config
        return [
            Stage(
                "main",
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                warm_up=config.warm_up,
                clip_norm=config.clip_norm,
            )
        ]

    def momentum_pairs(self) -> Sequence[MomentumPair]:
        return self.task.pairs()

    def loss(self, batch: Batch, step: Step) -> Terms:
        """The terms of the mode, in one graph."""
        return self.task.terms(batch, step, Graph())

    def backward(self, batch: Batch, step: Step, run: Callable[[Tensor], None]) -> Terms:
        """The same gradients with one pass of the decoder in memory at a time (`v2` keeps one graph)."""
        return self.task.terms(batch, step, Graph(run))

    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        self.task.update(batch, terms, self.gather)

    def chance(self) -> Mapping[str, float]:
        if self.spec.mode == "paper":
            return {"told_apart": 0.5, "explained_ordinary": 0.0}
        return {"explained_ordinary" if self.spec.mode == "official" else "explained_restore": 0.0}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        if step.index >= min(_SOON, step.total - 1) and recent.get("shown", 1.0) < _HARDLY_ANY:
            return (
                f"Hardly any view shows more than background ({recent['shown']:.0%} of the scans of a batch): PCRL learns "
                "next to nothing. autoseg verify looks for empty scans; a larger pcrl.patch shows more of sparse ones"
            )
        if step.progress < 0.1 or step.index < _SOON:
            return None
        if recent.get("similarity", 0.0) > _COLLAPSED[self.spec.mode]:
            return (
                f"The embeddings of different scans are nearly the same (cosine {recent['similarity']:.7g}): contrast "
                "learns nothing. A lower learning rate may help"
                + ("" if self.config.running_norm else ", and pcrl.running_norm=true does")
            )
        return None

    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.pcrl_picture import draw_panels

        cases = [self.task.panels(batch, number) for number in range(min(_SHOWN, len(batch["clean"])))]
        text = "Held-out scans, middle slice. What the encoder sees, what the decoder must give, and what it gives"
        return draw_panels(cases, self.spec.spacing, f"{text} (share of the variance explained)")

    def export(self) -> Export:
        if self.config.keep == "average":
            return Export(self.task.average, "encoder")
        if self.config.keep == "encoder":
            return Export(self.task.body.encoder, "encoder")
        return Export(self.task.body, "encoder+decoder")


def queue_size(batch: int, momentum: float) -> int:
    """The largest power of two from 256 to the authors' 16,384 that the keys of one time constant of the average encoder
    fill."""
    keys = batch / (1 - momentum)
    return min(_LONGEST_QUEUE, max(256, 2 ** math.floor(math.log2(keys + 1e-6))))


def local_size(patch: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """About a quarter of the patch on each axis, a multiple of the stride, at least two voxels of the deepest map."""
    return tuple(min(p, max(2 * s, s * math.floor(p / (4 * s) + 0.5))) for p, s in zip(patch, stride, strict=True))


def _checked_patch(patch: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    fits = len(patch) == len(stride) and all(p > 0 and p % s == 0 for p, s in zip(patch, stride, strict=True))
    if not fits or math.prod(p // s for p, s in zip(patch, stride, strict=True)) < 2:
        good = [s * 2 for s in stride]
        raise PlanError(
            "Not a patch that PCRL can use with this network",
            where="pcrl.patch, or the plan's patch_size",
            found=",".join(map(str, patch)),
            expected=f"{len(stride)} multiples of {','.join(map(str, stride))}, at least two voxels in the deepest map",
            remedy=f"--set pcrl.patch={','.join(map(str, good))} or larger",
        )
    return tuple(int(p) for p in patch)
