"""Whether foreign weights should see the data as the plan has them, or the data should be prepared as the weights know them.

Both lose something, and both losses are shares in [0, 1]:

- spacing: keeping the plan's loses `1 - min(r, 1/r)` on the axis that differs most (r = spacing of the weights / spacing of
  the plan): structures have another size in voxels than the weights learned. Taking the weights' spacing loses the share of
  the plan's voxels that a coarser grid drops; a finer grid drops none, but enlarges the scans.
- intensity window of CT: keeping the plan's loses the part in which the two ranges do not overlap (1 - intersection/union).
  Taking the weights' loses the share of foreground voxels outside their window.

Where the scales cannot be compared (MR, unknown spacing), the plan is kept. Rules of this project; no paper gives any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planners.decisions import Decision, times
from planners.intensity import IntensityScheme
from pretrain.importers.weights import Weights

_CLOSE_ENOUGH = 0.2
"""Losses up to this of keeping the plan are not worth preparing the data again."""
_MOST_ENLARGEMENT = 8.0
"""Times as many voxels as the plan has; beyond that training would see too small a part of a scan."""


@dataclass(frozen=True)
class DataFit:
    """What the data should look like for some weights; None: as the plan has it."""

    spacing: tuple[float, ...] | None
    """mm, in the plan's order of axes."""
    intensity: tuple[IntensityScheme, ...] | None
    """One a channel."""
    decisions: tuple[Decision, ...]

    @property
    def keeps_the_plan(self) -> bool:
        return self.spacing is None and self.intensity is None


def fit_data(plan: Mapping[str, Any], settings: Mapping[str, Any], fingerprint: Mapping, weights: Weights) -> DataFit:
    """Decide spacing and intensities.

    Args:
        settings: the plan's configuration, `inherits_from` followed.
        fingerprint: of the dataset; `planners.fingerprint`.
    """
    spacing, about_spacing = _spacing(settings["spacing"], weights)
    intensity, about_intensity = _intensity(plan, fingerprint, weights)
    return DataFit(spacing, intensity, (about_spacing, *about_intensity))


def spacing_losses(planned: Sequence[float], learned: Sequence[float]) -> tuple[float, float]:
    """(loss of keeping the planned spacing, loss of taking the learned one); both in mm, the same axes."""
    ratios = [new / old for new, old in zip(learned, planned, strict=True)]
    kept = 1 - min(min(r, 1 / r) for r in ratios)
    taken = 1 - math.prod(min(1.0, 1 / r) for r in ratios)
    return kept, taken


def window_losses(
    planned: tuple[float, float], learned: tuple[float, float], share_inside: float
) -> tuple[float, float]:
    """(loss of keeping the planned window, loss of taking the learned one).

    Args:
        share_inside: share of foreground voxels inside the learned window.
    """
    common = max(0.0, min(planned[1], learned[1]) - max(planned[0], learned[0]))
    union = max(planned[1], learned[1]) - min(planned[0], learned[0])
    return 1 - common / union, 1 - share_inside


def _spacing(planned: Sequence[float], weights: Weights) -> tuple[tuple[float, ...] | None, Decision]:
    own = times([float(s) for s in planned])
    change = "plan_and_preprocess --spacing Z,Y,X --plan-name TAG, then -p"
    if weights.spacing is None:
        return None, Decision("spacing, mm", own, "the plan's; the weights' own is not known", change)
    if len(weights.spacing) != len(planned):
        because = f"the plan's; the weights are {weights.spatial_dims}D and tell nothing about all axes"
        return None, Decision("spacing, mm", own, because, change)
    theirs = times([float(s) for s in weights.spacing])
    kept, taken = spacing_losses(planned, weights.spacing)
    growth = math.prod(old / new for old, new in zip(planned, weights.spacing, strict=True))
    both = f"{kept:.0%} of the weights' scale is lost by keeping it, {taken:.0%} of the voxels by taking theirs"
    if kept <= _CLOSE_ENOUGH:
        return None, Decision("spacing, mm", own, f"the plan's: close to the weights' {theirs}", change)
    if taken >= kept:
        return None, Decision("spacing, mm", own, f"the plan's, not the weights' {theirs}: {both}", change)
    if growth > _MOST_ENLARGEMENT:
        because = f"the plan's, not the weights' {theirs}: scans would have {growth:.0f} times as many voxels"
        return None, Decision("spacing, mm", own, because, change)
    chosen = tuple(float(s) for s in weights.spacing)
    return chosen, Decision(
        "spacing, mm", theirs, f"the weights', not the plan's {own}: {both}", "-p PLAN keeps the plan"
    )


def _intensity(
    plan: Mapping[str, Any], fingerprint: Mapping, weights: Weights
) -> tuple[tuple[IntensityScheme, ...] | None, list[Decision]]:
    planned = [_scheme(entry) for entry in plan.get("autoseg", {}).get("intensity", [])]
    chosen, decisions = [], []
    for channel, scheme in enumerate(planned):
        name = plan["autoseg"]["intensity"][channel]["channel"]
        theirs = None if not weights.intensity else weights.intensity[min(channel, len(weights.intensity) - 1)]
        better, because = _scheme_of_channel(plan, fingerprint, channel, scheme, theirs)
        final = better or scheme
        chosen.append(final)
        change = (
            "-p PLAN keeps the plan" if better else "plan_and_preprocess --intensity SCHEME --plan-name TAG, then -p"
        )
        decisions.append(Decision(f"intensity of {name}", _text(final), because, change))
    return (tuple(chosen) if chosen != planned else None), decisions


def _scheme_of_channel(
    plan: Mapping[str, Any],
    fingerprint: Mapping,
    channel: int,
    planned: IntensityScheme,
    learned: IntensityScheme | None,
) -> tuple[IntensityScheme | None, str]:
    """The weights' scheme if it loses less, else None; and why."""
    if learned is None:
        return None, "the plan's; the weights' own is not known"
    if (learned.normalization, learned.window) == (planned.normalization, planned.window):
        return None, "the plan's, which is also the weights'"
    if learned.window is None or planned.normalization != "CTNormalization":
        return None, f"the plan's; the weights' ({_text(learned)}) is on another kind of scale"
    properties = plan["foreground_intensity_properties_per_channel"][str(channel)]
    own_range = planned.window or (properties["percentile_00_5"], properties["percentile_99_5"])
    inside = fingerprint["autoseg"]["channels"][channel]["window_share"].get(learned.name)
    if inside is None:
        return None, f"the plan's; how much lies in the weights' window ({_text(learned)}) was not measured"
    kept, taken = window_losses(own_range, learned.window, inside)
    both = f"{kept:.0%} of the ranges do not overlap if it is kept, {taken:.0%} of the foreground lies outside theirs"
    if kept <= _CLOSE_ENOUGH or taken >= kept:
        return None, f"the plan's, not the weights' {_text(learned)}: {both}"
    because = f"the weights', not the plan's {_text(planned)}: {both}"
    return IntensityScheme(learned.name, because, learned.window), because


def _scheme(entry: Mapping[str, Any]) -> IntensityScheme:
    window = entry["window"]
    return IntensityScheme(entry["scheme"], entry["because"], None if window is None else (window[0], window[1]))


def _text(scheme: IntensityScheme) -> str:
    if scheme.window is None:
        return scheme.name
    low, high = scheme.window
    return f"{scheme.name} [{low:g}, {high:g}]"
