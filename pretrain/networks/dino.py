"""MedDINOv3's segmentation network: a plain vision transformer in 2d and a decoder of up-sampling alone.

Source: MedDINOv3 (arXiv:2509.02379), ricklisz/MedDINOv3; the decoder is that of Primus (arXiv:2503.01835) with
widths of its own. There are no skips from the image: detail comes from images that were enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.networks.dino_vit import TOKEN, DinoViT

_STAGES = int(math.log2(TOKEN))
_COARSE = 2


class MedDINOv3(nn.Module):
    """(B, channels, y, x) to the classes (B, classes, y, x); y and x must be multiples of 16 (PlanError).

    Args:
        embed_dim: features of a token.
        depth: transformer blocks.
        num_heads: attention heads of each block.
        taken: blocks whose maps the decoder sees; the last one alone is the paper's single-scale network. None: four blocks.
        eps, qkv_bias, drop_path: as in `DinoViT`.
        use_checkpoint: compute the two finest stages of the decoder once more in the backward pass, one image at a time,
            instead of keeping what they computed.
        deep_supervision: only False; the argument is part of nnU-Net's call.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        taken: Sequence[int] | None = None,
        eps: float = 1e-5,
        qkv_bias: bool = False,
        drop_path: float = 0.2,
        use_checkpoint: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        if deep_supervision:
            raise ValueError(
                "MedDINOv3 has one output; train it without deep supervision (nnUNetTrainerNoDeepSupervision)"
            )
        super().__init__()
        self.encoder = DinoViT(
            input_channels,
            embed_dim,
            depth,
            num_heads,
            taken=taken,
            eps=eps,
            qkv_bias=qkv_bias,
            drop_path=drop_path,
        )
        self.decoder = UpDecoder(sum(self.encoder.output_channels), num_classes, use_checkpoint=use_checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.cat(self.encoder(x), 1))


class UpDecoder(nn.Module):
    """Four doublings, each with half the channels, then the classes."""

    def __init__(self, channels: int, num_classes: int, *, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.stages = nn.Sequential()
        for _ in range(_STAGES):
            up = nn.ConvTranspose2d(channels, channels // 2, 2, 2)
            self.stages.append(nn.Sequential(up, ChannelNorm(channels // 2, eps=1e-6), nn.GELU()))
            channels //= 2
        self.seg_layer = nn.Conv2d(channels, num_classes, 1)
        self.apply(InitWeights_He(1e-2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, y, x) to (B, classes, 16 y, 16 x)."""
        x = self.stages[:_COARSE](x)
        if not (self.use_checkpoint and torch.is_grad_enabled()):
            return self._finish(x)
        # One image at a time: all at once would be computed again at once, and save next to nothing at the peak.
        return torch.cat([checkpoint(self._finish, image, use_reentrant=False) for image in x.split(1)])

    def _finish(self, x: Tensor) -> Tensor:
        return self.seg_layer(self.stages[_COARSE:](x))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of (B, C, y, x)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
