"""The layout of the Medical Segmentation Decathlon: a dataset.json that lists pairs, channels inside 4D files.

Layout: Antonelli et al. 2022 (medicaldecathlon.com). Unlabelled test scans become `imagesTs`, as in nnU-Net.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import SimpleITK

from autoseg.convert.writing import (
    bytes_to_rewrite,
    copy_image,
    free_dataset_name,
    header_problem,
    new_dataset,
    refuse_problems,
    write_cases,
    write_image,
)
from planners import paths
from planners.dataset import split_ending
from planners.errors import DatasetError
from planners.files import read_json, write_json

logger = logging.getLogger("autoseg")

_ENDING = ".nii.gz"


def convert_msd(source: str | Path, identifier: int, name: str | None = None) -> Path:
    """Convert a Decathlon task to a raw nnU-Net dataset.

    Args:
        source: folder with the Decathlon's dataset.json.
        identifier: id of the new dataset, 1 to 999.
        name: of the new dataset; the task's own by default.

    Returns the new folder. Raises DatasetError with every problem of the source; nothing is written then.
    """
    source = Path(source)
    task = _read_task(source)
    full_name = free_dataset_name(identifier, name or str(task.get("name") or source.name))
    channels = [str(task["modality"][key]) for key in sorted(task["modality"], key=int)]
    labels, problems = _labels(task["labels"])
    training = [(source / pair["image"], source / pair["label"]) for pair in task["training"]]
    test = [source / path for path in task.get("test", [])]
    problems += _file_problems(training, test, len(channels))
    refuse_problems(problems, source)
    listed = {image.name for image, _ in training}
    present = {path.name for path in (source / "imagesTr").glob(f"*{_ENDING}") if not path.name.startswith(".")}
    if present - listed:
        logger.warning("%d file(s) in imagesTr are not listed in dataset.json and were left out", len(present - listed))

    with new_dataset(full_name) as folder:
        arguments: dict[str, tuple] = {
            f"imagesTr/{_case_name(image)}": (image, label, folder, "Tr", len(channels)) for image, label in training
        }
        arguments |= {f"imagesTs/{_case_name(image)}": (image, None, folder, "Ts", len(channels)) for image in test}
        write_cases(_write_case, arguments, bytes_to_rewrite([image for image, _ in training] + test))
        description = {
            "channel_names": {str(index): channel for index, channel in enumerate(channels)},
            "labels": labels,
            "numTraining": len(training),
            "file_ending": _ENDING,
        }
        kept = {key: task[key] for key in ("name", "description", "reference", "licence", "release") if key in task}
        write_json(folder / "dataset.json", {**kept, **description})
    return paths.raw(full_name)


def _read_task(source: Path) -> dict[str, Any]:
    path = source / "dataset.json"
    if not path.is_file():
        raise DatasetError(
            "No Decathlon task here",
            where=source,
            expected="a dataset.json beside imagesTr and labelsTr",
            remedy="give the folder of one task, such as Task04_Hippocampus; for other layouts: autoseg convert folder",
        )
    task = read_json(path)
    task = task if isinstance(task, dict) else {}
    wanted = {"modality": dict, "labels": dict, "training": list}
    wrong = [key for key, kind in wanted.items() if not isinstance(task.get(key), kind) or not task[key]]
    if not wrong and not all(isinstance(pair, dict) and {"image", "label"} <= pair.keys() for pair in task["training"]):
        wrong = ["training"]
    if wrong:
        raise DatasetError(
            "Not the description of a Decathlon task",
            where=path,
            found=f"no usable {', '.join(wrong)}",
            expected='"modality", "labels" and "training" with pairs of "image" and "label"',
            remedy="for other layouts: autoseg convert folder",
        )
    return task


def _labels(stored: dict[str, str]) -> tuple[dict[str, int], list[str]]:
    """{"0": "background", "1": "liver"} turned round, as nnU-Net has it, and what is wrong with it."""
    if not all(value.isdigit() for value in stored):
        return {}, [f"dataset.json: label values must be numbers, found {', '.join(stored)}"]
    labels = {"background": 0} | {str(stored[value]): int(value) for value in sorted(stored, key=int) if int(value) > 0}
    if sorted(labels.values()) != list(range(len(stored))):
        values = ", ".join(sorted(stored, key=int))
        return {}, [
            f"dataset.json: labels {values} are not 0, 1, 2, …; use `autoseg convert folder`, which closes gaps"
        ]
    return labels, []


def _file_problems(training: list[tuple[Path, Path]], test: list[Path], channels: int) -> list[str]:
    problems = []
    image_dimensions = [3] if channels == 1 else [4]
    checks = [
        (path, dimensions) for pair in training for path, dimensions in zip(pair, (image_dimensions, [3]), strict=True)
    ]
    for path, dimensions in checks + [(path, image_dimensions) for path in test]:
        shown = f"{path.parent.name}/{path.name}"
        if not path.is_file():
            problems.append(f"{shown}: no such file")
        elif not path.name.endswith(_ENDING):
            problems.append(f"{shown}: expected a {_ENDING} file")
        else:
            problem = header_problem(path, dimensions, channels)
            problems += [f"{path.parent.name}/{problem}"] if problem else []
    for files in ([image for image, _ in training], test):
        names = [_case_name(path) for path in files]
        problems += [
            f"{name}: listed {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1
        ]
    return problems


def _case_name(path: Path) -> str:
    return split_ending(path)[0]


def _write_case(image: Path, label: Path | None, folder: Path, part: str, channels: int) -> None:
    name = _case_name(image)
    if channels == 1:
        copy_image(image, folder / f"images{part}" / f"{name}_0000{_ENDING}")
    else:
        volumes = SimpleITK.ReadImage(str(image))
        for channel in range(channels):
            write_image(volumes[:, :, :, channel], folder / f"images{part}" / f"{name}_{channel:04d}{_ENDING}")
    if label is not None:
        copy_image(label, folder / f"labels{part}" / f"{name}{_ENDING}")
