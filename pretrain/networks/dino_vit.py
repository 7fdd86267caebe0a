"""DINOv3's vision transformer for images of any size: what MedDINOv3 pretrains and its segmentation network starts from.

timm's class with what it lacks: a mask token, drop path that is the same in all blocks, the enlargement of positions, and
several blocks as maps. Tensors have timm's names. Positions enter as a rotation of queries and keys alone; sine and cosine stay
in float32, also under autocast.

Source: DINOv3 (arXiv:2508.10104; facebookresearch/dinov3) as in huggingface/pytorch-image-models:timm/models/eva.py.
Tokens are in the order class, storage, patches; patches in that of their grid (y, x), row by row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.networks.sac import require_multiple

TOKEN = 16
"""Edge of a patch, in pixels."""
STORAGE = 4
"""Storage tokens ("registers"), as in the released weights."""
_PREFIX = 1 + STORAGE
_NEW_SCALE = 0.1
"""Of what a block adds, in new weights, as in Primus (arXiv:2503.01835). With DINOv3's 1e-5 the class tokens of
new weights are the same for all images but for rounding: on phantoms their spread is 0.000, with 0.1 it is 0.02."""


class DinoViT(Eva):
    """Tokens of an image in context. As an encoder, its output is the maps of several blocks.

    Args:
        in_channels: of the image.
        embed_dim: features of a token; `embed_dim / num_heads` must be a multiple of 4 (ValueError).
        depth: number of blocks.
        num_heads: attention heads of each block.
        taken: numbers of the blocks, from 0, whose maps `forward` returns; None: those of `four_blocks`.
        eps: of all layer norms; 1e-5 with Meta's released weights, 1e-6 with those of MedDINOv3.
        qkv_bias: whether queries and values have a bias (keys never do); the released weights have none.
        drop_path: probability that a block's addition to a sample is left out in training, the same for all blocks.
        rope_rescale: in training, all positions of a batch are multiplied by one number, log-uniform in [1/r, r].
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        taken: Sequence[int] | None = None,
        eps: float = 1e-5,
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        rope_rescale: float | None = None,
    ) -> None:
        if embed_dim % (4 * num_heads):
            raise ValueError(f"{num_heads} heads of 4, 8, 12, … features do not make {embed_dim} features")
        super().__init__(
            patch_size=TOKEN,
            in_chans=in_channels,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            norm_layer=partial(LayerNorm, eps=eps),
            init_values=_NEW_SCALE,
            num_reg_tokens=STORAGE,
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_temperature=100,
            rope_rotate_half=True,
            use_fc_norm=False,
            dynamic_img_size=True,
        )
        if drop_path:  # timm's own argument grows with depth
            for block in self.blocks:
                block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        rope: Any = self.rope
        rope.rescale_coords, rope.aug_active = rope_rescale, rope_rescale is not None
        self.taken = list(four_blocks(depth) if taken is None else taken)
        self.output_channels = [embed_dim] * len(self.taken)
        self.strides = [[TOKEN, TOKEN], *[[1, 1]] * (len(self.taken) - 1)]

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """(B, C, y, x) to the maps (B, embed_dim, y/16, x/16) of the blocks `taken`, each after the last norm.

        y and x must be multiples of 16 (PlanError).
        """
        grid = [n // TOKEN for n in x.shape[2:]]
        kept = {index: hidden for index, hidden in enumerate(self._blocks(x)) if index in self.taken}
        maps = (self.norm(kept[index])[:, _PREFIX:] for index in self.taken)
        return [tokens.transpose(1, 2).unflatten(2, grid) for tokens in maps]

    def tokens(
        self, x: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, C, y, x) to the class token (B, embed_dim) and the patches (B, L, embed_dim), after the last norm.

        Args:
            masked: (B, L), bool; where it is true, `mask_token` stands instead of what the image shows.
            mask_token: (1, embed_dim), learned.
        """
        hidden = self.norm(deque(self._blocks(x, masked, mask_token), maxlen=1)[0])
        return hidden[:, 0], hidden[:, _PREFIX:]

    def layers(self) -> list[list[nn.Parameter]]:
        """The parameters in order of their distance from the image: tokens and patches, each block, the last norm."""
        first = [self.cls_token, self.reg_token, *self.patch_embed.parameters()]
        return [first, *(list(module.parameters()) for module in (*self.blocks, self.norm))]

    def _blocks(self, x: Tensor, masked: Tensor | None = None, mask_token: Tensor | None = None) -> Iterator[Tensor]:
        """Tokens (B, 1 + 4 + L, embed_dim) after each block, without the last norm."""
        require_multiple(x.shape[2:], [TOKEN, TOKEN])
        patches = self.patch_embed(x)
        if masked is not None and mask_token is not None:
            patches = torch.where(masked.view(*patches.shape[:3], 1), mask_token.to(patches.dtype), patches)
        hidden, rotation = self._pos_embed(patches)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, rope=rotation, use_reentrant=False)
            else:
                hidden = block(hidden, rope=rotation)
            yield hidden


def four_blocks(depth: int) -> list[int]:
    """The blocks at a quarter, half, three quarters and the whole of the depth: 2, 5, 8 and 11 of 12.

    >>> four_blocks(4)
    [0, 1, 2, 3]
    """
    return [-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
