"""PUMIT's segmentation network: its vision transformer, and a convolutional decoder with strides by the degree of anisotropy.

Source: function2-llx/PUMIT:downstream/btcv/model.py, :pumit/model/adapter.py and
:mylib/models/decoders/{plain_conv_unet,full_res}.py; there the strides are those of DA 2. Here level m has stride 2^m in the
plane and 2^max(m - DA, 0) along the slices, and kernels of depth 3 where the slices are no thicker than the pixels any more,
else of depth 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from planners.anisotropy import leading_in_plane_stages, strides_of_degree
from pretrain.networks.pumit_vit import POSITION_GRID, TOKEN, ViT
from pretrain.networks.sac import require_multiple

LEVELS = 6
"""Of the decoder: full size to 1/32 in the plane; tokens have the size of the last but one."""
_TOKENS_AT = LEVELS - 2
_OUTPUTS = 4


class PUMIT(nn.Module):
    """(B, channels, z, y, x) to the classes at full size, or with deep supervision to a list of the four finest levels.

    Each axis of the input must be a multiple of the total stride (PlanError), and one of them at least twice it: the coarsest
    map is normalised over its voxels, of which there must be two (ValueError).

    Args:
        strides: (z, y, x) of each of the six levels, as `planners.anisotropy.strides_of_degree` gives them; they say which DA
            the network is for. nnU-Net makes targets for all levels but the last, and gives the coarsest of these no weight:
            for that one there is no output.
        features_per_stage: channels of each level of the decoder.
        embed_dim: features of a token.
        depth: transformer blocks.
        num_heads: attention heads of each block.
        deep_supervision: kept as `decoder.deep_supervision`, where nnU-Net switches it.

    Raises ValueError for strides that belong to no DA.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        embed_dim: int,
        depth: int,
        num_heads: int,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        degree = leading_in_plane_stages(strides)
        expected = strides_of_degree(degree, LEVELS)
        if [list(stride) for stride in strides] != expected:
            raise ValueError(f"there is no network with strides {strides}; for DA {degree} they are {expected}")
        self.encoder = PUMITEncoder(input_channels, degree, embed_dim, depth, num_heads)
        self.decoder = PUMITDecoder(
            input_channels, num_classes, degree, embed_dim, features_per_stage, deep_supervision
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        require_multiple(x.shape[2:], self.decoder.total_stride)
        return self.decoder(x, self.encoder(x))


class PUMITEncoder(nn.Module):
    """The transformer on images of one DA. `vit` is the network that is pretrained on any.

    Args:
        degree: DA of the images.
    """

    def __init__(self, input_channels: int, degree: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.vit = ViT(input_channels, embed_dim, depth, num_heads)
        self.degree = degree
        # 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, as the authors choose them.
        self.taken = [round(depth * share) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]
        self.output_channels = [embed_dim] * len(self.taken)
        self.strides = [[max(TOKEN >> degree, 1), TOKEN, TOKEN], *[[1, 1, 1]] * (len(self.taken) - 1)]
        self.position_grids = {"vit.pos_embed": POSITION_GRID}
        """Name of each table of positions: tokens along (z, y, x)."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, z, y, x) to the maps (B, embed_dim, z', y', x') of four blocks, one voxel a token."""
        grid = [n // s for n, s in zip(x.shape[2:], self.strides[0], strict=True)]
        hidden = self.vit(x, self.degree, return_blocks=self.taken)
        return [tokens[:, 1:].transpose(1, 2).unflatten(2, grid) for tokens in hidden]

    def layers(self) -> list[list[nn.Parameter]]:
        """The parameters in order of their distance from the image: tokens and positions, each block, the last norm."""
        vit = self.vit
        first = [vit.cls_token, vit.pos_embed, *vit.patch_embed.parameters()]
        return [first, *(list(module.parameters()) for module in (*vit.blocks, vit.norm))]


class PUMITDecoder(nn.Module):
    """A U-Net whose coarse levels are made of the transformer's maps and whose two finest are made of the image."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        degree: int,
        embed_dim: int,
        features: Sequence[int],
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.total_stride = [2 ** max(LEVELS - 1 - degree, 0), 2 ** (LEVELS - 1), 2 ** (LEVELS - 1)]
        strides = strides_of_degree(degree, LEVELS)
        kernels = [[3 if level >= degree else 1, 3, 3] for level in range(LEVELS)]
        token_levels, falling = range(_TOKENS_AT - 2, LEVELS), range(LEVELS - 2, -1, -1)

        self.norms = nn.ModuleList(nn.InstanceNorm3d(embed_dim, affine=True) for _ in token_levels)
        twice = nn.Sequential(
            _up(embed_dim, embed_dim, strides[4]),
            nn.InstanceNorm3d(embed_dim, affine=True),
            nn.GELU(),
            _up(embed_dim, embed_dim, strides[3]),
        )
        once, halved = _up(embed_dim, embed_dim, strides[4]), nn.MaxPool3d(tuple(strides[5]))
        self.resize = nn.ModuleList([twice, once, nn.Identity(), halved])
        self.lateral = nn.ModuleList(_convolutions(1, embed_dim, features[level], [1, 1, 1]) for level in token_levels)
        self.fine = nn.ModuleList(
            [
                _convolutions(2, input_channels, features[0], kernels[0]),
                _convolutions(2, features[0], features[1], kernels[1], strides[1]),
            ]
        )
        self.up = nn.ModuleList(_up(features[level + 1], features[level], strides[level + 1]) for level in falling)
        self.join = nn.ModuleList(
            _convolutions(2, 2 * features[level], features[level], kernels[level]) for level in falling
        )
        self.seg_layers = nn.ModuleList(nn.Conv3d(features[level], num_classes, 1) for level in range(_OUTPUTS))
        self.apply(InitWeights_He(1e-2))

    def forward(self, image: Tensor, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The image (B, C, z, y, x) and four maps of tokens to the classes, finest first."""
        skips = []
        for layer in self.fine:
            image = layer(image)
            skips.append(image)
        for tokens, norm, resize, lateral in zip(maps, self.norms, self.resize, self.lateral, strict=True):
            skips.append(lateral(resize(norm(tokens))))
        x = skips.pop()
        joined = []
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), skips.pop()], 1))
            joined.append(x)
        if not self.deep_supervision:
            return self.seg_layers[0](x)
        return [head(found) for head, found in zip(self.seg_layers, joined[: -_OUTPUTS - 1 : -1], strict=True)]


def _up(given: int, made: int, stride: Sequence[int]) -> nn.ConvTranspose3d:
    z, y, x = stride
    return nn.ConvTranspose3d(given, made, (z, y, x), (z, y, x))


def _convolutions(
    number: int, given: int, made: int, kernel: list[int], stride: Sequence[int] = (1, 1, 1)
) -> StackedConvBlocks:
    """Convolution, instance norm and leaky ReLU, `number` times; the first has the stride."""
    return StackedConvBlocks(
        number,
        nn.Conv3d,
        given,
        made,
        kernel,
        list(stride),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
