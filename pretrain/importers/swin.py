"""The names of MONAI's SwinUNETR, which VoCo, SuPreM and NVIDIA's self-supervised weights share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from planners.errors import PretrainedMismatch

NETWORK = "pretrain.networks.SwinUNETR"

_TRANSFORMER = re.compile(r"(patch_embed|layers[1-4]c?)\.")
_ENCODER = re.compile(r"(swinViT|encoder(1|2|3|4|10))\.")
_DECODER = re.compile(r"decoder[1-5]\.")
_SPELLINGS = (("swin_vit.", "swinViT."), (".mlp.fc", ".mlp.linear"))
_FIRST = "swinViT.patch_embed.proj.weight"
_TABLE = "attn.relative_position_bias_table"


def swin_name(name: str, *, decoder: bool) -> str:
    """A tensor's name in SwinUNETR as MONAI has it today, or `!reason` where it is not taken."""
    for old, new in _SPELLINGS:
        name = name.replace(old, new)
    if _TRANSFORMER.match(name):
        name = f"swinViT.{name}"
    if _ENCODER.match(name) or (decoder and _DECODER.match(name)):
        return name
    if _DECODER.match(name):
        return "!decoder"
    if name.startswith("out."):
        return "!output layer for the classes of the file"
    return "!no part of SwinUNETR"


def is_swin(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors have the grammar of SwinUNETR's transformer, with or without `swinViT.` in front."""
    names = {swin_name(name, decoder=False) for name in tensors}
    return _FIRST in names and f"swinViT.layers1.0.blocks.0.{_TABLE}" in names


def swin_architecture(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The plan's `architecture` entry, from the shapes of tensors named by `swin_name`.

    Raises PretrainedMismatch where stages or tables are missing.
    """
    first = tensors[_FIRST]
    depths, heads = [], []
    side = 0
    for stage in range(1, 5):
        depths.append(len({n.split(".")[4] for n in tensors if n.startswith(f"swinViT.layers{stage}.0.blocks.")}))
        table = tensors.get(f"swinViT.layers{stage}.0.blocks.0.{_TABLE}")
        if table is None or table.ndim != 2:
            raise PretrainedMismatch(
                "The Swin transformer is not complete", found=f"no position table in stage {stage}"
            )
        heads.append(int(table.shape[1]))
        side = round(table.shape[0] ** (1 / (first.ndim - 2)))
    return {
        "network_class_name": NETWORK,
        "arch_kwargs": {
            "feature_size": int(first.shape[0]),
            "depths": depths,
            "num_heads": heads,
            "window_size": (side + 1) // 2,
            "use_v2": any(name.startswith("swinViT.layers1c.") for name in tensors),
            "use_checkpoint": True,
        },
        "_kw_requires_import": [],
    }


def swin_input(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Input channels and spatial dimensions."""
    first = tensors[_FIRST]
    return int(first.shape[1]), first.ndim - 2
