"""A tiny dataset with anatomy that a tiny network learns in seconds, and a plan small enough to train it on a CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from planners import paths
from pretrain.case_index import channel_range
from pretrain.volumes import CaseInfo

DATASET = "Dataset901_Tiny"
SPACING_MM = (2.5, 1.1, 1.0)  # (z, y, x)
LABELS = {"background": 0, "organ": 1, "core": 2}
REGION_LABELS = {"background": 0, "whole": [1, 2], "core": 2}


def tiny_scan(seed: int, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, Z, Y, X) float32 and labels (Z, Y, X) uint8: a bright ellipsoid with a brighter core, in noise."""
    rng = np.random.default_rng(seed)
    shape = np.array([13, 27, 22]) + rng.integers(-1, 2, 3)
    centre = shape / 2 + rng.uniform(-1.5, 1.5, 3)
    radii = np.array([4.2, 8.5, 7.0]) * rng.uniform(0.9, 1.1, 3)
    grid = np.moveaxis(np.indices(shape), 0, -1)
    distance = np.sqrt((((grid - centre) / radii) ** 2).sum(-1))
    labels = np.zeros(shape, np.uint8)
    labels[distance < 1] = 1
    labels[distance < 0.55] = 2
    image = np.stack(
        [np.array([0, 60, 140])[labels] * (-1) ** c + 100 + rng.normal(0, 12, shape) for c in range(channels)]
    )
    return image.astype(np.float32), labels


class Array:
    """A volume in memory, (channels, *space), read like `pretrain.volumes.Volume`."""

    def __init__(
        self,
        voxels: np.ndarray,
        name: str = "a",
        *,
        spacing: tuple[float, ...] | None = None,
        original_spacing: tuple[float, ...] | None = None,
    ) -> None:
        shape = voxels.shape[1:]
        self.voxels = voxels.astype(np.float32)
        mean, plain = voxels.mean(0), spacing or (1.0,) * len(shape)
        self.info = CaseInfo(
            id=name,
            source="memory",
            shape=shape,
            spacing=plain,
            original_spacing=original_spacing or plain,
            channels=len(voxels),
            foreground_box=tuple((0, n) for n in shape),
            foreground_threshold=-1e9,
            intensity_range=(float(np.quantile(mean, 0.01)), float(np.quantile(mean, 0.99))),
            intensity_std=float(mean.std()),
            channel_ranges=tuple(channel_range(channel) for channel in voxels),
        )

    def read(self, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        assert all(s >= 0 and s + n <= whole for s, n, whole in zip(start, size, self.info.shape, strict=True))
        return self.voxels[(slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]

    def plane(self, index: int) -> Array:
        return Array(self.voxels[:, index], spacing=self.info.spacing[1:])


def write_image(array: np.ndarray, file: Path) -> None:
    """Write (Z, Y, X) with the spacing above and a grid that is not at the origin."""
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing([float(s) for s in reversed(SPACING_MM)])
    image.SetOrigin([-3.5, 12.25, 40.0])
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(file))


def write_tiny_dataset(
    root: Path, *, cases: int = 6, channels: int = 1, regions: bool = False, name: str = DATASET, test_cases: int = 0
) -> Path:
    """Write a raw nnU-Net dataset below `root`, point all paths there, and return `root`.

    Labels are `organ` and `core`, or with `regions` the overlapping `whole` and `core`. Test cases are labelled too.
    """
    paths.configure(root)
    folder = paths.raw(name)
    for index in range(cases + test_cases):
        kind = "Tr" if index < cases else "Ts"
        image, labels = tiny_scan(index, channels)
        for channel in range(channels):
            write_image(image[channel], folder / f"images{kind}" / f"case_{index:02d}_{channel:04d}.nii.gz")
        write_image(labels, folder / f"labels{kind}" / f"case_{index:02d}.nii.gz")
    dataset_json: dict = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": REGION_LABELS if regions else LABELS,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    if regions:
        dataset_json["regions_class_order"] = [1, 2]
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return root


def tiny_plan(
    *,
    dims: int = 3,
    channels: int = 1,
    name: str = "tinyPlans",
    dataset: str = DATASET,
    strides: Sequence[Sequence[int]] = ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    flat: int = 1,
) -> dict:
    """A plan in nnU-Net's format with one configuration, `3d_fullres` or `2d`: stages of 8, 16, 32, … features.

    Args:
        strides: of each stage, (z, y, x); flat: the first stages, whose kernels see one slice.
    """
    spacing = list(SPACING_MM)[3 - dims :]
    stages = len(strides)
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"tiny_{dims}d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2 if dims == 3 else 8,
        "patch_size": [8, 24, 20][3 - dims :],
        "median_image_size_in_voxels": [13.0, 27.0, 22.0][3 - dims :],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [8 * 2**stage for stage in range(stages)],
                "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
                "kernel_sizes": [[1 if stage < flat else 3, 3, 3][3 - dims :] for stage in range(stages)],
                "strides": [list(stride)[3 - dims :] for stride in strides],
                "n_blocks_per_stage": [1] * (stages - 1) + [2],
                "n_conv_per_stage_decoder": [1] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": dims == 2,
        "autoseg": {"DA": 1 if dims == 3 else None},
    }
    return {
        "dataset_name": dataset,
        "plans_name": name,
        "original_median_spacing_after_transp": list(SPACING_MM),
        "original_median_shape_after_transp": [13, 27, 22],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres" if dims == 3 else "2d": configuration},
        "experiment_planner_used": "by hand",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(c): {"mean": 150.0, "std": 40.0, "median": 150.0, "min": 0.0, "max": 300.0,
                     "percentile_00_5": 50.0, "percentile_99_5": 280.0}
            for c in range(channels)
        },
    }  # fmt: skip


def dataset_json(channels: int = 1) -> dict:
    """What `write_tiny_dataset` writes, for tests that need no files."""
    return {"channel_names": {str(c): f"MR{c}" for c in range(channels)}, "labels": LABELS, "file_ending": ".nii.gz"}


def write_tiny_plan(plan: dict) -> None:
    """Put a plan where `train` finds it."""
    file = paths.preprocessed(plan["dataset_name"]) / f"{plan['plans_name']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plan))
