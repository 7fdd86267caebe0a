"""The 3D U-Net of the published PCRL and PCRLv2 weights, with the skips that segmentation needs.

Source: RL4M/PCRLv2 (branch `finetune`) and Luchixiang/PCRL, after Models Genesis; the names of the encoder's tensors
are theirs. Max pooling instead of strides, batch norms, and a decoder as wide as the maps it joins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_LEVELS = 4


class PCRLUNet(nn.Module):
    """(B, channels, z, y, x) → (B, classes, z, y, x); each axis a multiple of 8.

    Args:
        width: channels of the first map; each of the four levels has twice those of the one above.
        deep_supervision: only False; the argument is part of nnU-Net's call.
    """

    def __init__(
        self, input_channels: int, num_classes: int, *, width: int = 64, deep_supervision: bool = False
    ) -> None:
        if deep_supervision:
            raise ValueError("PCRLUNet has one output; train it without deep supervision")
        super().__init__()
        self.encoder = _Encoder(input_channels, width)
        self.decoder = _Decoder(num_classes, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """torch's own initialisation, as the authors leave it."""


class _Encoder(nn.Module):
    def __init__(self, input_channels: int, width: int) -> None:
        super().__init__()
        self.output_channels = [width * 2**level for level in range(_LEVELS)]
        self.strides = [[1, 1, 1], *[[2, 2, 2]] * (_LEVELS - 1)]
        inputs = [input_channels, *self.output_channels[:-1]]
        self.down_tr64, self.down_tr128, self.down_tr256, self.down_tr512 = (
            _Block(given, made // 2, made) for given, made in zip(inputs, self.output_channels, strict=True)
        )
        self.pool = nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.down_tr64(x)]
        for block in (self.down_tr128, self.down_tr256, self.down_tr512):
            maps.append(block(self.pool(maps[-1])))
        return maps


class _Decoder(nn.Module):
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.up_tr256, self.up_tr128, self.up_tr64 = (_Up(width * 2**level) for level in (2, 1, 0))
        self.seg_layers = nn.Conv3d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for up, skip in zip((self.up_tr256, self.up_tr128, self.up_tr64), maps[-2::-1], strict=True):
            x = up(x, skip)
        return self.seg_layers(x)


class _Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(2 * width, 2 * width, 2, 2)
        self.block = _Block(3 * width, width, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.up_conv(x), skip], 1))


class _Block(nn.Module):
    def __init__(self, given: int, between: int, made: int) -> None:
        super().__init__()
        self.ops = nn.Sequential(_Convolution(given, between), _Convolution(between, made))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops(x)


class _Convolution(nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(given, made, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(made)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu()
