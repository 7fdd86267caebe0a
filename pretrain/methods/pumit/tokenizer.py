"""The soft visual tokenizer: an image becomes a grid of probability vectors over a codebook, and those an image again.

Source: PUMIT (arXiv:2312.07630) and its code (function2-llx/PUMIT:pumit/tokenizer/simple.py, quantize.py), of which only the
soft mode is here: a token is the softmax of its logits, without noise, temperature or choice of a code. Names and shapes of
the tensors are those of its released tokenizer.

Differs from it on purpose: the codebook starts as N(0, 1), because with the ±1/codes of the original the decoder's biases
drown its input at first; and slices are averaged, not summed, where the decoder makes thick ones (`transposed_pool`), because
what comes out of it would otherwise grow with the slice thickness, of which nothing tells it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.networks.sac import (
    SACConv3d,
    SACConvTranspose3d,
    SACSequential,
    Spacing,
    TakesSpacing,
    require_multiple,
)

_GROUPS = 8  # of a group norm
_HALVINGS = 4


class Tokenizer(nn.Module):
    """Encoder, codebook and decoder, of spatially adaptive convolutions throughout.

    A token covers 16 × 16 voxels of the plane and as many slices as come closest to a cube, from 16 at DA 0 to 1 at DA 4.
    The defaults but for the last two are the sizes of the released tokenizer, which has three input channels and was trained
    with `transposed_pool="sum"`.

    Args:
        in_channels: of the image, which has values in [-1, 1].
        channels: of the three stages, finest first; multiples of 8. The last is the length of a code.
        codes: entries of the codebook, V.
        k3_rule, transposed_pool: as in `pretrain.networks.sac`.
    """

    stride = 2**_HALVINGS
    """Voxels of a token along each axis of the plane."""

    def __init__(
        self,
        in_channels: int = 1,
        channels: tuple[int, int, int] = (128, 256, 512),
        codes: int = 1024,
        *,
        k3_rule: Literal["article", "promote"] = "article",
        transposed_pool: Literal["sum", "mean"] = "mean",
    ) -> None:
        super().__init__()
        fine, middle, deep = channels

        def convolution(width: int) -> list[nn.Module]:
            return [SACConv3d(width, width, 3, 1, 1, k3_rule=k3_rule), nn.GroupNorm(_GROUPS, width), nn.LeakyReLU(0.01)]

        def down(inputs: int, outputs: int, size: int) -> list[nn.Module]:
            return [SACConv3d(inputs, outputs, size, size), _channel_norm(outputs), nn.GELU()]

        def up(inputs: int, outputs: int, size: int) -> SACConvTranspose3d:
            return SACConvTranspose3d(inputs, outputs, size, size, transposed_pool=transposed_pool)

        self.encoder = SACSequential(
            *down(in_channels, fine, 4),
            *down(fine, middle, 2),
            *down(middle, deep, 2),
            *convolution(deep),
            *convolution(deep),
        )
        self.quantize = SoftCodebook(codes, deep)
        self.decoder = SACSequential(
            *convolution(deep),
            *convolution(deep),
            _Up(up(deep, middle, 2), SACSequential(*convolution(middle))),
            _Up(up(middle, fine, 2), SACSequential(*convolution(fine))),
            up(fine, in_channels, 4),
        )

    def encode(self, x: Tensor, spacing: Spacing) -> tuple[Tensor, Spacing]:
        """Logits (N, z', y', x', V) of an image (N, C, z, y, x), and the spacing of the tokens.

        Raises PlanError unless y and x are multiples of 16 and z is one of 2^max(4 - DA, 0) voxels.
        """
        require_multiple(x.shape[2:], spacing.stride(_HALVINGS))
        features, spacing = self.encoder(x, spacing)
        return self.quantize.logits(features), spacing

    def decode(self, z: Tensor, spacing: Spacing) -> tuple[Tensor, Spacing]:
        """The image (N, C, z, y, x) of mixed codes (N, E, z', y', x'), and its spacing."""
        return self.decoder(z, spacing)

    def forward(self, x: Tensor, spacing: Spacing) -> tuple[Tensor, Tensor]:
        """Tokens (N, z', y', x', V), in float32 or finer, and the image that they give, like `x`."""
        logits, below = self.encode(x, spacing)
        tokens = soft(logits)
        return tokens, self.decode(self.quantize(tokens), below)[0]

    def soft_tokens(self, x: Tensor, spacing: Spacing) -> Tensor:
        """Tokens (N, L, V) of an image, which sum to 1, in the order z', y', x' (x' fastest), in float32 or finer."""
        return soft(self.encode(x, spacing)[0]).flatten(1, 3)


class SoftCodebook(nn.Module):
    """V codes of length E, and the logits with which a feature chooses among them."""

    def __init__(self, codes: int, length: int) -> None:
        super().__init__()
        self.proj = nn.Linear(length, codes)
        self.embedding = nn.Embedding(codes, length)  # starts as N(0, 1)

    def logits(self, features: Tensor) -> Tensor:
        """(N, E, z', y', x') → (N, z', y', x', V)."""
        return self.proj(features.movedim(1, -1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Codes mixed as the tokens say: (N, z', y', x', V) → (N, E, z', y', x')."""
        return (tokens.to(self.embedding.weight.dtype) @ self.embedding.weight).movedim(-1, 1)


def soft(logits: Tensor) -> Tensor:
    """Probabilities over the last axis. Never in half precision: the prior's entropies are taken of them."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _Up(TakesSpacing, nn.Module):
    """A doubling and the convolution after it, named as in the released tokenizer."""

    def __init__(self, transposed_conv: SACConvTranspose3d, conv: SACSequential) -> None:
        super().__init__()
        self.transposed_conv = transposed_conv
        self.conv = conv

    def forward(self, x: Tensor, spacing: Spacing) -> tuple[Tensor, Spacing]:
        return self.conv(*self.transposed_conv(x, spacing))


class _MoveAxis(nn.Module):
    def __init__(self, source: int, destination: int) -> None:
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.source, self.destination)


def _channel_norm(channels: int) -> nn.Sequential:
    """Layer norm over the channels of each position. In the middle of three, as in the released tokenizer's names."""
    return nn.Sequential(_MoveAxis(1, -1), nn.LayerNorm(channels), _MoveAxis(-1, 1))
