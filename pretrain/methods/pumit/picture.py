"""PUMIT's task as a picture: crops, what the tokenizer makes of them, and what the transformer makes of the masked ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from pretrain.method import Batch

_MOST_CROPS = 4
_HIDDEN = (0.25, 0.3, 0.45)


def draw_task(
    batch: Batch, tokens: Tensor, restored: Tensor, masked: Tensor | None, predicted: Tensor | None
) -> Figure:
    """One row a crop, its middle slice: the image, restored from its tokens, their likeliest codes; and in stage mim the image
    without what was masked, and restored from the visible tokens and the predicted ones.

    Args:
        tokens: (N, z', y', x', codes). restored, predicted: (N, 1, z, y, x) in [0, 1]. masked: (N, tokens).
    """
    count = min(_MOST_CROPS, len(tokens))
    images = batch["image"][:count, 0].float().cpu().numpy()
    grid = tokens.shape[1:4]
    columns = ["crop", "restored from its tokens", "likeliest code of each token"]
    if masked is not None:
        columns += ["what the transformer sees", "masked tokens predicted"]
    figure = Figure(figsize=(2.6 * len(columns), 2.7 * count + 0.9), layout="constrained")
    rows = figure.subplots(count, len(columns), squeeze=False)
    for number, image in enumerate(images):
        middle = len(image) // 2
        level = middle * grid[0] // len(image)
        codes = tokens[number, level].argmax(-1).cpu().numpy()
        panels = [image[middle], _slice(restored, number, middle), None]
        if masked is not None and predicted is not None:
            hidden = masked[number].reshape(grid)[level].cpu().numpy()
            panels += [_covered(image[middle], hidden), _slice(predicted, number, middle)]
        for axis, panel, title in zip(rows[number], panels, columns, strict=True):
            if panel is None:
                _show_codes(axis, codes, tokens.shape[-1], image[middle].shape)
            else:
                axis.imshow(panel, cmap="gray", vmin=0, vmax=1)
            if panel is not None and panel is panels[-1] and masked is not None:
                _outline(axis, hidden, image[middle].shape)
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(title, fontsize=9)
        if not bool(batch["valid"][number]):
            rows[number, 0].set_ylabel("not counted", fontsize=9)
    what = "The tokenizer is being trained" if masked is None else "Framed: masked, predicted from the rest"
    figure.suptitle(f"Held-out crops (middle slices, DA {batch['degree']}). {what}", fontsize=10)
    return figure


def _slice(volumes: Tensor, number: int, index: int) -> np.ndarray:
    return volumes[number, 0, index].float().clamp(0, 1).cpu().numpy()


def _enlarged(plane: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Tokens (y', x') as pixels."""
    return plane.repeat(shape[0] // plane.shape[0], 0).repeat(shape[1] // plane.shape[1], 1)


def _covered(plane: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """A slice in colours, one colour where nothing is seen."""
    coloured = np.repeat(plane[..., None], 3, -1)
    coloured[_enlarged(hidden, plane.shape)] = _HIDDEN
    return coloured


def _show_codes(axis: Any, codes: np.ndarray, number: int, shape: tuple[int, ...]) -> None:
    """Each code in a colour of its own; which, says nothing."""
    order = np.random.default_rng(0).permutation(number)
    colours = hsv_to_rgb(np.stack([order / number, 0.45 + 0.5 * (order % 2), 0.95 - 0.3 * (order % 3) / 2], -1))
    axis.imshow(
        _enlarged(codes, shape), cmap=ListedColormap(colours), vmin=-0.5, vmax=number - 0.5, interpolation="nearest"
    )
    if codes.size <= 64:
        height, width = (n // c for n, c in zip(shape, codes.shape, strict=True))
        for (y, x), code in np.ndenumerate(codes):
            shade = "black" if colours[code].mean() > 0.5 else "white"
            axis.text((x + 0.5) * width, (y + 0.5) * height, code, ha="center", va="center", fontsize=7, color=shade)


def _outline(axis: Any, hidden: np.ndarray, shape: tuple[int, ...]) -> None:
    height, width = (n // c for n, c in zip(shape, hidden.shape, strict=True))
    for y, x in np.argwhere(hidden):
        axis.add_patch(
            Rectangle((x * width - 0.5, y * height - 0.5), width, height, fill=False, edgecolor="tab:orange", lw=1.0)
        )
