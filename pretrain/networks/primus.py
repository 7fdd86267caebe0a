"""Primus, a plain vision transformer in 3D, with nnU-Net's call signature and an encoder that can be pretrained alone.

Source: Wald et al. 2025 (arXiv:2503.01835), `dynamic_network_architectures.architectures.primus`; the names of its tensors are
those of nnssl's checkpoints (MIC-DKFZ/nnssl).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamic_network_architectures.architectures import primus
from torch import Tensor, cat, nn


class Primus(primus.Primus):
    """Patch embedding, transformer, patch decoder; one output (B, classes, z, y, x).

    It takes inputs of `input_shape` only: the position table has one entry a token.

    Args:
        patch_embed_size: voxels of a token along (z, y, x).
        input_shape: size of the patch (z, y, x), multiples of `patch_embed_size`.
        options: `embed_dim`, `eva_depth`, `eva_numheads`, `init_values`, `scale_attn_inner` and the others of the parent.
        deep_supervision: only False; the argument is part of nnU-Net's call.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        patch_embed_size: Sequence[int],
        input_shape: Sequence[int],
        deep_supervision: bool = False,
        **options: Any,
    ) -> None:
        if deep_supervision:
            raise ValueError(
                "Primus has one output; train it without deep supervision (nnUNetTrainerNoDeepSupervision)"
            )
        super().__init__(
            input_channels=input_channels,
            num_classes=num_classes,
            patch_embed_size=tuple(patch_embed_size),
            input_shape=tuple(input_shape),
            **options,
        )
        self.patch_embed_size = tuple(patch_embed_size)
        self.input_shape = tuple(input_shape)

    @property
    def encoder(self) -> PrimusEncoder:
        """The part that is pretrained, sharing its submodules with this network."""
        return PrimusEncoder(self)


class PrimusEncoder(nn.Module):
    """What Primus computes before its decoder. A view: it holds the submodules of a network, not copies of them."""

    def __init__(self, network: Primus) -> None:
        super().__init__()
        self.down_projection = network.down_projection
        self.eva = network.eva
        self.register_tokens = network.register_tokens
        self.training = network.training
        self.output_channels = [network.embed_dim]
        self.strides = [list(network.patch_embed_size)]
        grid = tuple(n // p for n, p in zip(network.input_shape, network.patch_embed_size, strict=True))
        self.position_grids = {"eva.pos_embed": grid} if network.eva.pos_embed is not None else {}
        """Name of each table of positions: tokens along (z, y, x)."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, z, y, x) to one map of tokens (B, E, z', y', x')."""
        embedded = self.down_projection(x)
        tokens = embedded.flatten(2).transpose(1, 2)
        if self.register_tokens is not None:
            tokens = cat((self.register_tokens.expand(len(tokens), -1, -1), tokens), dim=1)
        tokens, _ = self.eva(tokens)
        if self.register_tokens is not None:
            tokens = tokens[:, self.register_tokens.shape[1] :]
        return [tokens.transpose(1, 2).unflatten(2, embedded.shape[2:])]
