"""The demonstration's dataset: phantoms of the abdomen as a raw nnU-Net dataset, made offline in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import SimpleITK

from autoseg.anatomy import Phantom, draw_phantom
from autoseg.convert.label_sets import LABEL_SETS
from planners.errors import DatasetError
from planners.files import read_json, replacing, write_json
from planners.progress import track

MADE_BY = "autoseg demo"

# Every group draws from random streams of its own, so that asking for more of one leaves the others as they were.
_GROUPS = (("imagesTr", "labelsTr", 0), ("imagesUn", None, 1), ("imagesTs", "labelsTs", 2))


def write_phantoms(folder: Path, labelled: int = 12, unlabelled: int = 4, test: int = 3, seed: int = 0) -> None:
    """Write a raw dataset such as `<raw>/Dataset017_BTCV`: training, unlabelled and test phantoms with BTCV's thirteen organs.

    The same arguments write the same voxels, and files that they have written before are left alone. Phantoms drawn with
    other arguments are replaced; any other dataset in `folder` raises DatasetError.
    """
    if folder.exists() and not made_by_demo(folder):
        raise DatasetError(
            "The demonstration would overwrite a dataset that it did not make",
            where=folder,
            remedy="give the demonstration a folder of its own: autoseg demo --root DIR",
        )
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **LABEL_SETS["btcv"]},
        "numTraining": labelled,
        "file_ending": ".nii.gz",
        "name": "Abdominal phantoms",
        "description": "CT-like phantoms with the organs and labels of BTCV; no patient data",
        "licence": "CC0-1.0",
        "autoseg": {"made_by": MADE_BY, "seed": seed},
    }
    if folder.exists() and read_json(folder / "dataset.json") != description:
        shutil.rmtree(folder)
    if not folder.exists():
        # First, so that a demonstration that was interrupted still owns its folder.
        write_json(folder / "dataset.json", description)
    counts = {"imagesTr": labelled, "imagesUn": unlabelled, "imagesTs": test}
    todo = [(images, labels, group, i) for images, labels, group in _GROUPS for i in range(counts[images])]
    for images, labels, group, index in track(todo, "Drawing phantoms"):
        name = f"phantom_{images[-2:].lower()}{index + 1:02d}"
        image_path = folder / images / f"{name}_0000.nii.gz"
        label_path = folder / labels / f"{name}.nii.gz" if labels else None
        if image_path.is_file() and (label_path is None or label_path.is_file()):
            continue
        phantom = draw_phantom(np.random.default_rng([seed, group, index]))
        _write(phantom.hu, phantom, image_path)
        if label_path:
            _write(phantom.labels, phantom, label_path)


def made_by_demo(folder: Path) -> bool:
    """Whether the raw dataset in `folder` was written by the demonstration."""
    path = folder / "dataset.json"
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and content.get("autoseg", {}).get("made_by") == MADE_BY


def _write(voxels: np.ndarray, phantom: Phantom, path: Path) -> None:
    """Write (z, y, x) voxels; the identity direction of ITK is left-posterior-superior, as the phantom's indices are."""
    image = SimpleITK.GetImageFromArray(voxels)
    spacing_xyz = phantom.spacing_mm[::-1]
    image.SetSpacing(spacing_xyz)
    image.SetOrigin([-(n - 1) / 2 * s for n, s in zip(image.GetSize(), spacing_xyz, strict=True)])
    with replacing(path) as temporary:
        SimpleITK.WriteImage(image, str(temporary), True)
