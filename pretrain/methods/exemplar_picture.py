"""Exemplar's task as a picture: pairs of views, the partner the network finds for each, and how alike it finds all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.method import Batch
from pretrain.planes import show_planes

if TYPE_CHECKING:
    from pretrain.methods.exemplar import ExemplarSpec

_MOST_VOLUMES = 5


def draw_task(spec: ExemplarSpec, batch: Batch, embeddings: Tensor) -> Figure:
    """One column a volume: its two views, and the second view of the volume the network takes for its partner; a matrix.

    Args:
        embeddings: unit vectors (volumes, 2, embedding).
    """
    views = batch["views"][:, :, 0].float().cpu().numpy()
    usable = (batch["case"] >= 0).cpu().numpy()
    cosine = (embeddings[:, 0] @ embeddings[:, 1].T).float().cpu().numpy()
    answers = np.where(usable[None], cosine, -2).argmax(1)
    volumes = min(len(views), _MOST_VOLUMES)
    figure = Figure(figsize=(2.6 * volumes + 4.5, 8.5), layout="constrained")
    grid = figure.add_gridspec(3, volumes + 1, width_ratios=[*[1] * volumes, 1.7])
    for number in range(volumes):
        found = answers[number]
        right = found == number
        colour = "tab:green" if right else "tab:red"
        title = f"network's answer: {'right' if right else f'scan {found + 1}, wrong'}"
        if not usable[number]:
            colour, title = "0.5", "not counted: nothing to see"
        elif usable.sum() == 1:
            colour, title = "0.5", "not counted: no other scan"
        for row, (image, text) in enumerate(
            [
                (views[number, 0], f"scan {number + 1}, view A"),
                (views[number, 1], "view B: the partner"),
                (views[found, 1], title),
            ]
        ):
            axis = figure.add_subplot(grid[row, number])
            show_planes(axis, image, spec.spacing)
            axis.set_title(text, fontsize=9, color=colour if row == 2 else "black")
    counted = np.flatnonzero(usable) if usable.sum() > 1 else np.array([], int)
    _draw_matrix(figure.add_subplot(grid[:, volumes]), cosine, answers, counted)
    figure.suptitle(
        "Held-out scans. Two views of one place (middle planes), mirrored, turned, tilted, zoomed, with another contrast.\n"
        "Last row: the view B that the network finds most like view A",
        fontsize=11,
    )
    return figure


def _draw_matrix(axis: Any, cosine: np.ndarray, answers: np.ndarray, counted: np.ndarray) -> None:
    """Rows: views A; columns: views B; a mark on the answer of each row that counts. The diagonal is right."""
    number = len(cosine)
    image = axis.imshow(cosine, cmap="viridis")
    axis.scatter(answers[counted], counted, marker="o", s=40, facecolors="none", edgecolors="red", linewidths=1.5)
    axis.set_xticks(range(number), [str(i + 1) for i in range(number)], fontsize=8)
    axis.set_yticks(range(number), [str(i + 1) for i in range(number)], fontsize=8)
    axis.set_xlabel("view B of scan", fontsize=9)
    axis.set_ylabel("view A of scan", fontsize=9)
    right = f"{np.mean(answers[counted] == counted):.0%} on the diagonal" if len(counted) else "nothing to compare"
    axis.set_title(f"likeness (cosine); circle: the answer\n{right}", fontsize=9)
    axis.figure.colorbar(image, ax=axis, shrink=0.5)
