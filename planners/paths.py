"""Where data live: one root, nnU-Net's three folders below it. Standard library only.

nnU-Net reads its folders from environment variables at each use, and child processes inherit them, so `configure`
assigns those variables and everything else asks `raw`, `preprocessed` and `results`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from planners.errors import DatasetError, SettingsError

_VARIABLES = {"raw": "nnUNet_raw", "preprocessed": "nnUNet_preprocessed", "results": "nnUNet_results"}
_DATASET = re.compile(r"Dataset(\d{3,})_[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Root:
    """The three folders and who chose them (`--root`, `AUTOSEG_ROOT`, nnU-Net's variables or the default)."""

    raw: Path
    preprocessed: Path
    results: Path
    origin: str

    def __str__(self) -> str:
        if self.raw.parent == self.preprocessed.parent == self.results.parent:
            return f"{self.raw.parent}  (from {self.origin})"
        return f"raw {self.raw}, preprocessed {self.preprocessed}, results {self.results}  (from {self.origin})"


def configure(root: str | Path | None = None) -> Root:
    """Choose the folders: `root`, else `AUTOSEG_ROOT`, else nnU-Net's variables, else `./autoseg_data`.

    Assigns nnU-Net's variables; folders are made when first written to.
    """
    # nnU-Net's own calls of torch.load run what a checkpoint asks for; with this torch refuses, in child processes too.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.setdefault("nnUNet_def_n_proc", "1")  # frozen when nnunetv2 is imported; our own code sizes its workers
    chosen, origin = root, "--root"
    if chosen is None and os.environ.get("AUTOSEG_ROOT"):
        chosen, origin = os.environ["AUTOSEG_ROOT"], "AUTOSEG_ROOT"
    if chosen is None:
        stock = {name: os.environ.get(variable) for name, variable in _VARIABLES.items()}
        missing = [_VARIABLES[name] for name, value in stock.items() if not value]
        if not missing:
            folders = {name: Path(str(folder)).absolute() for name, folder in stock.items()}
            return Root(**folders, origin="nnU-Net's variables")
        if len(missing) < len(_VARIABLES):
            raise SettingsError(
                "Only some of nnU-Net's folder variables are set",
                found=", ".join(v for v in _VARIABLES.values() if v not in missing),
                expected=f"also {', '.join(missing)}, or none of them",
                remedy="set the missing ones, or give one folder with --root DIR",
            )
        chosen, origin = "autoseg_data", "the default"
    base = Path(chosen).expanduser().absolute()
    if base.exists() and not base.is_dir():
        raise SettingsError("The data root is not a folder", where=base, remedy="give a folder with --root DIR")
    for name, variable in _VARIABLES.items():
        os.environ[variable] = str(base / name)
    return Root(base / "raw", base / "preprocessed", base / "results", origin)


def raw(dataset_name: str) -> Path:
    """`<raw>/Dataset017_BTCV`: images, labels and dataset.json as the user gave them."""
    return Path(os.environ["nnUNet_raw"]) / dataset_name


def preprocessed(dataset_name: str) -> Path:
    """`<preprocessed>/Dataset017_BTCV`: plans, splits and preprocessed cases."""
    return Path(os.environ["nnUNet_preprocessed"]) / dataset_name


def results(dataset_name: str) -> Path:
    """`<results>/Dataset017_BTCV`: pretrained encoders and trained models."""
    return Path(os.environ["nnUNet_results"]) / dataset_name


def existing_datasets() -> list[str]:
    """Names of all datasets below any of the three folders, sorted by id."""
    names: set[str] = set()
    for variable in _VARIABLES.values():
        folder = Path(os.environ[variable])
        if folder.is_dir():
            names.update(p.name for p in folder.iterdir() if p.is_dir() and _DATASET.fullmatch(p.name))
    return sorted(names, key=lambda name: (dataset_id(name), name))


def dataset_id(name: str) -> int:
    """17 for Dataset017_BTCV."""
    match = _DATASET.fullmatch(name)
    if match is None:
        raise DatasetError("Not a dataset name", found=name, expected="Dataset017_BTCV")
    return int(match.group(1))


def resolve_dataset(dataset: int | str) -> str:
    """The dataset's folder name from an id (17, "17") or a name (Dataset017_BTCV)."""
    text = str(dataset)
    known = existing_datasets()
    if text.isdigit():
        hits = [name for name in known if dataset_id(name) == int(text)]
    else:
        hits = [name for name in known if name == text]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise DatasetError(
            f"Dataset id {text} is not unique", found=", ".join(hits), remedy="name it in full: -d " + hits[0]
        )
    raise DatasetError(
        f"No dataset {text}",
        where=os.environ["nnUNet_raw"],
        found=", ".join(known) or "no dataset at all",
        remedy="make one with `autoseg convert msd SRC -d ID` or `autoseg convert folder`, or point --root at your data",
    )


def new_dataset_name(identifier: int, name: str) -> str:
    """`Dataset017_BTCV` from 17 and "BTCV"; refuses ids and names nnU-Net cannot hold."""
    if not 1 <= identifier <= 999:
        raise SettingsError("Dataset ids go from 1 to 999", found=identifier)
    clean = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-")
    if not clean:
        raise SettingsError("The dataset needs a name of letters and digits", found=name, remedy="--name Hippocampus")
    return f"Dataset{identifier:03d}_{clean}"
