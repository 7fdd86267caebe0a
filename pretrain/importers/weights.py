"""What an importer makes of a file: somebody's weights in the terms of a network that autoseg can build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from planners.intensity import IntensityScheme
from pretrain.checkpoint import EncoderCard

Named = tuple[tuple[str, str], ...]
"""(tensor, reason) pairs."""


@dataclass(frozen=True)
class Weights:
    """Weights with all that is known of them; None or empty where the file and its authors do not say."""

    name: str
    """Of the file or folder, usable as the name of a run."""
    kind: str
    """For people: `VoCo SwinUNETR encoder, feature size 48`."""
    method: str
    """voco, mae, swin-ssl, supervised, …"""
    architecture: dict[str, Any]
    """As a plan's `architecture` entry; strides and kernels are those of the file's own network where known."""
    tensors: dict[str, Tensor]
    """float32, without aliases; named relative to the encoder or to the whole network, by `scope`."""
    scope: Literal["encoder", "encoder+decoder"]
    channels: int
    """Input channels."""
    spatial_dims: int
    sha256: str
    """Of the file that holds the tensors."""
    part: tuple[str, ...] = ()
    """Submodules of the encoder these weights are for (`swinViT`); empty: the whole encoder."""
    patch_size: tuple[int, ...] | None = None
    """Voxels, (z, y, x) or (y, x): what the authors train with, or recommend for fine-tuning."""
    spacing: tuple[float, ...] | None = None
    """mm, in the same order."""
    intensity: tuple[IntensityScheme, ...] | None = None
    """One scheme per channel: what the weights were trained on."""
    modality: str | None = None
    licence: str | None = None
    citation: str | None = None
    trained_on: str | None = None
    """Data sets, so that public test images among them are not mistaken for unseen ones."""
    dropped: Named = ()
    """Tensors of the file that are not used, and why."""
    warnings: tuple[str, ...] = ()
    card: EncoderCard | None = None
    """Of autoseg's own encoders."""
    position_grids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Token grid of each position table in `tensors`."""
    colours: bool = False
    """The three input channels are red, green and blue: only images of colours keep them apart (`pretrain.fit`)."""

    @property
    def parameters(self) -> int:
        """How many numbers `tensors` hold."""
        return sum(tensor.numel() for tensor in self.tensors.values())
