"""CPC: from the upper rows of a grid of tiles, tell which tiles lie below.

Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020, arXiv:2006.03829 (3D contrastive predictive
coding), after van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748.
Consulted: HealthML/self-supervised-3d-tasks (GPL-3.0), for what it does, not its code.

The loss is InfoNCE over all tiles of a row in the batch; the formula that Taleb et al. print has the sum over negatives inside
the exponential, which would be a product. Differs from the authors' code on purpose: cosine over a temperature instead of a
sigmoid with one negative; no overlap of tiles and no padding, which would tell the place, and no mirrored tiles, which would
lose the direction; tiles of air are neither asked for nor offered; rows and grid follow the plan, so anisotropic and 2D data
work.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from planners.anisotropy import degree_of_anisotropy
from pretrain import distributed
from pretrain.classes import still_guessing
from pretrain.crops import best_of, volume_or_plane
from pretrain.encoders import encoder_of
from pretrain.method import Batch, Export, PretrainMethod, Stage, Step, Target, Terms
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

_COLUMNS = 3  # of the grid, on each axis that is not that of the rows
_LEAST_VOLUMES = 2  # so that there are negatives of another scan


@dataclass(frozen=True)
class CPCConfig(Schedule):
    """What `--set cpc.NAME=VALUE` can change."""

    rows: Annotated[int, Field(ge=2, le=6)] = 4
    """Rows of the grid; from the upper half of them those below are predicted."""
    volumes: Annotated[int, Field(ge=1)] | None = None
    """Volumes of a batch, whose tiles are each other's negatives; none: as many as the plan leaves memory for, at least two."""
    embedding: Annotated[int, Field(ge=4)] = 256
    """Numbers that describe a tile."""
    context: Annotated[int, Field(ge=4)] = 256
    """Numbers that describe what lies above."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides the similarity of two tiles, which lies between -1 and 1."""


@dataclass(frozen=True)
class CPCSpec:
    """What is cut from every volume. In batches the axis of the rows comes first."""

    grid: TileGrid
    batch: BatchSize
    row_axis: int

    @property
    def rows(self) -> int:
        return self.grid.grid[self.row_axis]

    @property
    def columns(self) -> tuple[int, ...]:
        """Tiles of a row on each of the other axes."""
        return tuple(n for axis, n in enumerate(self.grid.grid) if axis != self.row_axis)

    @property
    def order(self) -> np.ndarray:
        """Numbers of the tiles, row by row."""
        return np.moveaxis(np.arange(self.grid.tiles).reshape(self.grid.grid), self.row_axis, 0).ravel()

    @property
    def known(self) -> int:
        """Rows of the context."""
        return self.rows // 2


class CPC(PretrainMethod):
    """A recurrent network reads the tiles above; what it predicts must resemble the tile that follows more than others."""

    Config = CPCConfig
    presets = {  # noqa: RUF012
        "default": {},
        # 300 steps on two cores: minutes
        "cpu": {"steps": 300, "volumes": 2, "embedding": 64, "context": 64},
    }
    citation = "Taleb et al.: 3D Self-Supervised Methods for Medical Imaging (NeurIPS 2020, arXiv:2006.03829)"

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: CPCConfig) -> CPCSpec:
        dims = target.encoder.spatial_dims
        stride, shape = target.encoder.total_stride, typical_shape(pool, dims)
        row_axis = choose_row_axis(shape, stride, target.spacing)

        def with_rows(rows: int) -> list[int]:
            return [rows if axis == row_axis else _COLUMNS for axis in range(dims)]

        grid = choose_grid(
            with_rows(config.rows),
            stride,
            target.patch_size,
            shape,
            fixed_axis=row_axis,
            smaller={f"--set cpc.rows={rows}": with_rows(rows) for rows in range(config.rows - 1, 1, -1)},
        )
        check_pool(grid, pool)
        spec = CPCSpec(grid, batch_size(target, grid, grid.tiles, config.volumes, least=_LEAST_VOLUMES), row_axis)
        logger.info(
            "CPC reads %d of %d rows along %s and tells the rest, in a grid of %s; %s",
            spec.known,
            spec.rows,
            "zyx"[row_axis - dims],
            grid,
            spec.batch,
        )
        return spec

    @staticmethod
    def draw(spec: CPCSpec, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, None]]:
        return [(case, None) for case in draw_cases(spec.grid, pool, spec.batch.volumes, rng)]

    @staticmethod
    def sample(spec: CPCSpec, case: Volume, parameters: None, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One region.

        Returns:
            tiles (tiles, channels, *size), row by row; valid (tiles,): not air.
        """

        def attempt() -> tuple[tuple[list[np.ndarray], np.ndarray], float]:
            tiles, air = cut_tiles(spec.grid, volume_or_plane(case, spec.grid.dims, rng), spec.order, rng)  # type: ignore[arg-type]
            return (tiles, ~air), 1 - float(air.mean())

        (tiles, valid), _ = best_of(10, attempt, 1 - AIR_SHARE)
        return {"tiles": finish_tiles(spec.grid, tiles, case.info, rng), "valid": valid}

    sequences: Tensor
    """(columns, T): numbers of the tiles that each context is read from."""

    def __init__(self, network: nn.Module, spec: CPCSpec, config: CPCConfig) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.encoder = encoder_of(network)
        self.embedding = nn.Linear(tile_features(self.encoder, spec.grid), config.embedding)
        self.reader = nn.GRU(config.embedding, config.context, batch_first=True)
        below = range(spec.rows - spec.known)
        self.predictors = nn.ModuleList([nn.Linear(config.context, config.embedding) for _ in below])
        sequences = torch.from_numpy(context_sequences(spec.columns, spec.known - 1))
        self.register_buffer("sequences", sequences, persistent=False)

    def stages(self) -> Sequence[Stage]:
        return [self.config.stage(self.spec.batch.accumulate)]

    def embed(self, batch: Batch) -> Tensor:
        """Vectors (volumes, rows, columns, D)."""
        described = self.embedding(encode_tiles(self.encoder, batch["tiles"], self.spec.batch.at_once))
        return described.unflatten(1, (self.spec.rows, -1))

    def contexts(self, z: Tensor) -> Tensor:
        """What lies above each column, (volumes, columns, context), from the rows that are known."""
        sequences = z[:, : self.spec.known].flatten(1, 2)[:, self.sequences]
        _, last = self.reader(sequences.flatten(0, 1))
        return last[0].unflatten(0, sequences.shape[:2])

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of this process: predicted and true vectors (volumes, rows below, columns, D), and which are not air."""
        z = self.embed(batch)
        contexts = self.contexts(z)
        predicted = torch.stack([predictor(contexts) for predictor in self.predictors], 1)
        valid = batch["valid"].unflatten(1, (self.spec.rows, -1))[:, self.spec.known :]
        return predicted.float(), z[:, self.spec.known :].float(), valid

    def loss(self, batch: Batch, step: Step) -> Terms:
        """InfoNCE over the tiles of all processes, and `acc`: how often the true tile is the most similar."""
        predicted, true, valid = self.predict(batch)
        joint = self.gather(predicted), self.gather(true), self.gather(valid.to(torch.uint8)).bool()
        with torch.autocast(batch["tiles"].device.type, enabled=False):
            return row_loss(*joint, self.config.temperature)

    def chance(self) -> Mapping[str, float]:
        return {"acc": 1 / self._candidates}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        advice = "Another learning rate may help, and scans oriented alike"
        return still_guessing(recent, step, self._candidates, advice)

    @property
    def _candidates(self) -> int:
        return math.prod(self.spec.columns) * self.spec.batch.volumes * distributed.processes()

    @torch.no_grad()
    def picture(self, batch: Batch) -> Any:
        from pretrain.methods.cpc_picture import draw_task

        return draw_task(self.spec, batch, *self.predict(batch))

    def export(self) -> Export:
        return Export(self.encoder, "encoder")


def choose_row_axis(shape: Sequence[int], stride: Sequence[int], spacing: Sequence[float]) -> int:
    """The axis on which the scan is longest for the network, and never that of thick slices."""
    thick = len(spacing) == 3 and (degree_of_anisotropy(spacing) > 0 or stride[0] < max(stride))
    axes = range(1 if thick else 0, len(shape))
    return max(axes, key=lambda axis: shape[axis] / stride[axis])


def context_sequences(columns: Sequence[int], row: int) -> np.ndarray:
    """What each column's context is read from: numbers of tiles (row by row) of the rows 0 to `row`, (columns, T).

    A pyramid that ends in the tile of the column itself: `row` - u tiles to each side in row u, the farthest row first. Places
    beyond the border are reflected. An axis with a single tile has no sides.
    """
    table = []
    for column in np.ndindex(*columns):
        sequence = []
        for u in range(row + 1):
            sides = [range(-(row - u), row - u + 1) if n > 1 else range(1) for n in columns]
            for offset in itertools.product(*sides):
                place = [_reflected(c + o, n) for c, o, n in zip(column, offset, columns, strict=True)]
                sequence.append(u * math.prod(columns) + int(np.ravel_multi_index(place, tuple(columns))))
        table.append(sequence)
    return np.array(table)


def row_loss(predicted: Tensor, true: Tensor, valid: Tensor, temperature: float) -> Terms:
    """`loss` (InfoNCE) and `acc` over valid places, and `shown`, the share of the places that count.

    Each is compared with the valid places of its row in all volumes; one without any other is not counted: it cannot be
    mistaken. Where none counts the loss is 0, which has a gradient, and there is no `acc`.

    Args:
        predicted, true: (volumes, rows, columns, D); valid: (volumes, rows, columns), False for air.
    """
    losses, right, count = predicted.sum() * 0, predicted.new_zeros(()), 0
    for row in range(predicted.shape[1]):
        counted = valid[:, row]
        answers = functional.normalize(predicted[:, row][counted], dim=-1)
        candidates = functional.normalize(true[:, row][counted], dim=-1)
        scores = answers @ candidates.T / temperature
        if len(scores) < 2:
            continue
        own = torch.arange(len(scores), device=scores.device)
        losses = losses + functional.cross_entropy(scores, own, reduction="sum")
        right = right + (scores.argmax(1) == own).sum()
        count += len(scores)
    terms = {"loss": losses / max(1, count), "shown": predicted.new_tensor(count / valid.numel())}
    return terms | ({"acc": right / count} if count else {})


def _reflected(place: int, length: int) -> int:
    if length == 1:
        return 0
    turn = place % (2 * (length - 1))
    return min(turn, 2 * (length - 1) - turn)
