"""RPL: tell which neighbour of a tile another tile is.

Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv:2006.03829 (3D relative patch location),
after Doersch, Gupta, Efros, "Unsupervised Visual Representation Learning by Context Prediction", ICCV 2015,
arXiv:1505.05192. Consulted: HealthML/self-supervised-3d-tasks (GPL-3.0), for what it does, not its code.

Differs from the authors' code on purpose: one linear layer for both tiles, so that the order of the two vectors carries the
direction; several neighbours of one centre; wider gaps; tiles of air are not asked for; each
tile is standardised; the grid follows the plan, so anisotropic and 2D data work.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.classes import class_loss, probabilities, still_guessing
from pretrain.crops import best_of, volume_or_plane
from pretrain.encoders import encoder_of
from pretrain.heads import classifier
from pretrain.method import Batch, Export, PretrainMethod, Stage, Step, Target, Terms
from pretrain.schedule import Schedule
from pretrain.tiles import (
    BatchSize,
    TileGrid,
    batch_size,
    check_pool,
    choose_grid,
    cut_tiles,
    draw_cases,
    encode_tiles,
    finish_tiles,
    tile_features,
    typical_shape,
)
from pretrain.volumes import CaseInfo, Volume

logger = logging.getLogger("autoseg")

_ENOUGH = 0.75  # of the neighbours of a region are not air


@dataclass(frozen=True)
class RPLConfig(Schedule):
    """What `--set rpl.NAME=VALUE` can change."""

    volumes: Annotated[int, Field(ge=1)] | None = None
    """Volumes of a batch; none: as many as the plan leaves memory for, and at least four for an optimiser step."""
    neighbours: Annotated[int, Field(ge=1, le=8)] = 4
    """Neighbours of each centre tile that are asked for."""
    embedding: Annotated[int, Field(ge=4)] = 64
    """Numbers that describe a tile."""
    hidden: Annotated[int, Field(ge=8)] = 512
    """Width of the layer that compares two tiles."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of that layer."""


@dataclass(frozen=True)
class RPLSpec:
    """What is cut from every volume."""

    grid: TileGrid
    batch: BatchSize
    neighbours: int

    @property
    def classes(self) -> int:
        """Neighbours of the centre: 26, or 8 where the grid is flat."""
        return self.grid.tiles - 1

    @property
    def centre(self) -> int:
        return self.grid.tiles // 2


class RPL(PretrainMethod):
    """The middle tile of a grid and one of its neighbours are described by the encoder; a classifier names the neighbour."""

    Config = RPLConfig
    presets = {  # noqa: RUF012
        "default": {},
        # 300 steps on two cores: minutes
        "cpu": {"steps": 300, "volumes": 4, "embedding": 32, "hidden": 128},
    }
    citation = "Taleb et al.: 3D Self-Supervised Methods for Medical Imaging (NeurIPS 2020, arXiv:2006.03829)"

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: RPLConfig) -> RPLSpec:
        dims = target.encoder.spatial_dims
        grid = choose_grid([3] * dims, target.encoder.total_stride, target.patch_size, typical_shape(pool, dims))
        check_pool(grid, pool)
        spec = RPLSpec(grid, batch_size(target, grid, 1 + config.neighbours, config.volumes), config.neighbours)
        logger.info(
            "RPL asks which of %d neighbours (chance %.3f) %d tiles are, in a grid of %s; %s",
            spec.classes,
            1 / spec.classes,
            config.neighbours,
            grid,
            spec.batch,
        )
        return spec

    @staticmethod
    def draw(spec: RPLSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, None]]:
        return [(case, None) for case in draw_cases(spec.grid, pool, spec.batch.volumes, rng)]

    @staticmethod
    def sample(spec: RPLSpec, case: Volume, parameters: None, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One region.

        Returns:
            tiles (1 + q, channels, *size), the centre first; labels (q,), all different; valid (q,): neither tile is air.
        """

        def attempt() -> tuple[tuple[list[np.ndarray], np.ndarray, np.ndarray], float]:
            labels = rng.choice(spec.classes, size=spec.neighbours, replace=False)
            asked = [spec.centre, *neighbour_index(labels, spec.centre)]
            tiles, air = cut_tiles(spec.grid, volume_or_plane(case, spec.grid.dims, rng), asked, rng)
            valid = ~air[1:] & ~air[0]
            return (tiles, labels, valid), float(valid.mean())

        (tiles, labels, valid), _ = best_of(10, attempt, _ENOUGH)
        return {"tiles": finish_tiles(spec.grid, tiles, case.info, rng), "labels": labels, "valid": valid}

    def __init__(self, network: nn.Module, spec: RPLSpec, config: RPLConfig) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = encoder_of(network)
        self.embedding = nn.Linear(tile_features(self.encoder, spec.grid), config.embedding)
        self.head = classifier(2 * config.embedding, config.hidden, spec.classes, config.dropout)

    def stages(self) -> Sequence[Stage]:
        return [self.config.stage(self.spec.batch.accumulate)]

    def answers(self, batch: Batch) -> Tensor:
        """Logits (volumes, q, classes)."""
        described = self.embedding(encode_tiles(self.encoder, batch["tiles"], self.spec.batch.at_once))
        centre, neighbours = described[:, :1], described[:, 1:]
        return self.head(torch.cat([centre.expand_as(neighbours), neighbours], -1))

    def loss(self, batch: Batch, step: Step) -> Terms:
        """Cross-entropy, and `acc`."""
        return class_loss(self.answers(batch), batch["labels"], batch["valid"])

    def chance(self) -> Mapping[str, float]:
        return {"acc": 1 / self.spec.classes}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        advice = (
            "RPL starts slowly: thousands of steps were needed on abdominal scans. If it stays so, see whether all scans "
            "are oriented alike, or try another learning rate"
        )
        return still_guessing(recent, step, self.spec.classes, advice)

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.rpl_picture import draw_task

        return draw_task(self.spec.grid.grid, batch, probabilities(self.answers(batch)))

    def export(self) -> Export:
        return Export(self.encoder, "encoder")


def neighbour_index(labels: np.ndarray, centre: int) -> np.ndarray:
    """Classes → numbers of the tiles: the centre is left out of the count."""
    return labels + (labels >= centre)


def neighbour_offset(label: int, grid: Sequence[int]) -> tuple[int, ...]:
    """Class → where the neighbour lies from the centre, in tiles: -1, 0 or 1 on each axis."""
    index = int(neighbour_index(np.array(label), int(np.prod(grid)) // 2))
    return tuple(int(place) - n // 2 for place, n in zip(np.unravel_index(index, tuple(grid)), grid, strict=True))
