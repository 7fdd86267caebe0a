"""MONAI's SwinUNETR with nnU-Net's call signature and an encoder that can be pretrained alone.

Source: Hatamizadeh et al. 2022 (arXiv:2201.01266), `monai.networks.nets.SwinUNETR`. The tensors of the network have MONAI's
names; those of the encoder have the names of the published VoCo checkpoints (Luffy03/Large-Scale-Medical).
"""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks import nets
from torch import Tensor, nn

# The last skip lies two halvings below the one before it: the skip between them has no block of the encoder.
_STRIDES = (1, 2, 2, 2, 4)


class SwinUNETR(nets.SwinUNETR):
    """A transformer with shifted windows as encoder, a convolutional decoder with skips; one output, (B, classes, z, y, x).

    Each axis of the input must be a multiple of 32, and one of them at least 64: the deepest map is normalised over its voxels,
    of which there must be two (ValueError).

    Args:
        feature_size: channels of the first stage, a multiple of 12.
        depths: transformer blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: edge of the attention windows, in tokens.
        use_v2: a residual convolution before each stage.
        use_checkpoint: compute the transformer blocks once more in the backward pass instead of keeping what they computed.
        deep_supervision: only False; the argument is part of nnU-Net's call.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        feature_size: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        use_v2: bool = True,
        use_checkpoint: bool = False,
        deep_supervision: bool = False,
    ) -> None:
        if deep_supervision:
            raise ValueError(
                "SwinUNETR has one output; train it without deep supervision (nnUNetTrainerNoDeepSupervision)"
            )
        super().__init__(
            in_channels=input_channels,
            out_channels=num_classes,
            feature_size=feature_size,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            use_v2=use_v2,
            use_checkpoint=use_checkpoint,
        )

    @property
    def encoder(self) -> SwinEncoder:
        """The part that is pretrained, sharing its submodules with this network."""
        return SwinEncoder(self)


class SwinEncoder(nn.Module):
    """What SwinUNETR computes before its decoder. A view: it holds the submodules of a network, not copies of them."""

    def __init__(self, network: nets.SwinUNETR) -> None:
        super().__init__()
        self.swinViT = network.swinViT
        self.encoder1 = network.encoder1
        self.encoder2 = network.encoder2
        self.encoder3 = network.encoder3
        self.encoder4 = network.encoder4
        self.encoder10 = network.encoder10
        self.normalize = network.normalize
        self.training = network.training
        features = network.swinViT.embed_dim
        self.output_channels = [features, features, 2 * features, 4 * features, 16 * features]
        self.strides = [[stride] * 3 for stride in _STRIDES]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, z, y, x) to the five skips, finest first: full size, then 1/2, 1/4, 1/8 and 1/32 of it."""
        hidden = self.swinViT(x, self.normalize)
        return [
            self.encoder1(x),
            self.encoder2(hidden[0]),
            self.encoder3(hidden[1]),
            self.encoder4(hidden[2]),
            self.encoder10(hidden[4]),
        ]
