"""Preprocessing that leaves a scan's grid alone: for networks that take any spacing, and scans the plan was not made for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from planners.dataset import PICTURE_ENDINGS, Case, split_ending
from planners.plans import resolved
from planners.preprocess import preprocess_unlabelled

# nnU-Net wants a scheme for each channel, and how many a colour image or a 4D file has is known only when it is read.
_MOST_CHANNELS = 16
_UNRESAMPLED = "no_resampling_hack"  # the name of nnU-Net's function


def preprocess_on_own_grid(
    home_dataset: str,
    plan: dict,
    configuration: str,
    pool_name: str,
    cases: Sequence[Case],
    *,
    home_intensities: bool,
    workers: int | None = None,
) -> Path:
    """Preprocess scans without resampling: nnU-Net's crop to what is not zero, then intensities.

    Args:
        cases: all 2D images or all volumes.
        home_intensities: use the plan's schemes, for scans of the same kind; else each channel becomes mean 0, deviation 1.

    Returns the folder, `<data_identifier>_unlabelled/<pool_name>-own_grid`. Raises CasesFailed naming scans that failed.
    """
    own = own_grid_plan(plan, configuration, cases[0], home_intensities=home_intensities)
    return preprocess_unlabelled(home_dataset, own, configuration, f"{pool_name}-own_grid", cases, workers=workers)


def own_grid_plan(plan: dict, configuration: str, example: Case, *, home_intensities: bool) -> dict:
    """The plan with the reader of the example's files and without resampling."""
    own = copy.deepcopy(plan)
    # Written whole, because what it inherits from is left out.
    settings = copy.deepcopy(resolved(plan, configuration))
    settings.pop("inherits_from", None)
    own["configurations"] = {configuration: settings}
    settings |= {f"resampling_fn_{what}": _UNRESAMPLED for what in ("data", "seg")}
    settings |= {f"resampling_fn_{what}_kwargs": {} for what in ("data", "seg")}
    if split_ending(example.images[0], PICTURE_ENDINGS)[1]:
        own["image_reader_writer"] = "NaturalImage2DIO"
    elif own["image_reader_writer"] == "NaturalImage2DIO":
        own["image_reader_writer"] = "SimpleITKIO"
    if not home_intensities:
        settings["normalization_schemes"] = ["ZScoreNormalization"] * _MOST_CHANNELS
        settings["use_mask_for_norm"] = [False] * _MOST_CHANNELS
        own["foreground_intensity_properties_per_channel"] = {str(channel): {} for channel in range(_MOST_CHANNELS)}
    return own
