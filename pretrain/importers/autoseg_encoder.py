"""autoseg's own encoders: a folder with `encoder.safetensors` and `encoder.json`."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from planners.intensity import IntensityScheme
from pretrain.checkpoint import CARD_NAME, WEIGHTS_NAME, load_encoder
from pretrain.importers.primus import position_grids
from pretrain.importers.weights import Weights

_STOCK = {"ZScoreNormalization": "zscore", "CTNormalization": "ct-percentile", "NoNormalization": "none"}
_STOCK |= {"RescaleTo01Normalization": "minmax", "RGBTo01Normalization": "rgb"}


def own_folder(path: Path) -> Path | None:
    """The folder of the encoder that `path` (the folder or its weights) is, else None. One of the files may be missing."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        return folder if (folder / WEIGHTS_NAME).exists() or (folder / CARD_NAME).exists() else None
    return folder if path.name == WEIGHTS_NAME and (folder / CARD_NAME).exists() else None


def read_own(folder: Path) -> Weights:
    """An encoder that `autoseg pretrain` wrote. Errors as `pretrain.checkpoint.load_encoder`."""
    tensors, card = load_encoder(folder)
    return Weights(
        name=re.sub(r"[^A-Za-z0-9.-]+", "-", folder.resolve().name).strip(".-") or card.method,
        kind=f"autoseg encoder, {card.method} on {card.dataset}",
        method=card.method,
        architecture=card.architecture,
        tensors=tensors,
        scope=card.scope,
        channels=len(card.channels),
        spatial_dims=len(card.spacing),
        sha256=hashlib.sha256((folder / WEIGHTS_NAME).read_bytes()).hexdigest(),
        patch_size=tuple(card.patch_size),
        spacing=tuple(card.spacing),
        intensity=tuple(_scheme(entry) for entry in card.intensity),
        modality=None,
        licence=card.licence,
        citation=card.citation,
        trained_on=card.dataset,
        card=card,
        position_grids=position_grids(card.architecture),
    )


def _scheme(entry: Any) -> IntensityScheme:
    """One entry of a card: what a plan keeps of a scheme, or the name of nnU-Net's class."""
    if isinstance(entry, dict):
        window = entry.get("window")
        return IntensityScheme(entry["scheme"], entry.get("because", ""), tuple(window) if window else None)
    return IntensityScheme(_STOCK.get(str(entry), "zscore"), "as the encoder was pretrained")
