"""Primus, the plain transformer of dynamic-network-architectures (arXiv:2503.01835): its sizes and its position table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NETWORK = "pretrain.networks.Primus"

SIZES: dict[str, dict[str, int]] = {
    "PrimusS": {"embed_dim": 396, "eva_depth": 12, "eva_numheads": 6},
    "PrimusB": {"embed_dim": 792, "eva_depth": 12, "eva_numheads": 12},
    "PrimusM": {"embed_dim": 864, "eva_depth": 16, "eva_numheads": 12},
    "PrimusL": {"embed_dim": 1056, "eva_depth": 24, "eva_numheads": 16},
}
"""As in dynamic_network_architectures.architectures.primus."""


def position_grids(architecture: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Token grid of the position table of a Primus; empty for other networks."""
    if architecture["network_class_name"] != NETWORK:
        return {}
    arguments = architecture["arch_kwargs"]
    shape, patch = arguments["input_shape"], arguments["patch_embed_size"]
    return {"eva.pos_embed": tuple(int(n) // int(p) for n, p in zip(shape, patch, strict=True))}
