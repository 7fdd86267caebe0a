"""RPL's task as a picture: two tiles, and where the network believes the second lies beside the first."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.method import Batch
from pretrain.methods.rpl import neighbour_index
from pretrain.pictures import RIGHT, WRONG, middle_slice, show, show_places

_ROWS = 6


def draw_task(grid: tuple[int, ...], batch: Batch, shares: Tensor) -> Figure:
    """One row for each of the first questions.

    Args:
        shares: probabilities (volumes, q, classes).
    """
    tiles, labels, valid = (batch[key].cpu().numpy() for key in ("tiles", "labels", "valid"))
    answers = shares.numpy()
    count = int(np.prod(grid))
    # Questions of different volumes first.
    questions = [(v, q) for q in range(labels.shape[1]) for v in range(len(labels))][:_ROWS]
    levels = grid[0] if len(grid) == 3 else 1
    figure = Figure(figsize=(4.4 + 1.7 * levels, 1.9 * len(questions) + 0.9), layout="constrained")
    axes = figure.subplots(len(questions), 3, squeeze=False, width_ratios=[1, 1, 0.3 + levels])
    for row, (volume, number) in zip(axes, questions, strict=True):
        truth, answer = int(labels[volume, number]), answers[volume, number]
        by_tile = np.insert(answer, count // 2, 0)
        right = int(answer.argmax()) == truth
        verdict = ("right" if right else "wrong") if valid[volume, number] else "not counted (air)"
        show(row[0], middle_slice(tiles[volume, 0]), "tile")
        show(row[1], middle_slice(tiles[volume, 1 + number]), "which neighbour is this?")
        asked = int(neighbour_index(np.array(truth), count // 2))
        show_places(row[2], by_tile, grid, asked, count // 2, f"{verdict}: {answer[truth]:.2f} for the true place")
        row[2].title.set_color(RIGHT if right else WRONG)
    where = f"the {levels} levels of the grid side by side; " if levels > 1 else ""
    figure.suptitle(
        f"Held-out scans. Right: {where}× is the tile,\nblue how likely the network finds each place, orange the truth",
        fontsize=10,
    )
    return figure
