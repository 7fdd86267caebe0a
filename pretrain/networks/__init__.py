"""Whole segmentation networks, and the exact table of what plans may name.

nnU-Net finds a network by its dotted path, so the classes are attributes of this package; they are imported when asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_CLASSES = {
    "SwinUNETR": "pretrain.networks.swin",
    "Primus": "pretrain.networks.primus",
    "PCRLUNet": "pretrain.networks.pcrl_unet",
    "PUMIT": "pretrain.networks.pumit",
    "MedDINOv3": "pretrain.networks.dino",
}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_CLASSES[name]), name)
