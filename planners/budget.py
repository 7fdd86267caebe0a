"""What a network may cost: the budgets of the two plans, and nnU-Net's measure of a U-Net's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

DEFAULT_GPU_MEMORY_GB = 8.0
"""nnU-Net's reference."""
_USUAL_LABELS = 14
MIN_EDGE = 4
"""A patch axis is not halved below twice as many voxels (nnU-Net's UNet_featuremap_min_edge_length)."""


@dataclass(frozen=True)
class Budget:
    """What a network may cost, in the terms nnU-Net's procedure uses."""

    base_features: int
    max_stages: int
    blocks_encoder: tuple[int, ...]
    max_voxels_3d: int | None
    """Largest patch in voxels; None: nnU-Net's estimate of feature map elements decides."""
    max_voxels_2d: int | None
    fixed_batch: int | None


FULL = Budget(32, 99, (1, 3, 4, *[6] * 10), None, None, None)
# On two cores an epoch of 50 + 10 iterations takes 11 s (benchmarks/results/2026-11-20_hippocampus_cpu.md).
CPU = Budget(8, 4, (1, 1, 2, 2), 48**3, 256**2, 2)


def is_small(plan: Mapping) -> bool:
    """Whether the plan is the one a CPU can train."""
    return plan.get("autoseg", {}).get("budget") == "cpu"


def gpu_memory_gb(plan: Mapping) -> float:
    """Memory a plan's networks may use while training; plans of nnU-Net and of older versions were made for 8 GB."""
    return float(plan.get("autoseg", {}).get("gpu_memory_gb", DEFAULT_GPU_MEMORY_GB))


def feature_map_elements(
    patch_size: Sequence[int],
    input_channels: int,
    output_channels: int,
    arch_class_name: str,
    arch_kwargs: dict,
    arch_kwargs_req_import: Sequence[str],
) -> int:
    """Elements of all feature maps of a U-Net, counted on a network without storage.

    The names are looked up by nnU-Net, which imports whatever they say: only for names that were written by this program.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    with torch.device("meta"):
        network = get_network_from_plans(
            arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
        )
    return network.compute_conv_feature_map_size(patch_size)


def label_count(plan: Mapping) -> int:
    """Labels of the data set, background included; plans of nnU-Net do not say it."""
    return int(plan.get("autoseg", {}).get("labels", _USUAL_LABELS))
