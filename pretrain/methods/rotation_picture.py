"""Rotation's task as a picture: what the network sees, which turn it answers, and the crop turned back by that answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pretrain.method import Batch
from pretrain.planes import show_planes

if TYPE_CHECKING:
    from pretrain.methods.rotation import RotationSpec

_MOST_CROPS = 5


def draw_task(spec: RotationSpec, batch: Batch, answers: Tensor) -> Figure:
    """One column a crop: as it was turned, the bars of the answer, turned back by the answer, turned back by the truth.

    Args:
        answers: (crops, turns), probabilities.
    """
    crops = batch["crops"].flatten(0, 1)[:_MOST_CROPS, 0].float().cpu().numpy()
    truths = batch["turns"].flatten().tolist()
    valid = batch["valid"].flatten().tolist()
    dims = crops.ndim - 1
    figure = Figure(figsize=(2.9 * len(crops), 11.5), layout="constrained")
    rows = figure.subplots(4, len(crops), squeeze=False, height_ratios=[3, 1.9, 3, 3])
    for number, crop in enumerate(crops):
        seen, bars, back, upright = rows[:, number]
        answer, truth = int(answers[number].argmax()), truths[number]
        right = answer == truth
        colour, verdict = ("tab:green", "right") if right else ("tab:red", "wrong")
        if not valid[number]:
            colour, verdict = "0.5", "not counted"
        show_planes(seen, crop, _turned(spec, truth, spec.spacing))
        seen.set_title("what the network sees", fontsize=9)
        names = [turn.name(dims) for turn in spec.crop.turns]
        bars.barh(
            range(len(names)),
            answers[number].tolist(),
            color=[colour if i == answer else "0.75" for i in range(len(names))],
        )
        bars.set_yticks(range(len(names)), names, fontsize=7)
        bars.get_yticklabels()[truth].set_fontweight("bold")
        bars.plot([1.02], [truth], marker="<", color="black", markersize=5, clip_on=False)
        bars.set_xlim(0, 1)
        bars.set_xticks([0, 1])
        bars.invert_yaxis()
        bars.tick_params(labelsize=7)
        bars.set_title(f"answer {names[answer]}, true ◂ {names[truth]}\n{verdict}", fontsize=9, color=colour)
        for axis, turn, title in ((back, answer, "turned back by the answer"), (upright, truth, "as it was cut")):
            image = spec.crop.turns[turn](crop[None], back=True)[0]
            show_planes(axis, image, spec.spacing)
            axis.set_title(title, fontsize=9)
    figure.suptitle(
        "Held-out crops (middle planes) turned by quarters of a circle. Bars: how likely the network finds each turn; the "
        "arrow marks the true one.\nThe answer is right where the last two rows are alike",
        fontsize=11,
    )
    return figure


def _turned(spec: RotationSpec, turn: int, spacing: tuple[float, ...]) -> tuple[float, ...]:
    """The spacing on the axes of a turned crop: a quarter turn exchanges two."""
    chosen = spec.crop.turns[turn]
    exchanged = list(np.asarray(spacing))
    if chosen.quarters % 2:
        a, b = chosen.plane
        exchanged[a], exchanged[b] = exchanged[b], exchanged[a]
    return tuple(exchanged)
