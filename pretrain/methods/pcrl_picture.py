"""PCRL's task as a picture: what the encoder sees, what the decoder must give, and what it gives."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

_TITLE_WIDTH = 28  # characters; more would run into the next panel


class Panel(NamedTuple):
    """One image (channels, *space); its first channel and middle slice are shown."""

    title: str
    image: Tensor


def draw_panels(cases: Sequence[list[list[Panel]]], spacing: Sequence[float], title: str) -> Figure:
    """Cases beside each other, their rows below each other. A title that begins with `restored` gets the share of variance
    that the panel explains of the one before it. The second panel of a case is a target and decides black and white."""
    rows, columns = len(cases[0]), max(len(row) for row in cases[0])
    figure = Figure(figsize=(2.3 * columns * len(cases), 2.6 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns * len(cases), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, case in enumerate(cases):
        scale = _limits(case[0][1].image)
        for row, panels in enumerate(case):
            for column, panel in enumerate(panels):
                text = panel.title
                if panel.title.startswith("restored"):
                    text += f": {_explained(panel.image, panels[column - 1].image):.0%}"
                _show(axes[row][columns * number + column], panel.image, text, scale, spacing)
    figure.suptitle(title, fontsize=11)
    return figure


def _show(axis: Any, image: Tensor, title: str, limits: tuple[float, float], spacing: Sequence[float]) -> None:
    plane = image[0].float().cpu().numpy()
    if plane.ndim == 3:
        plane = plane[plane.shape[0] // 2]
    axis.imshow(plane, cmap="gray", vmin=limits[0], vmax=limits[1], aspect=spacing[-2] / spacing[-1])
    axis.set_title(textwrap.fill(title, _TITLE_WIDTH), fontsize=8)


def _limits(target: Tensor) -> tuple[float, float]:
    """Black and white of a case: percentiles of its first target."""
    values = target[0].float().cpu().numpy()
    low, high = np.quantile(values, [0.01, 0.99])
    return float(low), float(max(high, low + 1e-6))


def _explained(answer: Tensor, target: Tensor) -> float:
    return float(1 - ((answer.float() - target) ** 2).mean() / target.var().clamp(min=1e-8))
