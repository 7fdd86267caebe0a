"""`read_weights`: which project's weights a file or folder holds, by its content, whatever its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from planners.errors import DatasetError, PretrainedMismatch
from pretrain.importers import voco
from pretrain.importers.autoseg_encoder import own_folder, read_own
from pretrain.importers.contents import Contents, read_contents
from pretrain.importers.weights import Weights

RECOGNISERS: tuple[tuple[str, Callable[[Contents], Weights | None]], ...] = (("VoCo and VoComni", voco.recognise),)
"""Tried in order; the first that knows the content takes it. A new family of files is one more module and one line."""


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
    first: Contents | None = None
    for contents in read_contents(path, path, branch):
        first = first or contents
        for _, recognise in RECOGNISERS:
            if weights := recognise(contents):
                return weights
    raise _unknown(path, first)


def _unknown(path: Path, contents: Contents | None) -> PretrainedMismatch:
    names = list(contents.tensors) if contents else []
    return PretrainedMismatch(
        "These weights have a layout that is not known",
        where=path,
        found=f"{len(names)} tensors: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}",
        expected="; ".join(name for name, _ in RECOGNISERS),
        remedy="give weights of one of these, or pretrain with `autoseg pretrain`",
    )
