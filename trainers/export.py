"""From logits on the grid of the plan to a mask on the grid of the scan: nnU-Net's answer in a fraction of time and memory.

nnU-Net resamples the logits of every class to the grid of the scan and takes the argmax. The mask needs that only at
boundaries (`trainers.winners`), and logits may come in slabs along z, so that never all of them have to be in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor
from torch.nn import functional

from planners.cells import Cells
from planners.spline import nearest_index
from trainers.winners import Classes, Regions, resampled

_SAMPLES_AT_ONCE = 2**19
"""Samples of the new grid whose labels are made together, and float32 probabilities of all heads."""


def labels_from_logits(
    logits: Tensor, shape: Sequence[int], *, separate_axis: int | None = None, regions: bool = False
) -> np.ndarray:
    """The label map that nnU-Net gets from resampling logits linearly and comparing the classes.

    Args:
        logits: (heads, z, y, x), float16 or float32, on the CPU.
        shape: of the label map, (z, y, x), over the same extent.
        separate_axis: takes the nearest plane along this axis and interpolates in the others only.
        regions: heads are overlapping regions, one after the other painted where they are positive.

    Returns:
        (z, y, x), uint8 or, with more than 255 heads, uint16: the class; with `regions` the last region painted, counted
        from 1, and 0 for none.
    """
    labels = np.zeros([int(n) for n in shape], _label_type(len(logits)))
    SlabExport(tuple(logits.shape[1:]), labels, separate_axis=separate_axis, regions=regions).add(logits)
    return labels


class SlabExport:
    """Fills a label map, and probabilities if asked for, while logits come in slab by slab along z."""

    def __init__(
        self,
        shape: Sequence[int],
        labels: np.ndarray,
        *,
        separate_axis: int | None = None,
        regions: bool = False,
        values: np.ndarray | None = None,
        probabilities: np.ndarray | None = None,
        activation: Callable[[Tensor], Tensor] = torch.sigmoid,
    ) -> None:
        """
        Args:
            shape: of the logits, (z, y, x), all slabs together.
            labels: written to, (Z, Y, X) over the same extent.
            separate_axis, regions: as in `labels_from_logits`.
            values: the label of each winner; without it the winner itself.
            probabilities: written to, (heads, Z, Y, X) float16.
            activation: from resampled logits (heads, planes, Y, X) to probabilities.
        """
        self._labels, self._values = labels, values
        self._probabilities, self._activation = probabilities, activation
        self._winners_of = Regions if regions else Classes
        self._axis, self._nearest = separate_axis, np.arange(0)
        between = list(labels.shape)
        if separate_axis is not None:
            between[separate_axis] = shape[separate_axis]
            self._nearest = nearest_index(shape[separate_axis], labels.shape[separate_axis])
        self._cells = Cells(shape, between)
        self._held: Tensor | None = None
        """Last plane of the logits so far, if the next samples lie above it."""
        self._finished = self._filled = 0

    @torch.inference_mode()
    def add(self, logits: Tensor) -> None:
        """Take the next planes of the logits, (heads, planes, y, x), on the CPU."""
        block = logits if self._held is None else torch.cat([self._held, logits], dim=1)
        self._finished += logits.shape[1]
        begin, ready = self._finished - block.shape[1], self._cells.ready(self._finished)
        if ready > self._filled:
            self._fill(block, begin, ready)
        remaining = self._cells.planes(ready, ready + 1)[1] if ready < self._cells.new[0] else self._finished
        self._held = block[:, remaining - begin :].clone() if remaining < self._finished else None

    def _fill(self, block: Tensor, begin: int, ready: int) -> None:
        winners = self._winners_of(block)
        heads = 1 if self._probabilities is None else len(block)
        step = max(1, _SAMPLES_AT_ONCE // (heads * self._cells.new[1] * self._cells.new[2]))
        for start in range(self._filled, ready, step):
            stop = min(start + step, ready)
            cells, first = self._cells.planes(start, stop)
            labels = resampled(winners, cells, first - begin)
            self._put(self._labels, labels if self._values is None else self._values.take(labels), start)
            if self._probabilities is not None:
                logits = _interpolated(block[:, first - begin :][:, : cells.old[0]], cells)
                self._put(
                    self._probabilities, self._activation(logits).half().numpy(), start
                )  # NumPy would be slow at it
        self._filled = ready

    def _put(self, target: np.ndarray, planes: np.ndarray, start: int) -> None:
        """Write planes (…, z, y, x) of the interpolated grid from `start` on, repeated or left out along the separate axis."""
        stop = start + planes.shape[-3]
        if self._axis == 0:
            left, right = np.searchsorted(self._nearest, [start, stop])
            target[..., left:right, :, :] = planes.take(self._nearest[left:right] - start, axis=-3)
        elif self._axis is None:
            target[..., start:stop, :, :] = planes
        else:
            target[..., start:stop, :, :] = planes.take(self._nearest, axis=self._axis - 3)


class MaskExport:
    """The mask of one case on the grid of its scan; needs `is_exact`."""

    def __init__(
        self,
        shape: Sequence[int],
        properties: dict,
        plan: PlansManager,
        configuration: ConfigurationManager,
        labels: LabelManager,
        *,
        probabilities: bool = False,
    ) -> None:
        """
        Args:
            shape: of the logits, (z, y, x).
            properties: what preprocessing gave beside the image.
            probabilities: keep them, float16.
        """
        whole = tuple(properties["shape_before_cropping"])
        box = tuple(slice(*ends) for ends in properties["bbox_used_for_cropping"])
        self._back = plan.transpose_backward
        self._mask = np.zeros(whole, _label_type(len(labels.foreground_labels) + 1))
        self._probabilities = None
        if probabilities:
            self._probabilities = np.zeros((labels.num_segmentation_heads, *whole), np.float16)
            if not labels.has_regions:
                self._probabilities[0] = 1  # outside the cropped region there is background
        self._slabs = SlabExport(
            shape,
            self._mask[box],
            separate_axis=separate_axis(plan, configuration, properties),
            regions=labels.has_regions,
            values=np.array([0, *labels.regions_class_order], self._mask.dtype) if labels.has_regions else None,
            probabilities=None if self._probabilities is None else self._probabilities[:, box[0], box[1], box[2]],
            activation=labels.inference_nonlin,
        )

    def add(self, logits: Tensor) -> None:
        """Take the next planes of the logits, (heads, planes, y, x), on the CPU."""
        self._slabs.add(logits)

    def result(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Mask (z, y, x) in the order of the scan's axes, and probabilities (heads, z, y, x) or None."""
        mask = self._mask.transpose(self._back)
        if self._probabilities is None:
            return mask, None
        return mask, self._probabilities.transpose([0] + [axis + 1 for axis in self._back])


class NnunetExport:
    """nnU-Net's own way, for plans that resample logits otherwise than linearly: all slabs at once."""

    def __init__(self, convert: Callable[[Tensor], tuple[np.ndarray, np.ndarray | None]]) -> None:
        self._slabs: list[Tensor] = []
        self._convert = convert

    def add(self, logits: Tensor) -> None:
        """As in `MaskExport`."""
        self._slabs.append(logits)

    def result(self) -> tuple[np.ndarray, np.ndarray | None]:
        """As in `MaskExport`."""
        return self._convert(torch.cat(self._slabs, dim=1))


Export = MaskExport | NnunetExport


def export_of_case(
    shape: Sequence[int],
    properties: dict,
    plan: PlansManager,
    configuration: ConfigurationManager,
    labels: LabelManager,
    *,
    probabilities: bool = False,
) -> Export:
    """Takes the logits of a case slab by slab along z and gives its mask, and float16 probabilities if asked for.

    Args:
        shape: of all slabs together, (z, y, x) on the grid of the plan.
        properties: what preprocessing gave beside the image.
    """
    if is_exact(configuration, labels):
        return MaskExport(shape, properties, plan, configuration, labels, probabilities=probabilities)

    def convert(logits: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        result = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plan, configuration, labels, properties, probabilities, torch.get_num_threads()
        )
        return (result[0], result[1].astype(np.float16)) if probabilities else (result, None)

    return NnunetExport(convert)


def is_exact(configuration: ConfigurationManager, labels: LabelManager) -> bool:
    """Whether nnU-Net would resample linearly and compare the classes, which is what is done here in another way."""
    settings = configuration.configuration
    how = settings["resampling_fn_probabilities_kwargs"]
    return (
        settings["resampling_fn_probabilities"] == "resample_data_or_seg_to_shape"
        and not how.get("is_seg", False)
        and (how.get("order", 3), how.get("order_z", 0)) == (1, 0)
        and type(labels) is LabelManager
    )


def separate_axis(plan: PlansManager, configuration: ConfigurationManager, properties: dict) -> int | None:
    """The axis along which nnU-Net takes the nearest plane of logits, for the thick slices of the plan or of the scan."""
    scan = [properties["spacing"][axis] for axis in plan.transpose_forward]
    network = [*scan[: len(scan) - len(configuration.spacing)], *configuration.spacing]
    how = configuration.configuration["resampling_fn_probabilities_kwargs"]
    threshold = how.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD)
    separate, axis = determine_do_sep_z_and_axis(how.get("force_separate_z", False), network, scan, threshold)
    return int(axis) if separate else None


def _interpolated(logits: Tensor, cells: Cells) -> Tensor:
    """Logits (heads, *cells.old) -> (heads, *cells.new), float32."""
    planes = functional.interpolate(logits.float(), size=cells.new[1:], mode="bilinear", align_corners=False)
    below, above, share = cells.ends(0)
    weight = torch.from_numpy(share.astype(np.float32))[:, None, None]
    return torch.lerp(planes[:, torch.from_numpy(below)], planes[:, torch.from_numpy(above)], weight)


def _label_type(labels: int) -> type[np.unsignedinteger]:
    """nnU-Net's: its masks of 255 and more foreground labels are of 16 bits."""
    return np.uint8 if labels <= 255 else np.uint16
