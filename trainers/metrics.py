"""Dice, normalised surface distance and 95th percentile Hausdorff distance of one case, with a rule for missing structures.

Distances come from `monai.metrics`. It returns NaN both for a structure that is absent everywhere and for one that was
missed, so that averages improve when more is missed (Project-MONAI/MONAI#9095). Here the two are told apart first:
absent in both → not applicable (None); present in only one → Dice 0, NSD 0, HD95 = diagonal of the image, and counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METRICS = ("dice", "nsd", "hd95_mm")


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Mapping[str, int | tuple[int, ...]],
    spacing_mm: Sequence[float],
    tolerance_mm: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Compare two label maps structure by structure.

    Args:
        prediction, reference: label values on one grid, (z, y, x) or (y, x).
        labels: structure → its value, or the values its region is made of. Background is not a structure.
        spacing_mm: in the order of the axes.
        tolerance_mm: how far apart surfaces may be and still count as equal for the NSD.

    Returns structure → {"dice", "nsd", "hd95_mm", "missed", "false_alarm"}; the first three are None where the structure is
    in neither map.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} have different shapes")
    if len(spacing_mm) != prediction.ndim:
        raise ValueError(f"{prediction.ndim} axes need as many spacings, got {tuple(spacing_mm)}")
    diagonal_mm = float(np.linalg.norm(np.multiply(prediction.shape, spacing_mm)))
    return {
        name: _structure(_holds(prediction, value), _holds(reference, value), spacing_mm, tolerance_mm, diagonal_mm)
        for name, value in labels.items()
    }


def summarise(per_case: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over cases, each with the number of cases behind it.

    Args:
        per_case: case → what `case_metrics` returned.

    Returns structure → {"dice", "nsd", "hd95_mm", "cases", "missed", "false_alarm"}, where `cases` counts those in which the
    structure is in the prediction or the reference, plus the row "mean": the mean over structures that have any case.
    """
    structures = list(dict.fromkeys(name for rows in per_case.values() for name in rows))
    summary: dict[str, dict[str, Any]] = {}
    for structure in structures:
        rows = [case[structure] for case in per_case.values() if structure in case]
        seen = [row for row in rows if row["dice"] is not None]
        summary[structure] = {metric: _mean([row[metric] for row in seen]) for metric in METRICS}
        summary[structure]["cases"] = len(seen)
        for flag in ("missed", "false_alarm"):
            summary[structure][flag] = sum(row[flag] for row in rows)
    known = [row for row in summary.values() if row["cases"]]
    summary["mean"] = {metric: _mean([row[metric] for row in known]) for metric in METRICS} | {
        key: sum(row[key] for row in known) for key in ("cases", "missed", "false_alarm")
    }
    return summary


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _holds(label_map: np.ndarray, value: int | tuple[int, ...]) -> np.ndarray:
    return label_map == value if isinstance(value, int) else np.isin(label_map, value)


def _structure(
    predicted: np.ndarray, true: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float, diagonal_mm: float
) -> dict[str, Any]:
    """The metrics of two masks on the same grid."""
    in_prediction, in_reference = bool(predicted.any()), bool(true.any())
    flags = {"missed": in_reference and not in_prediction, "false_alarm": in_prediction and not in_reference}
    if not in_prediction and not in_reference:
        return {"dice": None, "nsd": None, "hd95_mm": None, **flags}
    if not in_prediction or not in_reference:
        return {"dice": 0.0, "nsd": 0.0, "hd95_mm": diagonal_mm, **flags}
    dice, nsd, hd95_mm = _overlap_and_surface(predicted, true, spacing_mm, tolerance_mm)
    return {"dice": dice, "nsd": nsd, "hd95_mm": hd95_mm, **flags}


def _overlap_and_surface(
    predicted: np.ndarray, true: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[float, float, float]:
    """Dice, NSD and HD95 (mm) of two masks that are not empty."""
    # monai.metrics takes seconds to import.
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    union = np.argwhere(predicted | true)
    # One voxel more, so that a surface at the box's edge is a surface.
    box = tuple(slice(max(low - 1, 0), high + 2) for low, high in zip(union.min(0), union.max(0), strict=True))
    one, two = (torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in (predicted, true))
    spacing = [float(s) for s in spacing_mm]
    # Without subvoxels every surface voxel weighs the same, whatever the spacing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # monai's own use of an argument it deprecates
        nsd = compute_surface_dice(
            one, two, class_thresholds=[tolerance_mm], include_background=True, spacing=spacing, use_subvoxels=True
        )
        hd95 = compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=spacing)
    dice = compute_dice(one, two, include_background=True)
    return float(dice), float(nsd), float(hd95)
