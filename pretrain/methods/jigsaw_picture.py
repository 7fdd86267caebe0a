"""The jigsaw as a picture: the shuffled tiles, put together as the network answers, and as they were."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.method import Batch
from pretrain.pictures import RIGHT, WRONG, show_montage

_ROWS = 4


def draw_task(grid: tuple[int, ...], batch: Batch, permutations: np.ndarray, shares: Tensor) -> Figure:
    """One row for each of the first regions.

    Args:
        permutations: (classes, tiles); shares: probabilities (volumes, puzzles, classes).
    """
    tiles, labels, valid = (batch[key].cpu().numpy() for key in ("tiles", "labels", "valid"))
    count = min(len(tiles), _ROWS)
    levels = grid[0] if len(grid) == 3 else 1
    figure = Figure(figsize=(3 * (0.6 + 1.3 * levels), 1.9 * count + 0.7), layout="constrained")
    axes = figure.subplots(count, 3, squeeze=False)
    for row, one, label, share, counted in zip(
        axes, tiles[:count], labels[:count, 0], shares[:count, 0].numpy(), valid[:count, 0], strict=True
    ):
        answer = int(share.argmax())
        given = permutations[label]
        # Where the network would put what lies in each slot.
        built = np.empty_like(given)
        built[permutations[answer]] = given
        right = built == np.arange(len(built))
        plain: list[str | None] = [None] * len(given)
        verdict = f"{'right' if answer == label else 'wrong'}: {share[label]:.2f} for the true order"
        show_montage(row[0], one[given], grid, plain, "what it gets")
        show_montage(
            row[1],
            one[built],
            grid,
            [RIGHT if r else WRONG for r in right],
            verdict if counted else "not counted (air)",
        )
        show_montage(row[2], one, grid, plain, "as it was")
    where = "; the levels of the grid side by side" if levels > 1 else ""
    figure.suptitle(
        f"Held-out scans, one of {len(permutations)} orders each{where}.\nMiddle: tiles as the network puts them together, "
        "green at their places",
        fontsize=10,
    )
    return figure
