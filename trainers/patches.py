"""nnU-Net's training patches, read after location, rotation and scaling are drawn, so that only the voxels needed are read.

Everything is drawn by nnU-Net's code in nnU-Net's order: from the same state of the generators come the same patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import threadpool_limits
from torch import Tensor

from trainers.spatial import OUTSIDE, Box, draw_pose, is_covered, turn


class Unturned(TypedDict):
    """The voxels a patch is made of and how it lies among them; plain, so that processes can send it and pin it."""

    image: Tensor
    """(C, *box) as stored."""
    labels: Tensor
    """(K, *box) as stored, or int16 where their type has no sign."""
    matrix: np.ndarray | None
    """Of the pose; None: the box is the patch."""
    centre: list[float]
    """Of the patch, in voxels from the middle of the box's first voxel."""


class BoxLoader(nnUNetDataLoader):
    """nnU-Net's loader of batches as far as reading, for `transforms` that `can_load` accepts; `finish` does the rest."""

    def __init__(self, *args: Any, transforms: ComposeTransforms, **options: Any) -> None:
        super().__init__(*args, transforms=transforms, **options)
        self.spatial, later = _parts(transforms.transforms)
        self.later = ComposeTransforms(later)

    def generate_train_batch(self) -> dict[str, Any]:
        """The patches as they are drawn and the cases' names."""
        cases = self.get_indices()
        with threadpool_limits(limits=1):
            return {"unturned": list(self.draw(cases)), "keys": cases}

    def draw(self, cases: Sequence[str]) -> Iterator[Unturned]:
        """A patch of each case: drawn and read when it is asked for."""
        for place, case in enumerate(cases):
            yield self.read(case, self.get_do_oversample(place))

    def read(self, case: str, with_foreground: bool) -> Unturned:
        """A patch of a case, drawn, and the voxels it needs."""
        image, labels, _, properties = self._data.load_case(case)
        start, end = self.get_bbox(image.shape[1:], with_foreground, properties["class_locations"])
        patch = self.spatial.patch_size
        pose = draw_pose(self.spatial, self.patch_size[-len(patch) :])
        # Boxes count from the start of the window. An axis that is not turned is as long in the patch as in the window.
        valid = [(max(-s, 0), min(e, n) - s) for s, e, n in zip(start, end, image.shape[1:], strict=True)]
        box = [(0, n) for n in self.patch_size[: -len(patch)]] + pose.box(patch, valid[-len(patch) :])
        voxels, marks = _read(image, start, box, valid, 0), _read(labels, start, box, valid, OUTSIDE)
        if self.patch_size_was_2d:
            voxels, marks = voxels[:, 0], marks[:, 0]
        centre = [c - 0.5 - first for c, (first, _) in zip(pose.centre, box[-len(patch) :], strict=True)]
        return Unturned(image=voxels, labels=marks, matrix=pose.matrix, centre=centre)


class PatchLoader(BoxLoader):
    """nnU-Net's loader of training batches, for `transforms` that `can_load` accepts."""

    def generate_train_batch(self) -> dict[str, Any]:
        """Images (B, C, *patch) float32, labels (B, 1, *patch), or a list of them by resolution, and the cases' names."""
        cases = self.get_indices()
        with torch.no_grad(), threadpool_limits(limits=1):
            samples = [finish(drawn, self.spatial.patch_size, self.later) for drawn in self.draw(cases)]
        return {**batch_of(samples), "keys": cases}


def finish(drawn: Unturned, patch: Sequence[int], later: ComposeTransforms) -> dict[str, Any]:
    """image (C, *patch) float32 and segmentation (K, *patch) int16: turned, then changed by the transforms that come `later`.

    Args:
        patch: its size along the axes that are turned.
    """
    image, labels = drawn["image"].float(), drawn["labels"]
    if drawn["matrix"] is not None:
        unturned = image.shape[1 : -len(patch)]
        channels = _as_channels(image, patch), _as_channels(labels, patch)
        turned = turn(*channels, drawn["matrix"], drawn["centre"], patch)
        image, labels = (t.reshape(-1, *unturned, *patch) for t in turned)
    return later(image=image, segmentation=labels.short())


def batch_of(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """nnU-Net's batch of patches; a list of targets where each has one by resolution."""
    targets = [sample["segmentation"] for sample in samples]
    by_resolution = isinstance(targets[0], list)
    return {
        "data": torch.stack([sample["image"] for sample in samples]),
        "target": [torch.stack(t) for t in zip(*targets, strict=True)] if by_resolution else torch.stack(targets),
    }


def can_load(transforms: BasicTransform) -> bool:
    """Whether `BoxLoader` and `PatchLoader` give what nnU-Net's loader gives with these transforms."""
    return isinstance(transforms, ComposeTransforms) and is_covered(_parts(transforms.transforms)[0])


def _parts(transforms: list[BasicTransform]) -> tuple[Any, list[BasicTransform]]:
    """The spatial transform and those after it. For anisotropic patches two stand beside it that make slices into channels
    and back, which the loader does itself."""
    if [type(transform) for transform in transforms[:3:2]] == [Convert3DTo2DTransform, Convert2DTo3DTransform]:
        return transforms[1], transforms[3:]
    return transforms[0], transforms[1:]


def _read(array: Any, start: Sequence[int], box: Box, valid: Box, fill: int) -> Tensor:
    """The voxels of a box, `fill` where it leaves `valid`.

    Args:
        array: (channels, z, y, x), read when it is sliced.
        start: of the window in the array.
    """
    inside = [(max(b, v), min(e, w)) for (b, e), (v, w) in zip(box, valid, strict=True)]
    read = np.asarray(array[_slices(inside, start)])
    voxels = torch.from_numpy(read.astype(np.int16) if read.dtype.kind == "u" else read)
    if inside == box:
        return voxels
    whole = torch.full((len(voxels), *(end - first for first, end in box)), fill, dtype=voxels.dtype)
    whole[_slices(inside, [-first for first, _ in box])] = voxels
    return whole


def _slices(box: Box, shift: Sequence[int]) -> tuple[slice, ...]:
    """A box in all channels of an array, which has the box's zero at `shift`."""
    return (slice(None), *(slice(first + s, end + s) for (first, end), s in zip(box, shift, strict=True)))


def _as_channels(voxels: Tensor, patch: Sequence[int]) -> Tensor:
    """(C, z, y, x) -> (C * z, y, x) where slices are turned, else as it is."""
    return voxels.flatten(0, -len(patch) - 1)
