"""The degree of anisotropy (DA): by how many halvings of the plane the slices are thicker than the plane's voxels.

Source: PUMIT (spatially adaptive convolution). On patches not limited by size DA equals the number of leading stages that
nnU-Net's topology rule pools in-plane only (MIC-DKFZ/nnUNet:nnunetv2/experiment_planning/experiment_planners/
network_topology.py), so the planner keeps nnU-Net's strides and states DA beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# nnU-Net resamples the slice axis apart above this ratio, and augments in-plane above this patch ratio.
_NNUNET_ANISOTROPY = 3
# Spacings in headers carry rounding noise: 2.9999998 / 0.75 must count as a ratio of 4.
_TOLERANCE = 1e-3


def degree_of_anisotropy(spacing: Sequence[float]) -> int:
    """DA of a spacing (slice, plane, plane) in mm: max(0, floor(log2(slice / finer plane spacing) + 1e-3)).

    >>> degree_of_anisotropy((5, 0.7, 0.7))
    2
    """
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be three positive lengths in mm, got {tuple(spacing)}")
    slice_mm, *plane_mm = spacing
    return max(0, math.floor(math.log2(slice_mm / min(plane_mm)) + _TOLERANCE))


def degree_per_stage(degree: int, stages: int) -> list[int]:
    """DA of each encoder stage: every stage halves the plane, so DA falls by one a stage until it is 0."""
    return [max(degree - stage, 0) for stage in range(stages)]


def strides_of_degree(degree: int, stages: int) -> list[list[int]]:
    """Strides (z, y, x) of a network that halves the plane at each of its stages after the first, and the slices where DA is 0.

    >>> strides_of_degree(1, 3)
    [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    """
    return [[1, 1, 1], *([1 if before else 2, 2, 2] for before in degree_per_stage(degree, stages - 1))]


def leading_in_plane_stages(strides: Sequence[Sequence[int]]) -> int:
    """How many strides after the stem leave the slice axis alone before the first that does not.

    `strides` as in a plan: one (z, y, x) a stage, the stem's (1, 1, 1) first.
    """
    count = 0
    for stride in strides[1:]:
        if stride[0] != 1:
            break
        count += 1
    return count


def anisotropy_facts(
    spacing: Sequence[float], patch_size: Sequence[int], strides: Sequence[Sequence[int]], *, alike: bool = False
) -> dict:
    """What a configuration's `autoseg` key says of anisotropy: DA and nnU-Net's two other decisions (axis 0 = slices).

    Args:
        strides: of the network's stages, the first at full size.
        alike: the network treats all axes alike, so DA is the same at all of its stages.
    """
    if len(spacing) == 2:
        return {"DA": None, "DA_per_stage": None, "separate_z": False, "dummy_2d": False}
    degree = degree_of_anisotropy(spacing)
    return {
        "DA": degree,
        "DA_per_stage": [degree] * len(strides) if alike else degree_per_stage(degree, len(strides)),
        "in_plane_stages": leading_in_plane_stages(strides),
        "separate_z": max(spacing) / min(spacing) > _NNUNET_ANISOTROPY,
        "dummy_2d": max(patch_size) / patch_size[0] > _NNUNET_ANISOTROPY,
    }
