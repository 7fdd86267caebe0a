"""VoCo's task as a picture: a volume with its grid, the random crops, and where the network believes they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pretrain.method import Batch
from pretrain.methods.voco_geometry import Layout

_COLOURS = ("tab:red", "tab:cyan", "tab:orange", "tab:green", "tab:pink", "tab:olive")
_MOST_CROPS = 4
_MOST_VOLUMES = 2


def draw_task(layout: Layout, batch: Batch, similarity: Tensor) -> Figure:
    """One row for each of the first volumes: the levels of the grid with the random crops outlined, then a bar chart a crop.

    Args:
        similarity: (volumes, n, K), the network's answers.
    """
    shown = {key: batch[key].cpu().numpy() for key in ("overview", "labels", "offsets", "bases_valid", "crops_valid")}
    answers = similarity.float().cpu().numpy()
    volumes = min(len(answers), _MOST_VOLUMES)
    crops = min(answers.shape[1], _MOST_CROPS)
    levels = shown["overview"].shape[1]
    figure = Figure(figsize=(2.6 * (levels + crops), 3.0 * volumes + 0.5), layout="constrained")
    axes = figure.subplots(volumes, levels + crops, squeeze=False)
    for volume, row in enumerate(axes):
        for level in range(levels):
            _draw_level(row[level], layout, {key: value[volume] for key, value in shown.items()}, level, crops)
        for crop in range(crops):
            _draw_answer(row[levels + crop], shown, answers, volume, crop)
    figure.suptitle(
        "Held-out volumes. Grey: share of the crop that lies in each base crop; coloured: the network's answer"
    )
    return figure


def _draw_level(axis: Any, layout: Layout, one: dict[str, np.ndarray], level: int, crops: int) -> None:
    image = one["overview"][level].astype(np.float32)
    low, high = np.quantile(image, [0.01, 0.99])
    axis.imshow(
        image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect="auto" if image.shape[0] < 8 else "equal"
    )
    (cy, cx), (gy, gx) = layout.crop[-2:], layout.grid[-2:]
    for y in range(gy):
        for x in range(gx):
            index = (level * gy + y) * gx + x
            axis.add_patch(
                Rectangle((x * cx - 0.5, y * cy - 0.5), cx, cy, fill=False, edgecolor="yellow", linewidth=0.8)
            )
            text = str(index) if one["bases_valid"][index] else f"{index}: padding"
            axis.text(x * cx + 0.04 * cx, y * cy + 0.12 * cy, text, color="yellow", fontsize=8)
    for number in range(crops):
        *above, y, x = one["offsets"][number]
        if above and round(above[0] / layout.crop[0]) != level:
            continue
        inset = 0.02 * (1 + number) * min(cy, cx)  # so that crops at the same place can be told apart
        axis.add_patch(
            Rectangle(
                (x - 0.5 + inset, y - 0.5 + inset),
                cx - 2 * inset,
                cy - 2 * inset,
                fill=False,
                edgecolor=_COLOURS[number],
                linewidth=2,
            )
        )
        axis.text(
            x + cx / 2,
            y + cy * (0.35 + 0.13 * number),
            f"crop {number + 1}",
            color=_COLOURS[number],
            ha="center",
            fontsize=9,
        )
    axis.set_title(
        f"base crops, level {level + 1} of {layout.grid[0]}" if len(layout.grid) == 3 else "base crops", fontsize=9
    )
    axis.set_xticks([])
    axis.set_yticks([])


def _draw_answer(axis: Any, shown: dict[str, np.ndarray], answers: np.ndarray, volume: int, crop: int) -> None:
    labels, answer = shown["labels"][volume, crop], answers[volume, crop]
    bases = np.arange(len(labels))
    axis.bar(bases - 0.2, labels, 0.4, color="0.6")
    axis.bar(bases + 0.2, answer, 0.4, color=_COLOURS[crop])
    axis.set_ylim(0, 1.05)
    axis.set_xticks(bases)
    axis.set_xlabel("base crop", fontsize=8)
    verdict = "right" if labels[answer.argmax()] > labels.max() - 1e-6 else "wrong"
    if not shown["crops_valid"][volume, crop]:
        verdict = "not counted"
    axis.set_title(f"crop {crop + 1}: {verdict}", fontsize=9, color=_COLOURS[crop])
    axis.tick_params(labelsize=7)
