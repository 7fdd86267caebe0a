"""A model without training whose masks are as smooth as real ones, so that benchmarks measure everything around the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

CONFIGURATION = "3d_fullres"
_DARK, _BRIGHT = -2.0, 2.5  # standard deviations of the scan's intensity; air and bone lie beyond


class ToyNetwork(nn.Module):
    """Smooths the scan and gives each voxel to the nearest of evenly spaced intensities."""

    def __init__(self, classes: int, width: int = 9) -> None:
        super().__init__()
        self.lines = nn.ModuleList()
        for axis in range(3):
            size = [width if a == axis else 1 for a in range(3)]
            line = nn.Conv3d(1, 1, size, padding=[n // 2 for n in size], padding_mode="replicate", bias=False)
            nn.init.constant_(line.weight, 1 / width)
            self.lines.append(line)
        levels = torch.linspace(_DARK, _BRIGHT, classes)
        self.head = nn.Conv3d(1, classes, 1)
        with torch.no_grad():
            self.head.weight.copy_((8 * levels).view(-1, 1, 1, 1, 1))
            self.head.bias.copy_(-4 * levels**2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, z, y, x) -> logits (n, classes, z, y, x)."""
        for line in self.lines:
            x = line(x)
        return self.head(x)


class SmoothlyAnswering(nn.Module):
    """Costs what a network costs and answers nearly what the toy does: the masks of random weights would be noise, and writing
    noise costs what no real mask costs."""

    def __init__(self, costly: nn.Module, classes: int) -> None:
        super().__init__()
        self.costly, self.toy = costly, ToyNetwork(classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, z, y, x) -> logits (n, classes, z, y, x)."""
        return self.toy(x) + 1e-3 * self.costly(x)


def toy_plan(spacing_mm: float, patch: Sequence[int]) -> dict:
    """nnU-Net's default plan for CT, as far as prediction looks at it."""
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": "toy",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "spacing": [spacing_mm] * 3,
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": function,
        "resampling_fn_seg": function,
        "resampling_fn_probabilities": function,
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": {"network_class_name": "toy", "arch_kwargs": {}, "_kw_requires_import": []},
        "batch_dice": False,
    }
    intensity = {"mean": -50.0, "std": 300.0, "percentile_00_5": -950.0, "percentile_99_5": 900.0}
    return {
        "dataset_name": "Dataset001_Toy",
        "plans_name": "toyPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": intensity},
    }


def toy_dataset(classes: int, *, regions: bool = False) -> dict:
    """dataset.json of `classes` labels with the background, or of regions of which each holds the next."""
    labels: dict = {"background": 0}
    for label in range(1, classes):
        labels[f"c{label}"] = list(range(label, classes)) if regions and label < classes - 1 else label
    order = {"regions_class_order": list(range(1, classes))} if regions else {}
    return {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", **order}


def load_model(predictor: nnUNetPredictor, plan: dict, network: nn.Module, classes: int) -> None:
    """Give a predictor of nnU-Net, or one derived from it, a network of so many classes; it may mirror on all axes."""
    manager = PlansManager(plan)
    settings = manager.get_configuration(CONFIGURATION)
    states = [network.state_dict()]
    predictor.manual_initialization(
        network.eval(), manager, settings, states, toy_dataset(classes), "nnUNetTrainer", (0, 1, 2)
    )
