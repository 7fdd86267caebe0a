"""PUMIT's vision transformer: one set of weights for volumes of any slice thickness and for single images.

The blocks are those of EVA-02 as timm has them; a spatially adaptive convolution makes the tokens, and a learned table and a
rotation of queries and keys say where they lie.

Source: PUMIT (arXiv:2312.07630), function2-llx/PUMIT:pumit/model/{vit,rope,mim}.py.
Tokens are in the order of their grid (z, y, x), row by row, after the class token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pretrain.networks.sac import SACConv3d, Spacing

TOKEN = 16
"""Edge of a token in the plane, in voxels; along the slices it is 16 >> DA, at least 1."""
POSITION_GRID = (5, 10, 10)
"""Tokens of the learned table of positions, as in the published weights."""
_MLP_RATIO = 8 / 3
# Names of the published weights and what timm calls the same tensors.
_OFFICIAL = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "mlp.w1.": "mlp.fc1_g.",
    "mlp.w2.": "mlp.fc1_x.",
    "mlp.ffn_ln.": "mlp.norm.",
    "mlp.w3.": "mlp.fc2.",
}


class ViT(nn.Module):
    """Tokens of an image in context.

    Args:
        in_channels: of the image.
        embed_dim: features of a token; `embed_dim / num_heads` must be a multiple of 4 (ValueError).
        depth: number of blocks.
        num_heads: attention heads of each block.
    """

    def __init__(self, in_channels: int, embed_dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ValueError(f"{num_heads} heads of 4, 8, 12, … features do not make {embed_dim} features")
        self.head_dim = embed_dim // num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, *POSITION_GRID))
        patches = SACConv3d(in_channels, embed_dim, TOKEN, TOKEN)
        self.patch_embed = nn.ModuleDict({"proj": patches})
        self.blocks = nn.ModuleList(
            EvaBlock(
                embed_dim,
                num_heads,
                qkv_fused=False,
                mlp_ratio=_MLP_RATIO,
                swiglu_mlp=True,
                scale_mlp=True,
                norm_layer=nn.LayerNorm,  # ε = 1e-5 as in the published network, not EVA-02's 1e-6
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self._initialise(patches)

    def forward(
        self,
        x: Tensor,
        da: int,
        visible: Tensor | None = None,
        return_blocks: Sequence[int] = (),
        *,
        mask_token: Tensor | None = None,
        mask_block: int = 0,
    ) -> Tensor | list[Tensor]:
        """(N, in, z, y, x) to normalised tokens (N, 1 + L, embed_dim), the class token first.

        Args:
            x: each axis a multiple of the token's edge, else PlanError.
            da: degree of anisotropy of the image, one for the whole batch.
            visible: (N, n) numbers of the tokens that are seen; None: all. The others are left out, so that n replaces L,
                unless there is a `mask_token`.
            return_blocks: numbers of blocks, from 0, whose output is returned instead, as a list, without the last norm.
            mask_token: (1, 1, embed_dim), stands where tokens are not seen. It carries no learned position: the rotation alone
                says where it lies, as in the authors' code.
            mask_block: the first block that sees the mask tokens.
        """
        tokens, _ = self.patch_embed["proj"](x, Spacing(da))
        grid = tokens.shape[2:]
        tokens = (tokens + resized_positions(self.pos_embed, grid)).flatten(2).transpose(1, 2)
        angles = rotary_angles(grid, self.head_dim).to(self.pos_embed)
        # timm's form: sine and cosine side by side, each angle for two neighbouring channels.
        everywhere = torch.cat([angles.sin(), angles.cos()], -1).repeat_interleave(2, -1)
        rotation = everywhere
        if visible is not None:
            tokens = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))
            rotation = everywhere[visible][:, None]
        hidden = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            if visible is not None and mask_token is not None and index == mask_block:
                hidden, rotation = _filled(hidden, visible, mask_token, len(everywhere)), everywhere
            hidden = block(hidden, rope=rotation)
            kept[index] = hidden
        return [kept[index] for index in return_blocks] if return_blocks else self.norm(hidden)

    def _initialise(self, patches: SACConv3d) -> None:
        """Normal with deviation 0.02, cut off; what a block adds is the smaller the deeper it lies, as in EVA-02. The patch
        embedding is drawn in the plane and spread over depth, so that every DA begins with outputs of one scale."""
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        plane = torch.empty_like(patches.weight[:, :, 0])
        nn.init.kaiming_uniform_(plane, a=math.sqrt(5))
        with torch.no_grad():
            patches.weight.copy_((plane / TOKEN)[:, :, None].expand_as(patches.weight))
        for number, block in enumerate(self.blocks, start=1):
            for name, parameter in block.named_parameters():
                if parameter.ndim == 2:
                    is_last = name in ("attn.proj.weight", "mlp.fc2.weight")
                    nn.init.trunc_normal_(parameter, std=0.02 / (math.sqrt(2 * number) if is_last else 1))
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)


def rotary_angles(grid: Sequence[int], head_dim: int) -> Tensor:
    """Angles (tokens, head_dim / 2), in float64, by which two neighbouring channels of queries and keys are turned.

    Angle i of token (z, y, x) is z·2333^(-(2j + 1)/m) + c·10000^(-2j/m) with m = head_dim / 2, j = i mod m/2, and c the row y
    in the first half of the angles, the column x in the second. In the first slice it is the rotation of EVA-02.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float64) / half
    along_depth, in_plane = 2333 ** -(exponent + 1 / half), 10000**-exponent
    z, y, x = (index.reshape(-1, 1) for index in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    return torch.cat([z * along_depth + y * in_plane, z * along_depth + x * in_plane], -1)


def resized_positions(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table of positions (1, features, z, y, x) on another grid: averaged along axes that shrink, then linear along those
    that grow."""
    shrunk = [min(there, wanted) for there, wanted in zip(table.shape[2:], grid, strict=True)]
    if shrunk != list(table.shape[2:]):
        table = interpolate(table, shrunk, mode="area")
    if shrunk != list(grid):
        table = interpolate(table, list(grid), mode="trilinear")
    return table


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a published ViT under the names they have here; other names stay as they are."""
    renamed = {}
    for name, tensor in tensors.items():
        for official, here in _OFFICIAL.items():
            name = name.replace(official, here)
        renamed[name] = tensor
    return renamed


def _filled(hidden: Tensor, visible: Tensor, mask_token: Tensor, length: int) -> Tensor:
    """Class token and visible tokens (N, 1 + n, C) to all of them (N, 1 + length, C), `mask_token` where nothing was seen."""
    masked = mask_token.to(hidden.dtype).expand(len(hidden), length, -1)
    seen = masked.scatter(1, visible[..., None].expand(-1, -1, hidden.shape[2]), hidden[:, 1:])
    return torch.cat([hidden[:, :1], seen], 1)
