"""Training patches turned and changed on the device that trains, for a fast GPU with few processor cores beside it.

The loader's processes only draw where a patch lies and read its voxels; nnU-Net's transforms do the rest here. Within a
patch all is drawn in nnU-Net's order, but all patches of a batch are placed before the first is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from trainers.patches import BoxLoader, Unturned, batch_of, finish

_DRAWN_BY_SHAPE = (
    GaussianBlurTransform,
    MultiplicativeBrightnessTransform,
    ContrastTransform,
    SimulateLowResolutionTransform,
    GammaTransform,
)
"""Transforms that draw without looking at the image's values. Noise is not among them: where it is drawn it is added."""


class DeviceAugmentation:
    """Batches as `PatchLoader` gives them, on a device, made of a `BoxLoader`'s."""

    def __init__(self, batches: Iterator[dict[str, Any]], loader: BoxLoader, device: torch.device) -> None:
        """`batches` are the loader's, from its processes or from itself."""
        self._batches, self._device = batches, device
        self._patch = loader.spatial.patch_size
        self._later = for_device(loader.later, device)

    def __iter__(self) -> DeviceAugmentation:
        return self

    @torch.no_grad()
    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        samples = [finish(self._moved(drawn), self._patch, self._later) for drawn in batch["unturned"]]
        return {**batch_of(samples), "keys": batch["keys"]}

    def _moved(self, drawn: Unturned) -> Unturned:
        image, labels = (drawn[part].to(self._device, non_blocking=True) for part in ("image", "labels"))
        return Unturned(image=image, labels=labels, matrix=drawn["matrix"], centre=drawn["centre"])

    def _finish(self) -> None:
        """End the loader's processes; named as in nnU-Net's iterator over them."""
        if hasattr(self._batches, "_finish"):
            self._batches._finish()


def for_device(later: ComposeTransforms, device: torch.device) -> ComposeTransforms:
    """The transforms, drawing the same, where they would make tensors that do not lie on `device` beside the patch."""
    transforms = []
    for transform in later.transforms:
        if isinstance(transform, RandomTransform) and isinstance(transform.transform, _DRAWN_BY_SHAPE):
            transform = RandomTransform(_DrawnOnCPU(transform.transform), transform.apply_probability)
        elif isinstance(transform, ConvertSegmentationToRegionsTransform):
            transform = copy.copy(transform)
            transform.regions = [labels.to(device) for labels in transform.regions]
        transforms.append(transform)
    return ComposeTransforms(transforms)


class _DrawnOnCPU(BasicTransform):
    """A transform whose parameters are drawn on the CPU, where reading them waits for no GPU, and which makes whatever else
    it needs, as the blur its kernel, on the image's device."""

    def __init__(self, transform: BasicTransform) -> None:
        super().__init__()
        self.transform = transform

    def __call__(self, **sample: Any) -> dict[str, Any]:
        image = sample["image"]
        drawn = self.transform.get_parameters(image=torch.empty((), dtype=image.dtype).expand(image.shape))
        with image.device:
            return self.transform.apply(sample, **drawn)
