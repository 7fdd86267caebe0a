"""`read_weights`: which project's weights a file or folder holds, by its content, whatever its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from planners.errors import AutosegError, DatasetError, PretrainedMismatch
from pretrain.encoders import encoder_of
from pretrain.importers import dinov3, nnssl, nnunet, pcrlv2, pumit, swin_unetr, voco
from pretrain.importers.autoseg_encoder import own_folder, read_own
from pretrain.importers.contents import Contents, read_contents
from pretrain.importers.folders import weights_file
from pretrain.importers.weights import Weights
from pretrain.networks.registry import build_network

RECOGNISERS: tuple[tuple[str, Callable[[Contents], Weights | None]], ...] = (
    ("nnssl, OpenMind", nnssl.recognise),
    ("nnU-Net v2", nnunet.recognise),
    ("VoCo, VoComni", voco.recognise),
    ("SwinUNETR of MONAI, SuPreM", swin_unetr.recognise),
    ("PCRL, PCRLv2", pcrlv2.recognise),
    ("PUMIT", pumit.recognise),
    ("DINOv3, MedDINOv3", dinov3.recognise),
    ("an encoder of a plain or residual U-Net", nnssl.recognise_bare),
)
"""Tried in order; the first that knows the content takes it. A new family of files is one more module and one line."""

_LARGEST = 10_000
"""No count, size or number of features of a network is larger; building one that claims so could take for ever."""


def read_weights(path: Path, *, branch: Literal["teacher", "student"] = "teacher") -> Weights:
    """Recognise and read a file or folder of weights. Nothing in it is run.

    Args:
        path: a file of any name, an encoder's folder, a model's folder of nnU-Net or nnssl.
        branch: which network to take where the file holds a student and its moving average.

    Raises UnsafeFile for a file that asks for code, PretrainedMismatch for weights of an unknown layout or that are not
    finite, DatasetError for a path that is missing, broken, or no file of weights.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError("No such file or folder of weights", where=path, remedy="check the path")
    if own := own_folder(path):
        return read_own(own)
    file, beside = weights_file(path)
    first: Contents | None = None
    for contents in read_contents(path, file, beside, branch):
        first = first or contents
        for _, recognise in RECOGNISERS:
            if weights := recognise(contents):
                return _verified(weights, path)
    raise _unknown(path, first)


def _verified(weights: Weights, path: Path) -> Weights:
    """Every tensor has a place of its shape in the network described; trainers may have built another one than they say."""
    if (largest := _largest(weights.architecture["arch_kwargs"])) > _LARGEST:
        raise PretrainedMismatch("The file describes a network of absurd size", where=path, found=largest)
    try:
        with torch.device("meta"):
            network = build_network(weights.architecture, weights.channels, 2, deep_supervision=False, initialise=False)
    except AutosegError:
        raise
    except Exception as error:
        raise PretrainedMismatch(
            "The network that the file describes cannot be built", where=path, found=f"{type(error).__name__}: {error}"
        ) from error
    module = encoder_of(network) if weights.scope == "encoder" else network
    places = {name: tensor.shape for name, tensor in module.state_dict().items()}
    grids = getattr(module, "position_grids", {})
    wrong = [
        name
        for name, tensor in weights.tensors.items()
        if places.get(name) != tensor.shape and not (name in grids and _is_grid(tensor, places[name], len(grids[name])))
    ]
    if wrong:
        raise PretrainedMismatch(
            "The tensors do not belong to the network that the file describes",
            where=path,
            found=f"{weights.kind}; {len(wrong)} of {len(weights.tensors)} tensors have no place: {', '.join(wrong[:5])}",
            expected=weights.architecture["network_class_name"].rpartition(".")[2],
            remedy="these weights cannot be used here: they come from a changed network",
        )
    return weights


def _is_grid(tensor: Tensor, place: torch.Size, dims: int) -> bool:
    """Whether a table of positions (1, features, *grid) has another grid at most, which the transfer resizes."""
    return tensor.ndim == len(place) == dims + 2 and tensor.shape[:2] == place[:2]


def _largest(value: object) -> float:
    """The largest number anywhere in a description."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return max((_largest(entry) for entry in value), default=0)
    return value if isinstance(value, int | float) else 0


def _unknown(path: Path, contents: Contents | None) -> PretrainedMismatch:
    names = list(contents.tensors) if contents else []
    return PretrainedMismatch(
        "These weights have a layout that is not known",
        where=path,
        found=f"{len(names)} tensors: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}",
        expected="; ".join(name for name, _ in RECOGNISERS),
        remedy="give weights of one of these, or pretrain with `autoseg pretrain`",
    )
