"""Patches for training, read from a preprocessed CT, cut, turned and augmented, in one process as its loader does it.

Both loaders read the same files in nnU-Net's format and draw from the same state of the generators, so their batches can be
compared voxel by voxel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from benchmarks.measuring import Agreement, Duel, Made, Scale
from benchmarks.scans import Scan, made_up, real_ct
from planners.class_locations import class_locations
from trainers.base import AutosegTrainer
from trainers.data import SafeDataset, seed_all
from trainers.patches import BoxLoader, PatchLoader

Batches = list[dict[str, Any]]

_ROTATION = (-np.pi / 6, np.pi / 6)  # nnU-Net's for 3D patches that are not anisotropic


def patches_2(scale: Scale) -> Made:
    """Two labels: nnU-Net scores each of them over the whole window."""
    return _duel(scale, 2)


def patches_60(scale: Scale) -> Made:
    """Sixty labels."""
    return _duel(scale, 60)


@contextmanager
def _duel(scale: Scale, labels: int) -> Iterator[Duel]:
    full = scale is Scale.full
    scan = real_ct(1.5, labels) if full else made_up((110, 100, 120), labels)
    patch, batches = ((128, 128, 128), 10) if full else ((64, 64, 64), 6)
    with TemporaryDirectory() as folder:
        save(scan, patch, labels, folder)
        theirs, ours = loaders(folder, patch, labels)
        yield Duel(_drawing(theirs, batches), _drawing(ours, batches), _same_batches)


def save(scan: Scan, patch: tuple[int, ...], labels: int, folder: str) -> None:
    """One case with `labels`, preprocessed as nnU-Net keeps it."""
    image = ((scan.image - scan.image.mean()) / scan.image.std())[None]
    marks = scan.labels.astype(np.int8)[None]
    blocks, chunks = comp_blosc2_params(image.shape, patch)
    places = class_locations(marks, list(range(1, labels + 1)))
    properties = {"class_locations": places, "spacing": scan.spacing}
    target = str(Path(folder) / "ct")
    nnUNetDatasetBlosc2.save_case(image, marks, properties, target, chunks=chunks, blocks=blocks)


def loaders(folder: str, patch: tuple[int, ...], labels: int) -> tuple[nnUNetDataLoader, nnUNetDataLoader]:
    """nnU-Net's loader and ours of the case in `folder`."""
    return (
        _loader(nnUNetDataLoader, nnUNetDatasetBlosc2(folder), nnUNetTrainer, patch, labels),
        _loader(PatchLoader, SafeDataset(folder), AutosegTrainer, patch, labels),
    )


def box_loader(folder: str, patch: tuple[int, ...], labels: int) -> BoxLoader:
    """Our loader of the case in `folder` for augmentation on the training device."""
    return _loader(BoxLoader, SafeDataset(folder), AutosegTrainer, patch, labels)


def _loader(kind: type, data: Any, trainer: type, patch: tuple[int, ...], labels: int) -> Any:
    """As the trainer's `get_dataloaders` makes it: batch 2, a third of the patches with foreground."""
    scales = [[0.5**level] * 3 for level in range(5)]
    augmentation = trainer.get_training_transforms(patch, _ROTATION, scales, (0, 1, 2), False)
    window = get_patch_size(patch, _ROTATION, _ROTATION, _ROTATION, (0.85, 1.25))
    names = SimpleNamespace(all_labels=list(range(1, labels + 1)), has_ignore_label=False)
    return kind(data, 2, window, patch, names, oversample_foreground_percent=0.33, transforms=augmentation)


def _drawing(loader: nnUNetDataLoader, batches: int) -> Callable[[], Batches]:
    def draw() -> Batches:
        drawn = []
        for seed in range(batches):
            seed_all(seed)
            drawn.append(next(loader))
        return drawn

    return draw


def _same_batches(reference: Batches, ours: Batches) -> Agreement:
    pairs = list(zip(reference, ours, strict=True))
    farthest = max(float((a["data"] - b["data"]).abs().max()) for a, b in pairs)
    equal = torch.cat([(a["target"][0] == b["target"][0]).flatten() for a, b in pairs]).double().mean().item()
    return Agreement(f"{equal:.7f} of labels, image max {farthest:.1e} sd", equal >= 0.99999 and farthest < 1e-3)
