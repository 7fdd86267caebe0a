"""Model checkpoints in nnU-Net's format: ours hold no numpy and no classes, stock ones are read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from planners.errors import DatasetError, UnsafeFile
from planners.files import replacing

# What a stock nnU-Net checkpoint holds beside tensors and plain values: logged numbers. numpy 1 and 2 name them differently.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # type: ignore[index]
_NUMPY_GLOBALS: list[Any] = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")},
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint of ours or of stock nnU-Net; anything that would run code is refused.

    Raises UnsafeFile for a file that asks for code, DatasetError for one that is missing or broken.
    """
    if not Path(path).is_file():
        raise DatasetError("No such checkpoint", where=path)
    try:
        with torch.serialization.safe_globals(_NUMPY_GLOBALS):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error) and "global" not in str(error).lower():
            raise _broken(path, error) from error
        raise UnsafeFile(
            "The checkpoint asks for code to be run; nothing of it was",
            where=path,
            found=next((line.strip()[:200] for line in str(error).splitlines() if "GLOBAL" in line), "not plain data"),
            remedy="do not use this file unless you know who made it",
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise _broken(path, error) from error
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


def _broken(path: str | Path, error: Exception) -> DatasetError:
    return DatasetError(
        "The checkpoint cannot be read", where=path, found=str(error).splitlines()[0], remedy="train or copy it again"
    )
