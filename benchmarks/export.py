"""From logits to the mask on the grid of the scan, nnU-Net's export beside ours."""

from __future__ import annotations

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter
from torch import Tensor

from benchmarks.measuring import Agreement, Duel, Scale
from benchmarks.scans import made_up, real_ct
from benchmarks.toy_model import CONFIGURATION, toy_dataset, toy_plan
from trainers.export import export_of_case

_NETWORK_MM, _SCAN_MM = 2.0, 1.5
_LEAST_EQUAL = 0.99999


def labels_14(scale: Scale) -> Duel:
    """14 classes, from 2 mm to 1.5 mm."""
    return _export(scale, 14)


def labels_104(scale: Scale) -> Duel:
    """104 classes, 62 of them in view."""
    return _export(scale, 104)


def regions_3(scale: Scale) -> Duel:
    """Three nested regions."""
    return _export(scale, 4, regions=True)


def probabilities_14(scale: Scale) -> Duel:
    """14 classes with their probabilities."""
    return _export(scale, 14, probabilities=True)


def _export(scale: Scale, classes: int, *, regions: bool = False, probabilities: bool = False) -> Duel:
    labels = min(classes - 1, 62)
    few = (96, 90, 102) if regions else (48, 45, 51)  # with fewer voxels half lie near a boundary of nested regions
    whole = real_ct(_NETWORK_MM, labels) if scale is Scale.full else made_up(few, labels)
    logits = _logits(whole.labels, classes, regions)
    if scale is Scale.small:
        logits = logits.float()  # of so few voxels, nnU-Net's rounding of half precision would change too many
    shape = [round(n * _NETWORK_MM / _SCAN_MM) for n in logits.shape[1:]]
    case = {
        "spacing": [_SCAN_MM] * 3,
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
        "shape_after_cropping_and_before_resampling": shape,
    }
    manager = PlansManager(toy_plan(_NETWORK_MM, (128,) * 3))
    parts = manager.get_configuration(CONFIGURATION), manager.get_label_manager(toy_dataset(classes, regions=regions))

    def nnunet() -> tuple[np.ndarray, np.ndarray | None]:
        result = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, manager, *parts, case, probabilities, torch.get_num_threads()
        )
        return result if probabilities else (result, None)

    def ours() -> tuple[np.ndarray, np.ndarray | None]:
        export = export_of_case(logits.shape[1:], case, manager, *parts, probabilities=probabilities)
        export.add(logits)
        return export.result()

    return Duel(nnunet, ours, _agreement)


def _logits(labels: np.ndarray, classes: int, regions: bool) -> Tensor:
    """Logits as a trained network gives them, (heads, z, y, x) float16: blurred structures between -10 and 10, and noise."""
    noise = torch.Generator().manual_seed(0)
    heads = range(1, classes) if regions else range(classes)
    logits = torch.empty((len(heads), *labels.shape), dtype=torch.float16)
    for row, head in zip(logits, heads, strict=True):
        structure = labels >= head if regions else labels == head
        smooth = gaussian_filter(structure.astype(np.float32), 1.0) if structure.any() else structure.astype(np.float32)
        row.copy_(torch.from_numpy(smooth) * 20 - 10 + 0.4 * torch.randn(labels.shape, generator=noise))
    return logits


def _agreement(
    reference: tuple[np.ndarray, np.ndarray | None], ours: tuple[np.ndarray, np.ndarray | None]
) -> Agreement:
    equal = float((reference[0] == ours[0]).mean())
    text, holds = f"{equal:.7f} of voxels", equal >= _LEAST_EQUAL and reference[0].dtype == ours[0].dtype
    if reference[1] is None or ours[1] is None:
        return Agreement(text, holds)
    # Head by head: a difference of all would need more memory than either result.
    apart = max(float(np.abs(a - b.astype(np.float32)).max()) for a, b in zip(reference[1], ours[1], strict=True))
    return Agreement(f"{text}, probabilities within {apart:.1e}", holds and apart < 5e-3)
