"""Dice over the share of labels, and learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from autoseg.comparison.arms import Arm
from autoseg.comparison.board import percent
from autoseg.comparison.outcomes import Outcome
from autoseg.comparison.statistics import SHARE_OF_SCRATCH, Line

# Okabe and Ito's colours, told apart by colour-blind people too; scratch is black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6914")
_DASHES = ("-", "--", ":")
_LETTERS_PER_INCH = 11  # of a legend, about


def draw_dice_over_labels(lines: Sequence[Line]) -> Figure:
    """Left the mean Dice of each arm over the share of labels, right its paired difference to scratch with intervals."""
    arms = list(dict.fromkeys(line.arm for line in lines))
    fractions = sorted({line.fraction for line in lines})
    styles = _styles(arms)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    compared = [arm for arm in arms if any(line.arm == arm and line.difference for line in lines)]
    for arm in arms:
        own = [line for line in lines if line.arm == arm]
        left.plot(
            [line.fraction for line in own], [line.dice.mean for line in own], marker="o", label=arm, **styles[arm]
        )
    for position, arm in enumerate(compared):
        own = [line for line in lines if line.arm == arm and line.difference is not None]
        # Beside each other, so that intervals can be told apart.
        x = [line.fraction * 1.06 ** (position - (len(compared) - 1) / 2) for line in own]
        means = [line.difference.mean for line in own if line.difference is not None]
        right.plot(x, means, marker="o", **styles[arm])
        for at, line in zip(x, own, strict=True):
            if line.difference is not None and line.difference.low is not None and line.difference.high is not None:
                right.plot([at, at], [line.difference.low, line.difference.high], **{**styles[arm], "linestyle": "-"})
    right.axhline(0, color="black", linewidth=1)
    left.set(ylabel="mean Dice of held-out cases", title="Dice")
    right.set(ylabel="Dice, arm minus scratch", title="Paired difference to scratch, 95 % intervals")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(fractions))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(fractions, [_labels(lines, fraction) for fraction in fractions])
        axis.set_xlim(min(fractions) / 1.3, max(fractions) * 1.3)
        axis.set_xlabel("share of the training cases with labels")
        axis.grid(axis="y", color="0.9")
    figure.legend(loc="outside lower center", ncols=_columns(figure, arms), frameon=False)
    return figure


def draw_learning_curves(outcomes: Sequence[Outcome], arms: Sequence[Arm]) -> Figure:
    """A panel for each share of labels: Dice of validation patches over epochs, mean of the trainings and their range."""
    fractions = sorted({outcome.training.fraction for outcome in outcomes})
    names = [arm.name for arm in arms if any(outcome.training.arm == arm for outcome in outcomes)]
    styles = _styles(names)
    figure = Figure(figsize=(max(6.0, 4.2 * len(fractions)), 4.4), layout="constrained")
    axes = figure.subplots(1, len(fractions), sharey=True, squeeze=False)[0]
    for axis, fraction in zip(axes, fractions, strict=True):
        for name in names:
            curves = [o.curve for o in outcomes if (o.training.arm.name, o.training.fraction) == (name, fraction)]
            if not curves or not min(map(len, curves)):
                continue
            table = np.array([curve[: min(map(len, curves))] for curve in curves])
            epochs, mean = np.arange(1, table.shape[1] + 1), table.mean(0)
            label = name if axis is axes[0] else None
            axis.plot(epochs, mean, label=label, marker="o" if len(epochs) == 1 else None, **styles[name])
            if len(table) > 1:
                axis.fill_between(
                    epochs, table.min(0), table.max(0), color=styles[name]["color"], alpha=0.12, linewidth=0
                )
            if name.startswith("scratch"):
                axis.axhline(SHARE_OF_SCRATCH * mean[-1], color="0.6", linewidth=1, linestyle=styles[name]["linestyle"])
        axis.set(title=f"{percent(fraction)} of the labels", xlabel="epoch", ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", color="0.9")
    axes[0].set_ylabel("Dice of validation patches")
    figure.legend(loc="outside lower center", ncols=_columns(figure, names), frameon=False,
                  title="grey: 90 % of what scratch ends with")  # fmt: skip
    return figure


def _columns(figure: Figure, names: Sequence[str]) -> int:
    """Columns of the legend that fit beside each other: an arm's options make its name long."""
    widest = max(map(len, names)) + 6  # with the line before it
    return max(1, min(len(names), 5, int(_LETTERS_PER_INCH * figure.get_figwidth() / widest)))


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash of each arm; scratch is black, its configurations differ in dashes."""
    scratch = [name for name in names if name.startswith("scratch")]
    others = [name for name in names if name not in scratch]
    styles = {name: {"color": "black", "linestyle": _DASHES[i % len(_DASHES)]} for i, name in enumerate(scratch)}
    for index, name in enumerate(others):
        dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        styles[name] = {"color": _COLOURS[index % len(_COLOURS)], "linestyle": dash}
    return styles


def _labels(lines: Sequence[Line], fraction: float) -> str:
    counts = [n for line in lines if line.fraction == fraction for n in line.training_cases]
    few, most = min(counts), max(counts)
    return f"{percent(fraction)}\n{few if few == most else f'{few}-{most}'} case{'' if most == 1 else 's'}"
