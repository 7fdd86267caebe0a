"""Which file of a folder holds the weights, and what lies beside it: folders of nnssl and nnU-Net, single downloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planners.errors import DatasetError
from pretrain.importers.contents import read_extra_json

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".model", ".safetensors")
_BESIDE = {"adaptation_plan.json": "nnssl_adaptation_plan", "plans.json": "plans", "dataset.json": "dataset_json"}


def weights_file(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file with the tensors that `path` (itself a file, or a folder) means, and the JSON beside it.

    A model of nnU-Net has one file a fold: fold_0, else fold_all, else the first is taken; the fold's name is among
    what is returned. Raises DatasetError for a folder with nothing known, with several files to choose from, or with pieces.
    """
    _refuse_pieces(path if path.is_dir() else path.parent, path)
    if path.is_file():
        model = path.parent.parent if path.parent.name.startswith("fold_") else path.parent
        return path, _beside(model, path)
    folds = sorted(path.glob("fold_*/checkpoint_*.pth"), key=_preference)
    if folds:
        return folds[0], _beside(path, folds[0])
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    final = [file for file in files if file.name == "checkpoint_final.pth"]
    if len(files) == 1 or final:
        chosen = (final or files)[0]
        return chosen, _beside(path, chosen)
    if files:
        raise DatasetError(
            "The folder holds several files of weights",
            where=path,
            found=", ".join(file.name for file in files[:8]),
            remedy="give the one that is meant",
        )
    inside = sorted(entry.name for entry in path.iterdir())
    raise DatasetError(
        "The folder holds no weights that are known",
        where=path,
        found=", ".join(inside[:8]) or "nothing",
        expected="an encoder of autoseg; a model of nnU-Net (plans.json, fold_0/checkpoint_final.pth); a checkpoint of "
        f"nnssl (checkpoint_final.pth); or one file ending in {' '.join(_SUFFIXES)}",
        remedy="give the folder that holds these, or the file itself",
    )


def _refuse_pieces(folder: Path, path: Path) -> None:
    """DINOv3's training saves with torch.distributed.checkpoint: a piece a process, and a pickle that describes them."""
    is_piece = path.suffix == ".distcp" or path.name == ".metadata"
    if not is_piece and (path.is_file() or not any(path.glob("*.distcp"))):
        return
    raise DatasetError(
        "A checkpoint in pieces cannot be read; nothing of it was",
        where=path,
        found=", ".join(sorted(file.name for file in folder.glob("*.distcp"))[:8]) or path.name,
        expected="one file",
        remedy="put the pieces together, in Python, if you know who made them: their .metadata may hold a program\n"
        "            from torch.distributed.checkpoint.format_utils import dcp_to_torch_save\n"
        f"            dcp_to_torch_save({str(folder)!r}, 'weights.pt')",
    )


def _preference(file: Path) -> tuple:
    order = {"fold_0": 0, "fold_all": 1}
    return (file.name != "checkpoint_final.pth", order.get(file.parent.name, 2), file.parent.name, file.name)


def _beside(folder: Path, file: Path) -> dict[str, Any]:
    found = {key: content for name, key in _BESIDE.items() if (content := read_extra_json(folder, name)) is not None}
    return {**found, "fold": file.parent.name} if file.parent.name.startswith("fold_") else found
