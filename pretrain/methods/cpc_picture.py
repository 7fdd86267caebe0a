"""CPC's task as a picture: the grid of a scan, and the same with the tiles that the network expects in the lower rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from pretrain.method import Batch
from pretrain.pictures import RIGHT, TRUTH, WRONG, show_montage

if TYPE_CHECKING:
    from pretrain.methods.cpc import CPCSpec

_VOLUMES = 3


def draw_task(spec: CPCSpec, batch: Batch, predicted: Tensor, true: Tensor, valid: Tensor) -> Figure:
    """One row for each of the first volumes.

    Args:
        predicted, true: vectors (volumes, rows below, columns, D); valid: (volumes, rows below, columns).
    """
    tiles = batch["tiles"].cpu().numpy()
    count, total = min(len(tiles), _VOLUMES), spec.grid.tiles
    width = len(tiles[0]) // spec.rows
    levels, rows, columns = (1,) * (3 - spec.grid.dims) + tuple(spec.grid.grid)
    panel_width = 0.8 + 1.5 * levels
    tile_height, tile_width = tiles.shape[-2:]
    panel_height = panel_width * rows * tile_height / (levels * columns * tile_width)
    figure = Figure(figsize=(2 * panel_width, (panel_height + 0.5) * count + 0.5), layout="constrained")
    axes = figure.subplots(count, 2, squeeze=False)
    for volume, row in enumerate(axes):
        shown = list(tiles[volume])
        truth: list[str | None] = [None] * total
        frames: list[str | None] = [None] * total
        right, asked = 0, 0
        for below in range(predicted.shape[1]):
            candidates = functional.normalize(true[:, below].flatten(0, 1), dim=-1)
            scores = functional.normalize(predicted[volume, below], dim=-1) @ candidates.T
            allowed = valid[:, below].flatten()
            chosen = scores.masked_fill(~allowed, -torch.inf).argmax(1).tolist()
            for column, answer in enumerate(chosen):
                if not valid[volume, below, column]:
                    continue
                place = (spec.known + below) * width + column
                whose, which = divmod(answer, width)
                shown[place] = tiles[whose][(spec.known + below) * width + which]
                correct = answer == volume * width + column
                truth[place], frames[place] = TRUTH, RIGHT if correct else WRONG
                right, asked = right + correct, asked + 1
        by_place = {int(tile): position for position, tile in enumerate(spec.order)}
        in_grid = [by_place[tile] for tile in range(total)]
        show_montage(
            row[0],
            tiles[volume][in_grid],
            spec.grid.grid,
            [truth[i] for i in in_grid],
            "as it is; orange: to be told from the rest",
        )
        show_montage(
            row[1],
            [shown[i] for i in in_grid],
            spec.grid.grid,
            [frames[i] for i in in_grid],
            f"as the network expects it: {right} of {asked} right",
        )
    where = "; the levels of the grid side by side" if levels > 1 else ""
    figure.suptitle(f"Held-out scans{where}. Right: the most similar tile of the batch", fontsize=10)
    return figure
