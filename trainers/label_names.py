"""Names of what a network segments, and the files that tell viewers about them."""

from __future__ import annotations

import colorsys
from pathlib import Path

from planners.dataset import label_values, original_labels
from planners.files import replacing


def class_names(dataset_json: dict) -> list[str]:
    """Names of the outputs of a network in nnU-Net's order: labels by value, regions as declared."""
    values = {name: v for name, v in label_values(dataset_json).items() if name != "ignore" and v not in (0, (0,))}
    if any(isinstance(value, tuple) for value in values.values()):
        return list(values)
    return sorted(values, key=lambda name: values[name])


def mask_values(dataset_json: dict) -> dict[int, str]:
    """Value in a predicted mask (remapping undone) -> name, background included.

    A region is written with its value in `regions_class_order`, on top of the regions before it.
    """
    names = class_names(dataset_json)
    if dataset_json.get("regions_class_order"):
        values = [int(v) for v in dataset_json["regions_class_order"]]
    else:
        declared = label_values(dataset_json)
        values = [int(declared[name]) for name in names]  # type: ignore[arg-type]
    original = original_labels(dataset_json) or {}
    return {0: "background", **{original.get(v, v): name for v, name in zip(values, names, strict=True)}}


def write_viewer_files(folder: Path, dataset_json: dict) -> None:
    """`labels.label.txt` for ITK-SNAP (Segmentation, Import Label Descriptions) and `labels.ctbl` for 3D Slicer."""
    names = mask_values(dataset_json)
    colours = {value: _colour(index) for index, value in enumerate(v for v in sorted(names) if v)}
    snap = ["# ITK-SNAP label description file: index, red, green, blue, opacity, visible, mesh visible, name"]
    snap.append('    0     0    0    0        0  0  0    "Clear Label"')
    slicer = ["# Color table for 3D Slicer: index, name, red, green, blue, alpha", "0 background 0 0 0 0"]
    for value, (red, green, blue) in colours.items():
        snap.append(f'{value:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{names[value]}"')
        slicer.append(f"{value} {names[value].replace(' ', '_')} {red} {green} {blue} 255")
    for file, lines in (("labels.label.txt", snap), ("labels.ctbl", slicer)):
        with replacing(folder / file) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _colour(index: int) -> tuple[int, int, int]:
    """Hues a golden angle apart: neighbours differ however many there are."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75 if index % 2 else 0.95, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)
