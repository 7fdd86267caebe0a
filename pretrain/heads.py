"""What stands on top of an encoder that several methods use."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pooled_stages(encoder: nn.Module, images: Tensor) -> Tensor:
    """The mean over space of the output of every encoder stage, one after the other, in float32.

    (N, channels, *space) → (N, D), D = sum of the channels of all stages. For 2D and 3D encoders alike.
    """
    return torch.cat([skip.float().flatten(2).mean(2) for skip in encoder(images)], dim=1)


def last_stage(encoder: nn.Module, images: Tensor) -> Tensor:
    """The mean over space of the output of the last encoder stage, in float32: (N, channels, *space) → (N, F).

    A task that must be solved from it goes through the whole encoder; with the finer stages it could stop halfway.
    """
    return encoder(images)[-1].float().flatten(2).mean(2)


def classifier(features: int, hidden: int, outputs: int, dropout: float = 0.0) -> nn.Sequential:
    """One hidden layer: (N, features) → (N, outputs). Without batch statistics, because batches of volumes are small."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(hidden, outputs)
    )


def projector(features: int, hidden: int) -> nn.Sequential:
    """Three linear layers of width `hidden` with batch statistics between them: (N, features) → (N, hidden).

    The norm has no parameters and keeps no running statistics, so training and evaluation compute the same; the last layer
    is not normalised (Luffy03/Large-Scale-Medical:Self-supervised/models/voco_head.py).
    """
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden, affine=False, track_running_stats=False),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        nn.BatchNorm1d(hidden, affine=False, track_running_stats=False),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
    )
