"""Jigsaw: tell in which order the tiles of a grid were shuffled.

Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv:2006.03829 (3D jigsaw puzzles), after
Noroozi, Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016, arXiv:1603.09246.
Consulted: HealthML/self-supervised-3d-tasks (GPL-3.0), for what it does, not its code.

Differs from the authors' code on purpose: permutations chosen by their distance, as both papers say; several puzzles are made
from tiles that are encoded once; wider gaps; regions of air are left out; each tile is standardised; the grid follows the
plan, so anisotropic and 2D data work.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from planners.decisions import times
from planners.errors import PlanError
from pretrain.classes import class_loss, probabilities, still_guessing
from pretrain.crops import best_of, volume_or_plane
from pretrain.encoders import encoder_of
from pretrain.heads import classifier
from pretrain.method import Batch, Export, PretrainMethod, Stage, Step, Target, Terms
from pretrain.methods.jigsaw_permutations import (
    FIELD_SIZES,
    choose_permutations,
    most_permutations,
    smallest_distance,
)
from pretrain.schedule import Schedule
from pretrain.tiles import (
    AIR_SHARE,
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

_MANY_SCANS = 1000
_MANY_PERMUTATIONS, _PERMUTATIONS = 1000, 100
_OF_FEW_TILES = {4: 12, 8: 50, 9: 64}  # more would lie closer together


@dataclass(frozen=True)
class JigsawConfig(Schedule):
    """What `--set jigsaw.NAME=VALUE` can change."""

    tiles: Annotated[int, Field(ge=2, le=4)] = 3
    """Tiles along each axis; in 3D one axis may have too few voxels for as many and gets fewer."""
    permutations: Annotated[int, Field(ge=2)] | None = None
    """Orders to choose from, that is classes; none: 100, or 1000 from 1000 scans on, and fewer for 9 tiles or less."""
    choice: Literal["greedy", "affine"] = "greedy"
    """How the orders are chosen. greedy: far apart among random ones. affine: the farthest apart there are, for 4, 8, 9 or 27
    tiles."""
    volumes: Annotated[int, Field(ge=1)] | None = None
    """Volumes of a batch; none: as many as the plan leaves memory for, and at least four for an optimiser step."""
    puzzles: Annotated[int, Field(ge=1, le=16)] = 2
    """Orders into which the tiles of a region are put."""
    embedding: Annotated[int, Field(ge=4)] = 64
    """Numbers that describe a tile."""
    hidden: Annotated[int, Field(ge=8)] = 1024
    """Width of the layer that sees all tiles."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of that layer."""


@dataclass(frozen=True)
class JigsawSpec:
    """What is cut from every volume."""

    grid: TileGrid
    batch: BatchSize
    permutations: int
    choice: Literal["greedy", "affine"]
    puzzles: int


class Jigsaw(PretrainMethod):
    """The encoder describes every tile alone; a classifier sees the descriptions in the shuffled order and names the order."""

    Config = JigsawConfig
    presets = {  # noqa: RUF012
        "default": {},
        # 300 steps on two cores: minutes. 27 tiles would not be learned in them.
        "cpu": {"steps": 300, "tiles": 2, "permutations": 12, "volumes": 8, "embedding": 32, "hidden": 128},
    }
    citation = "Taleb et al.: 3D Self-Supervised Methods for Medical Imaging (NeurIPS 2020, arXiv:2006.03829)"

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: JigsawConfig) -> JigsawSpec:
        dims = target.encoder.spatial_dims
        grid = choose_grid(
            [config.tiles] * dims,
            target.encoder.total_stride,
            target.patch_size,
            typical_shape(pool, dims),
            one_by_one=True,
            smaller={f"--set jigsaw.tiles={n}": [n] * dims for n in range(config.tiles - 1, 1, -1)},
        )
        check_pool(grid, pool)
        count = config.permutations or permutation_count(grid.tiles, len(pool), config.choice)
        _check_permutations(grid, count, config.choice)
        batch = batch_size(target, grid, grid.tiles, config.volumes)
        spec = JigsawSpec(grid, batch, count, config.choice, config.puzzles)
        logger.info(
            "The jigsaw has %d orders (chance %.3f) of %s; %d puzzles from each region; %s",
            count,
            1 / count,
            grid,
            config.puzzles,
            spec.batch,
        )
        return spec

    @staticmethod
    def draw(
        spec: JigsawSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step
    ) -> list[tuple[str, None]]:
        return [(case, None) for case in draw_cases(spec.grid, pool, spec.batch.volumes, rng)]

    @staticmethod
    def sample(spec: JigsawSpec, case: Volume, parameters: None, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One region.

        Returns:
            tiles (tiles, channels, *size) in the order of the grid; labels (puzzles,): the orders they are to be put into;
            valid (puzzles,): the region is not mostly air.
        """

        def attempt() -> tuple[tuple[list[np.ndarray], float], float]:
            tiles, air = cut_tiles(spec.grid, volume_or_plane(case, spec.grid.dims, rng), range(spec.grid.tiles), rng)
            shown = 1 - float(air.mean())
            return (tiles, shown), shown

        (tiles, shown), _ = best_of(10, attempt, 1 - AIR_SHARE)
        return {
            "tiles": finish_tiles(spec.grid, tiles, case.info, rng),
            "labels": rng.integers(spec.permutations, size=spec.puzzles),
            "valid": np.full(spec.puzzles, shown >= 1 - AIR_SHARE),
        }

    permutations: Tensor
    """(classes, tiles): slot s of class p shows tile permutations[p, s]."""

    def __init__(self, network: nn.Module, spec: JigsawSpec, config: JigsawConfig) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = encoder_of(network)
        self.embedding = nn.Linear(tile_features(self.encoder, spec.grid), config.embedding)
        self.head = classifier(spec.grid.tiles * config.embedding, config.hidden, spec.permutations, config.dropout)
        # A buffer: a run that goes on has the orders it began with.
        chosen = choose_permutations(spec.grid.tiles, spec.permutations, spec.choice)
        self.register_buffer("permutations", torch.from_numpy(chosen))
        logger.info("Any two orders differ at %d of %d places or more", smallest_distance(chosen), spec.grid.tiles)

    def stages(self) -> Sequence[Stage]:
        return [self.config.stage(self.spec.batch.accumulate)]

    def answers(self, batch: Batch) -> Tensor:
        """Logits (volumes, puzzles, classes). Tiles are encoded before they are shuffled: each is encoded alone, so it comes
        to the same and a second puzzle costs nothing."""
        described = self.embedding(encode_tiles(self.encoder, batch["tiles"], self.spec.batch.at_once))
        return self.head(shuffled(described, self.permutations[batch["labels"]]).flatten(2))

    def loss(self, batch: Batch, step: Step) -> Terms:
        """Cross-entropy, and `acc`."""
        return class_loss(self.answers(batch), batch["labels"], batch["valid"])

    def chance(self) -> Mapping[str, float]:
        return {"acc": 1 / self.spec.permutations}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        advice = "Fewer tiles (--set jigsaw.tiles=2) or orders (jigsaw.permutations) make the puzzle easier"
        return still_guessing(recent, step, self.spec.permutations, advice)

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.jigsaw_picture import draw_task

        return draw_task(
            self.spec.grid.grid, batch, self.permutations.cpu().numpy(), probabilities(self.answers(batch))
        )

    def export(self) -> Export:
        return Export(self.encoder, "encoder")


def shuffled(tiles: Tensor, orders: Tensor) -> Tensor:
    """Tiles (volumes, tiles, …) and orders (volumes, puzzles, tiles) → (volumes, puzzles, tiles, …)."""
    return torch.stack([one[order] for one, order in zip(tiles, orders, strict=True)])


def permutation_count(tiles: int, scans: int, choice: Literal["greedy", "affine"]) -> int:
    """Orders to choose from: a class of 1000 sees too few examples in a small pool."""
    wanted = _OF_FEW_TILES.get(tiles, _MANY_PERMUTATIONS if scans >= _MANY_SCANS else _PERMUTATIONS)
    return min(wanted, most_permutations(tiles, choice))


def _check_permutations(grid: TileGrid, count: int, choice: Literal["greedy", "affine"]) -> None:
    if choice == "affine" and grid.tiles not in FIELD_SIZES:
        raise PlanError(
            "There is no affine set of orders for this grid",
            found=f"{times(grid.grid)} = {grid.tiles} tiles",
            expected=" or ".join(map(str, FIELD_SIZES)),
            remedy="--set jigsaw.choice=greedy",
        )
    most = most_permutations(grid.tiles, choice)
    if count > most:
        raise PlanError(
            "There are not as many orders",
            found=count,
            expected=f"at most {most} for {times(grid.grid)} tiles",
            remedy=f"--set jigsaw.permutations={most}",
        )
