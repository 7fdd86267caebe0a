"""Any folder of scans with labels becomes a raw nnU-Net dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from autoseg.convert.label_values import plan_labels, read_label_values
from autoseg.convert.pairing import find_cases
from autoseg.convert.writing import (
    KEPT_ENDINGS,
    bytes_to_rewrite,
    copy_image,
    copy_label,
    free_dataset_name,
    header_problem,
    new_dataset,
    refuse_problems,
    write_cases,
)
from planners import paths
from planners.dataset import Case, split_ending
from planners.errors import DatasetError, SettingsError
from planners.files import write_json


def convert_folder(
    images: str | Path,
    labels: str | Path,
    identifier: int,
    name: str,
    channels: Sequence[str],
    label_set: str | None = None,
    remap: Mapping[int, int] | None = None,
    unlabelled: str | Path | None = None,
) -> Path:
    """Convert NIfTI, NRRD or MHA files to a raw nnU-Net dataset.

    Args:
        images, labels: folders as `autoseg.convert.pairing` understands them; they may be the same.
        identifier, name: of the new dataset.
        channels: names in order, such as ["T1c", "Flair"]; files carry them, or `_0000`, as suffix.
        label_set: a known set of names and values; without one labels are named `label_N` and gaps closed.
        remap: value in the label files → value in the dataset (0 drops it); stored, and undone when predicting.
        unlabelled: more scans of the same kind, for pretraining.

    Returns the new folder. Raises DatasetError with every problem of the source; nothing is written then.
    """
    images, labels = Path(images), Path(labels)
    _check_options(images, labels, channels, unlabelled)
    full_name = free_dataset_name(identifier, name)
    cases, problems = find_cases(images, labels, channels)
    more: list[Case] = []
    if unlabelled is not None:
        more, more_problems = find_cases(Path(unlabelled), None, channels)
        problems += [f"{Path(unlabelled).name}/{problem}" for problem in more_problems]
    scans = [image for case in (*cases, *more) for image in case.images]
    label_files = {case.name: case.label for case in cases if case.label is not None}
    broken = [problem for path in (*scans, *label_files.values()) if (problem := header_problem(path, (2, 3)))]
    refuse_problems(problems + broken, images)

    largest_bytes = bytes_to_rewrite([*scans, *label_files.values()])
    found, problems = read_label_values(label_files, largest_bytes)
    refuse_problems(problems, labels)
    plan, problems = plan_labels(found, label_set, remap)
    refuse_problems(problems, labels)

    ending = _common_ending([*scans, *label_files.values()])
    with new_dataset(full_name) as folder:
        arguments = {f"imagesTr/{case.name}": (case, folder, "Tr", ending, plan.values) for case in cases}
        arguments |= {f"imagesUn/{case.name}": (case, folder, "Un", ending, plan.values) for case in more}
        write_cases(_write_case, arguments, largest_bytes)
        description: dict = {
            "name": name,
            "channel_names": {str(index): channel for index, channel in enumerate(channels)},
            "labels": plan.labels,
            "numTraining": len(cases),
            "file_ending": ending,
        }
        if plan.remap:
            description["autoseg"] = {"remap": plan.remap}
        write_json(folder / "dataset.json", description)
    return paths.raw(full_name)


def _check_options(images: Path, labels: Path, channels: Sequence[str], unlabelled: str | Path | None) -> None:
    if not channels or any(not channel.strip() for channel in channels):
        raise SettingsError(
            "Channels need names", found=list(channels), expected="--channels CT or --channels T1c,Flair"
        )
    if len({channel.casefold() for channel in channels}) < len(channels):
        raise SettingsError("Two channels have the same name", found=", ".join(channels))
    for folder in (images, labels, unlabelled):
        if folder is not None and not Path(folder).is_dir():
            raise DatasetError("No such folder", where=folder)


def _common_ending(files: Sequence[Path]) -> str:
    """The ending all files share if nnU-Net reads it, else `.nii.gz`."""
    endings = {split_ending(path)[1] for path in files}
    return endings.pop() if len(endings) == 1 and endings <= set(KEPT_ENDINGS) else KEPT_ENDINGS[0]


def _write_case(case: Case, folder: Path, part: str, ending: str, values: Mapping[int, int]) -> None:
    for channel, image in enumerate(case.images):
        copy_image(image, folder / f"images{part}" / f"{case.name}_{channel:04d}{ending}")
    if case.label is not None:
        copy_label(case.label, folder / f"labels{part}" / f"{case.name}{ending}", values)
