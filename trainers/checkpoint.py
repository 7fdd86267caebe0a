"""Model checkpoints in nnU-Net's format: ours hold no numpy and no classes, stock ones are read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from planners.errors import DatasetError
from planners.files import replacing
from pretrain.safe_load import load_torch


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint of ours or of stock nnU-Net; anything that would run code is refused.

    Raises UnsafeFile for a file that asks for code, DatasetError for one that is missing or broken.
    """
    if not Path(path).is_file():
        raise DatasetError("No such checkpoint", where=path)
    checkpoint = load_torch(path, device, remedy="train or copy it again")
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise DatasetError("Not a checkpoint of nnU-Net", where=path, expected="a dict with network_weights")
    return checkpoint


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint whole or not at all."""
    with replacing(path) as temporary:
        torch.save(plain(checkpoint), temporary)


def plain(value: Any) -> Any:
    """`value` with numpy numbers and arrays turned into Python's, so that it loads without an allow-list."""
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value
