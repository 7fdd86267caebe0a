"""The heads that turn tokens into scores for prototypes: one for class tokens (DINO), one for patches (iBOT).

Source: facebookresearch/dinov3:dinov3/layers/dino_head.py. Unlike in DINO, the last layer's weights are not normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class Head(nn.Module):
    """Features (…, dim) to scores (…, codes).

    Args:
        dim: features of a token.
        codes: prototypes, K.
        hidden: width of the two hidden layers.
        bottleneck: length of the normalised vector that is compared with the prototypes.
    """

    def __init__(self, dim: int, codes: int, *, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = nn.Linear(bottleneck, codes, bias=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.directions(x))

    def directions(self, x: Tensor) -> Tensor:
        """What is compared with the prototypes: (…, dim) to (…, bottleneck), of length 1."""
        features = self.mlp(x)
        # 1e-12 is 0 in half precision
        return normalize(features, dim=-1, eps=1e-6 if features.dtype == torch.float16 else 1e-12)


class HeadPair(nn.Module):
    """A head for class tokens (DINO) and one for patches (iBOT), and the mask token that goes with them."""

    def __init__(self, width: int, codes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.dino = Head(width, codes, hidden=hidden, bottleneck=bottleneck)
        self.ibot = Head(width, codes, hidden=hidden, bottleneck=bottleneck)
        self.mask_token = nn.Parameter(torch.zeros(1, width))
