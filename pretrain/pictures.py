"""Drawing tiles and answers, as several methods' pictures do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

RIGHT, WRONG, TRUTH = "tab:green", "tab:red", "tab:orange"


def middle_slice(tile: np.ndarray) -> np.ndarray:
    """(channels, *space) → one grey image (y, x): the first channel, halfway down."""
    image = tile[0].astype(np.float32)
    return image[len(image) // 2] if image.ndim == 3 else image


def show(axis: Any, image: np.ndarray, title: str = "", colour: str | None = None) -> None:
    """A grey image without ticks, with a coloured frame."""
    low, high = np.quantile(image, [0.01, 0.99])
    axis.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
    axis.set_box_aspect(1)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=9, **({} if colour is None else {"color": colour}))
    for spine in axis.spines.values():
        spine.set_edgecolor(colour or "0.7")
        spine.set_linewidth(2.5 if colour else 0.8)


def show_montage(
    axis: Any, tiles: Sequence[np.ndarray], grid: tuple[int, ...], colours: list[str | None], title: str
) -> None:
    """Tiles, each (channels, *space), at their places in `grid`, with frames; the levels of a grid of three axes stand side
    by side."""
    levels, rows, columns = (1,) * (3 - len(grid)) + tuple(grid)
    images = [middle_slice(tile) for tile in tiles]
    height, width = images[0].shape
    gap = max(1, round(0.08 * max(height, width)))
    between = 3 * gap
    level_width = columns * (width + gap) + between
    canvas = np.full((rows * (height + gap), levels * level_width - between), np.nan, np.float32)
    for number, image in enumerate(images):
        level, row, column = np.unravel_index(number, (levels, rows, columns))
        y, x = row * (height + gap), level * level_width + column * (width + gap)
        canvas[y : y + height, x : x + width] = image
        if colours[number] is not None:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colours[number], lw=1.6))
    low, high = np.nanquantile(canvas, [0.01, 0.99])
    axis.imshow(canvas, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)


def show_places(axis: Any, shares: np.ndarray, grid: tuple[int, ...], truth: int, empty: int, title: str) -> None:
    """Probabilities (tiles,) at their places in `grid`, the true one framed, the tile `empty` crossed out."""
    levels, rows, columns = (1,) * (3 - len(grid)) + tuple(grid)
    canvas = np.full((rows, levels * (columns + 1) - 1), np.nan)
    for number, share in enumerate(shares):
        level, row, column = np.unravel_index(number, (levels, rows, columns))
        x = int(level * (columns + 1) + column)
        canvas[row, x] = np.nan if number == empty else share
        axis.add_patch(Rectangle((x - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="0.8", lw=0.6))
        if number == empty:
            axis.plot(x, row, marker="x", color="0.5", markersize=7)
        if number == truth:
            axis.add_patch(Rectangle((x - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=TRUTH, lw=2.5, zorder=3))
    axis.imshow(canvas, cmap="Blues", vmin=0, vmax=max(0.2, float(np.nanmax(canvas))))
    axis.set_xlim(-0.6, canvas.shape[1] - 0.4)  # room for the frames
    axis.set_ylim(rows - 0.4, -0.6)
    axis.set_axis_off()
    axis.set_title(title, fontsize=9)
