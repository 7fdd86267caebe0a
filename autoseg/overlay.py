"""One picture of predictions on scans, beside the reference: people look at masks before they trust numbers."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK

from planners.files import read_json, replacing


def draw_overlay(images: Path, masks: Path, references: Path, dataset_json: Path, target: Path) -> Path:
    """Draw the axial slice with most structures and the coronal slice of every predicted case; returns `target`.

    Args:
        images: scans named `case_0000.nii.gz`; the first channel is shown.
        masks, references: label maps named `case.nii.gz`, on the scans' grids.
    """
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    description = read_json(dataset_json)
    ending = description["file_ending"]
    names = sorted(path.name.removesuffix(ending) for path in masks.glob(f"*{ending}"))
    labels = {name: value for name, value in description["labels"].items() if isinstance(value, int) and value > 0}
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, 20))
    figure, axes = plt.subplots(
        len(names), 4, figsize=(15, 3.6 * len(names) + 0.8), squeeze=False, layout="constrained", facecolor="white"
    )
    for row, name in zip(axes, names, strict=True):
        scan = SimpleITK.ReadImage(str(images / f"{name}_0000{ending}"))
        voxels = SimpleITK.GetArrayFromImage(scan).astype(np.float32)
        spacing = scan.GetSpacing()[::-1]
        predicted = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(masks / f"{name}{ending}")))
        reference = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(references / f"{name}{ending}")))
        low, high = (
            np.percentile(voxels[reference > 0], (5, 95)) if (reference > 0).any() else np.percentile(voxels, (5, 95))
        )
        margin = 0.8 * (high - low)
        axial = int(np.argmax([len(np.unique(plane)) for plane in reference]))
        coronal = int(np.argmax([len(np.unique(reference[:, y])) for y in range(reference.shape[1])]))
        panels = (
            ("reference, axial", voxels[axial], reference[axial], spacing[1] / spacing[2]),
            ("predicted, axial", voxels[axial], predicted[axial], spacing[1] / spacing[2]),
            ("reference, coronal", voxels[::-1, coronal], reference[::-1, coronal], spacing[0] / spacing[2]),
            ("predicted, coronal", voxels[::-1, coronal], predicted[::-1, coronal], spacing[0] / spacing[2]),
        )
        for axis, (title, plane, mask, aspect) in zip(row, panels, strict=True):
            axis.imshow(plane, cmap="gray", vmin=low - margin, vmax=high + margin, aspect=aspect)
            coloured = colours[mask.astype(int) % 20].copy()
            coloured[..., 3] = np.where(mask > 0, 0.55, 0.0)
            axis.imshow(coloured, aspect=aspect, interpolation="nearest")
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.axis("off")
    figure.legend(
        handles=[Patch(color=colours[value % 20], label=name) for name, value in labels.items()],
        loc="outside lower center", ncols=min(13, len(labels)), fontsize=8, frameon=False,
    )  # fmt: skip
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return target
