"""nnU-Net's rotation and scaling of patches in two steps: drawn before any voxel is read, then applied to the voxels needed.

nnU-Net reads a window that holds the patch however it is turned and scaled, draws, and samples the patch from the window.
What it draws depends on the window's size alone, so the voxels can be read afterwards: 64 % of the patches are neither
turned nor scaled and need 128³ voxels where the window has 205³. nnU-Net's own code draws; patches are equal up to rounding.

Labels are the ones whose linearly interpolated indicators are largest. Where the corners around a voxel agree that is their
label, so only the few voxels whose corners disagree are scored, and the cost does not grow with the number of labels.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, prod
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from torch import Tensor

OUTSIDE = -1
"""Label where there is no scan; the image is 0 there."""
_CPU_PART, _GPU_PART = 1 << 16, 1 << 21
# Voxels turned at once. Of one channel, so that all about them stays in a processor's cache; of all channels, as many as a
# patch of 128³ has, so that a GPU gets few large tasks: 0.3 GB of memory with 60 labels, 1.6 GB where no corners agree.
_PRECISION = 1000  # nnU-Net compares scores as float16 of 0 to 1000, which makes near ties to ties

Box = list[tuple[int, int]]
"""First and last index + 1 of each axis."""


@dataclass(frozen=True)
class Pose:
    """How a patch lies in its window."""

    matrix: np.ndarray | None
    """(d, d): from steps in the patch to steps in the window; None: the patch is only cut out."""
    centre: tuple[float, ...]
    """Of the patch, in voxels from the edge of the window."""

    def box(self, patch: Sequence[int], valid: Box) -> Box:
        """What to read of the window, whose voxels in `valid` there are; the box holds at most a rim of others."""
        if self.matrix is None:
            return [(floor(c) - p // 2, floor(c) - p // 2 + p) for c, p in zip(self.centre, patch, strict=True)]
        reach = np.abs(self.matrix) @ ((np.array(patch) - 1) / 2)
        return [
            # Beyond the first voxel outside nothing changes any more; linear interpolation looks one voxel ahead.
            (max(floor(c - 0.5 - r), first - 1), min(floor(c - 0.5 + r) + 3, end + 2))
            for c, r, (first, end) in zip(self.centre, reach, valid, strict=True)
        ]


def is_covered(transform: Any) -> bool:
    """Whether `transform` is one whose patches `draw_pose` and `turn` give: nnU-Net's training with any plan."""
    return (
        type(transform) is SpatialTransform
        and not transform.random_crop
        and transform.p_elastic_deform == 0
        and not callable(transform.rotation)
        and not callable(transform.scaling)
        and (transform.mode_image, transform.padding_mode_image) == ("bilinear", "zeros")
        and (transform.mode_seg, transform.border_mode_seg) == ("bilinear", "constant")
        and (transform.padding_value_seg, transform.seg_tiebreak) == (OUTSIDE, "nearest")
        and not transform.align_corners
    )


def draw_pose(transform: SpatialTransform, window: Sequence[int]) -> Pose:
    """What `transform` would draw for an image with these axes, from NumPy's global generator."""
    point = copy.copy(transform)
    point.patch_size = (1,) * len(window)  # nnU-Net makes the positions of the patch's voxels as well: here of one
    drawn = point.get_parameters(image=torch.empty((1, *window), device="meta"))
    return Pose(drawn["affine"], tuple(drawn["center_location_in_pixels"]))


def turn(
    image: Tensor, labels: Tensor, matrix: np.ndarray, centre: Sequence[float], patch: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A patch from the voxels in `Pose.box`.

    Args:
        image: (C, *box) float32; labels: (K, *box) of a signed integer type, whose smallest value is not a label.
        matrix: of the pose.
        centre: of the patch, in voxels from the middle of the box's first voxel.
        patch: its size along the axes that are turned; images and labels (C * Z, Y, X) of slices are turned alike.

    Returns:
        image (C, *patch) float32, labels (K, *patch) int16, on the device of the voxels.
    """
    size = image.shape[1:]
    strides = [prod(size[axis + 1 :]) for axis in range(len(size))]
    turned = torch.empty((len(image), prod(patch)), dtype=torch.float32, device=image.device)
    elected = torch.empty((len(labels), prod(patch)), dtype=torch.int16, device=image.device)
    at_once, by_channel = (_CPU_PART, True) if image.device.type == "cpu" else (_GPU_PART, False)
    images, turned_to, marked, elected_to = (
        t.unsqueeze(1 if by_channel else 0).flatten(2) for t in (image, turned, labels, elected)
    )  # (groups, channels of a group, voxels)
    cells = _cells(marked.flatten(1), strides)
    row = prod(patch[1:])
    rows = ceil(at_once / (row * max(images.shape[1], marked.shape[1])))
    for first in range(0, patch[0], rows):
        positions = _positions(matrix, centre, patch, slice(first, first + rows), image.device)
        corners = _corners_below(positions, size, strides)
        part = slice(first * row, first * row + len(positions[0]))
        for values, into in zip(images, turned_to, strict=True):
            into[:, part] = _interpolate(values.flatten(), *_in_each(values, *corners), strides).view(len(into), -1)
        for values, settled, into in zip(marked, cells, elected_to, strict=True):
            into[:, part] = _vote(values.flatten(), settled, *_in_each(values, *corners), strides).view(len(into), -1)
    return turned.reshape(-1, *patch), elected.reshape(-1, *patch)


def _positions(
    matrix: np.ndarray, centre: Sequence[float], patch: Sequence[int], rows: slice, device: torch.device
) -> list[Tensor]:
    """Where the patch's voxels in `rows` of its first axis lie in the box: float32 along each axis, all voxels in one row."""
    steps = [torch.arange(p, dtype=torch.float64, device=device) - (p - 1) / 2 for p in patch]
    steps[0] = steps[0][rows]
    positions = []
    for factors, middle in zip(matrix, centre, strict=True):
        terms = [factor * step for factor, step in zip(factors, steps, strict=True)]
        terms[0] += middle
        mesh = torch.meshgrid(*(term.float() for term in terms), indexing="ij")
        positions.append(functools.reduce(torch.add, mesh).flatten())
    return positions


def _corners_below(
    positions: Sequence[Tensor], size: Sequence[int], strides: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Flat index in the box of the corner below each position, int32, and the share of the corner above along each axis."""
    index, weights = torch.zeros((), dtype=torch.int32, device=positions[0].device), []
    for position, length, stride in zip(positions, size, strides, strict=True):
        position = position.clamp_(0, length - 2)
        below = position.floor()
        weights.append(position.sub_(below))
        index = index + below.int() * stride
    return index, weights


def _in_each(channels: Tensor, index: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same corners in each of some channels (C, N), one channel after the other."""
    if len(channels) == 1:
        return index, weights
    starts = torch.arange(len(channels), dtype=torch.int32, device=index.device) * channels.shape[1]
    return (starts[:, None] + index).flatten(), [weight.repeat(len(channels)) for weight in weights]


def _interpolate(values: Tensor, index: Tensor, weights: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Linear interpolation between the 2^d corners, axis by axis."""
    if not strides:
        return values.index_select(0, index)
    below = _interpolate(values, index, weights[1:], strides[1:])
    return below.lerp_(_interpolate(values[strides[0] :], index, weights[1:], strides[1:]), weights[0])


def _cells(labels: Tensor, strides: Sequence[int]) -> Tensor:
    """(groups, N) -> the label of the cell above each voxel, the type's smallest value where its corners disagree."""
    low = high = labels
    for stride in strides:  # rows run into the next ones; nothing is ever looked up there
        low = torch.minimum(low[:, :-stride], low[:, stride:])
        high = torch.maximum(high[:, :-stride], high[:, stride:])
    return low.masked_fill_(low != high, torch.iinfo(labels.dtype).min)


def _vote(labels: Tensor, cells: Tensor, index: Tensor, weights: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """The label with the largest share of the corners; among equals the nearest corner's, else the smallest."""
    result = cells.index_select(0, index)
    mixed = (result == torch.iinfo(labels.dtype).min).nonzero()[:, 0]
    index, weights = index[mixed], [weight[mixed] for weight in weights]
    corners, shares = [], []
    for above in itertools.product((False, True), repeat=len(strides)):
        offset = sum(stride for stride, up in zip(strides, above, strict=True) if up)
        corners.append(labels[offset:].index_select(0, index))
        ends = [weight if up else 1 - weight for weight, up in zip(weights, above, strict=True)]
        shares.append(torch.stack(ends).prod(0))
    candidates, share = torch.stack(corners), torch.stack(shares)
    score = ((candidates[:, None] == candidates) * share).sum(1).mul_(_PRECISION).half().float()
    best = score.amax(0)
    largest = torch.iinfo(labels.dtype).max
    smallest_tied = candidates.masked_fill(score < best, largest).amin(0)
    nearest = sum((weight > 0.5).long() * 2**place for place, weight in enumerate(reversed(weights)))[None]
    nearest_ties = score.gather(0, nearest)[0] == best
    result[mixed] = torch.where(nearest_ties, candidates.gather(0, nearest)[0], smallest_tied)
    return result
