"""The encoder of a plan's network, built exactly as the trainer builds it, so that pretrained weights fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from planners.errors import PlanError
from pretrain.networks.registry import build_network, has_deep_supervision


@dataclass(frozen=True)
class EncoderInfo:
    """What a pretraining method needs to know of an encoder before it is built."""

    channels: int
    """Input channels."""
    features: tuple[int, ...]
    """Channels of each stage, finest first."""
    strides: tuple[tuple[int, ...], ...]
    """Stride of each stage per axis (z, y, x), or (y, x) in 2d."""
    total_stride: tuple[int, ...]
    """Product of all strides per axis: voxels of the input per voxel of the last stage."""
    spatial_dims: int
    """2 or 3."""


def build_segmentation_network(
    plan: dict, configuration: str, dataset_json: dict, *, deep_supervision: bool = True, initialise: bool = True
) -> nn.Module:
    """The segmentation network of one configuration of a plan, on the CPU, with fresh weights.

    `deep_supervision` has no effect on a network without it.
    """
    manager = PlansManager(plan)
    chosen = manager.get_configuration(configuration)
    architecture = chosen.configuration["architecture"]
    return build_network(
        architecture,
        determine_num_input_channels(manager, chosen, dataset_json),
        manager.get_label_manager(dataset_json).num_segmentation_heads,
        deep_supervision=deep_supervision and has_deep_supervision(architecture),
        initialise=initialise,
    )


def encoder_of(network: nn.Module) -> Any:
    """The submodule that turns an image (B, C, *spatial) into skips: a list of (B, F_s, *spatial_s), finest first."""
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise PlanError(
            "The network has no encoder that can be pretrained",
            found=type(network).__name__,
            expected="a network with a part `encoder` that gives the features of each stage, such as ResidualEncoderUNet",
            remedy="choose another configuration with -c",
        )
    return encoder


def encoder_info(plan: dict, configuration: str, dataset_json: dict) -> EncoderInfo:
    """Channels, features and strides of a configuration's encoder; no memory is spent on weights."""
    with torch.device("meta"):
        network = build_segmentation_network(plan, configuration, dataset_json, initialise=False)
    encoder = encoder_of(network)
    manager = PlansManager(plan)
    strides = tuple(tuple(int(s) for s in stride) for stride in encoder.strides)
    return EncoderInfo(
        channels=determine_num_input_channels(manager, manager.get_configuration(configuration), dataset_json),
        features=tuple(int(f) for f in encoder.output_channels),
        strides=strides,
        total_stride=tuple(int(s) for s in np.prod(strides, axis=0)),
        spatial_dims=len(strides[0]),
    )
