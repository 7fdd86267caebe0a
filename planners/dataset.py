"""Datasets in nnU-Net's raw layout, and folders of scans: which files make a case. Reads names and JSON, never voxels.

Listing is done here, because nnU-Net's own helper (MIC-DKFZ/nnUNet:nnunetv2/utilities/utils.py) starts twelve processes
to match file names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from planners import paths
from planners.errors import DatasetError
from planners.files import read_json

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
"""Volumes that can be read; `.mhd` keeps its voxels in a second file and is only an input."""
PICTURE_ENDINGS = (".png", ".bmp", ".jpg", ".jpeg")
"""2D images that can be learned from beside volumes, where a method takes them."""

_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """One subject: an image file per channel, in channel order, and its label file. Files may be missing on disk."""

    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A raw dataset: its dataset.json, its training cases and the unlabelled scans of `imagesUn`."""

    name: str
    folder: Path
    json: dict
    cases: tuple[Case, ...]
    unlabelled: tuple[Case, ...]

    @property
    def id(self) -> int:
        """17 for Dataset017_BTCV."""
        return paths.dataset_id(self.name)

    @cached_property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels in order; nnU-Net v1's key `modality` is accepted."""
        return channel_names(self.json)

    @cached_property
    def labels(self) -> dict[str, int | tuple[int, ...]]:
        """Label name → value, or → the values a region is made of. Includes background (and `ignore`)."""
        return label_values(self.json)

    @property
    def file_ending(self) -> str:
        """The ending of every image and label file, with the dot."""
        return self.json["file_ending"]

    @property
    def region_based(self) -> bool:
        """Whether labels are regions (sets of values, possibly nested) instead of exclusive values."""
        return any(isinstance(value, tuple) for value in self.labels.values())


def load_dataset(dataset: int | str) -> Dataset:
    """Read dataset.json and list the cases of a raw dataset, named by id or folder name.

    A case is listed as soon as one of its images exists; `planners.verify` finds what is missing.
    Raises DatasetError when dataset.json is missing or broken, or when there is no case at all.
    """
    name = paths.resolve_dataset(dataset)
    folder = paths.raw(name)
    json_path = folder / "dataset.json"
    if not json_path.is_file():
        raise DatasetError(
            f"{name} has no dataset.json",
            where=folder,
            remedy="make the dataset with `autoseg convert folder`, which writes it",
        )
    content = read_json(json_path)
    _check_json(content, json_path)
    channels = len(channel_names(content))
    if "dataset" in content:
        cases = _listed_cases(content["dataset"], folder, json_path)
    else:
        cases = _cases_in_layout(folder / "imagesTr", channels, content["file_ending"], folder / "labelsTr")
    if not cases:
        raise DatasetError(
            f"{name} has no training case",
            where=folder / "imagesTr",
            found=", ".join(sorted(p.name for p in _files(folder / "imagesTr"))[:5]) or "no file",
            expected=f"files named CASE_0000{content['file_ending']}, one for each of {channels} channel(s)",
            remedy="rename the files, correct file_ending in dataset.json, or use `autoseg convert folder`",
        )
    unlabelled = _cases_in_layout(folder / "imagesUn", channels, content["file_ending"], None)
    return Dataset(name, folder, content, cases, unlabelled)


def scans_in_folder(folder: str | Path, channels: int, file_ending: str | None = None) -> tuple[Case, ...]:
    """The scans of a folder without labels, or the scan of a single file.

    Names are CASE_0000.nii.gz, CASE_0001.nii.gz, … (one a channel) or, for one channel, plain CASE.nii.gz.

    Args:
        channels: how many each case must have.
        file_ending: of the dataset the scans are for, when it is not one of `IMAGE_ENDINGS` (such as `.png`).

    Raises DatasetError when there is nothing, or listing every case whose channels are incomplete.
    """
    folder = Path(folder)
    endings = IMAGE_ENDINGS if file_ending is None or file_ending in IMAGE_ENDINGS else (*IMAGE_ENDINGS, file_ending)
    if not folder.exists():
        raise DatasetError("No such file or folder", where=folder)
    if folder.is_file():
        stem, ending = split_ending(folder, endings)
        match = _CHANNEL.fullmatch(stem)
        candidates: Iterable[Path] = [folder]
        if channels > 1 and match:
            candidates = (folder.with_name(f"{match.group(1)}_{c:04d}{ending}") for c in range(channels))
        files = [path for path in candidates if path.is_file()] if ending else []
    else:
        files = [path for path in _files(folder) if split_ending(path, endings)[1]]
    if not files:
        raise DatasetError("No scan found", where=folder, expected=f"files ending in {', '.join(endings)}")

    if not any(split_ending(path)[1] for path in files):
        channels = _files_per_case(folder if folder.is_dir() else folder.parent, channels, endings[-1])
    cases, problems = _group(files, channels, endings)
    if problems:
        raise DatasetError(
            f"{len(problems)} of {len(cases) + len(problems)} scans are incomplete or ambiguous",
            where=folder,
            found="\n            ".join(problems),
            expected=f"{channels} channel(s) a case: "
            + ", ".join(f"CASE_{c:04d}{endings[0]}" for c in range(channels)),
            remedy="add the missing files, or rename those that are not channels of the same case",
        )
    return tuple(cases)


def single_images(folder: str | Path) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """(volumes, 2D images) of a folder, each file a scan of its own, named by its stem. Raises DatasetError for none."""
    folder = Path(folder)
    if not folder.exists():
        raise DatasetError("No such file or folder", where=folder)
    files = [folder] if folder.is_file() else _files(folder)
    kinds = []
    for endings in (IMAGE_ENDINGS, PICTURE_ENDINGS):
        named: dict[str, list[Path]] = {}
        for path in files:
            stem, ending = split_ending(path, endings)
            if ending:
                named.setdefault(stem, []).append(path)
        twice = [" and ".join(path.name for path in paths_) for paths_ in named.values() if len(paths_) > 1]
        if twice:
            raise DatasetError(
                "Files that differ only in their ending", where=folder, found=twice[0], remedy="rename one of them"
            )
        kinds.append(tuple(Case(stem, (paths_[0],)) for stem, paths_ in named.items()))
    if not any(kinds):
        raise DatasetError(
            "No scan found", where=folder, expected=f"files ending in {', '.join((*IMAGE_ENDINGS, *PICTURE_ENDINGS))}"
        )
    return kinds[0], kinds[1]


def split_ending(path: str | Path, endings: Iterable[str] = IMAGE_ENDINGS) -> tuple[str, str]:
    """("case_0000", ".nii.gz") from a path; the ending is "" when it is none of `endings`."""
    name = Path(path).name
    ending = max((e for e in endings if name.endswith(e) and name != e), key=len, default="")
    return name.removesuffix(ending), ending


def channel_names(dataset_json: Mapping) -> tuple[str, ...]:
    """Channel names in order, from `channel_names` or nnU-Net v1's `modality`."""
    names = dataset_json.get("channel_names", dataset_json.get("modality"))
    return tuple(str(names[key]) for key in sorted(names, key=int))


def label_values(dataset_json: Mapping) -> dict[str, int | tuple[int, ...]]:
    """Label name → value, or → values of a region; in the order of dataset.json."""
    return {
        name: tuple(int(v) for v in value) if isinstance(value, list | tuple) else int(value)
        for name, value in dataset_json["labels"].items()
    }


def original_labels(dataset_json: Mapping) -> dict[int, int] | None:
    """Value in this dataset → value in the files it was converted from, or None when they are the same.

    Also None when the conversion merged several values into one, which nothing can undo. Background stays 0.
    """
    remap = {int(old): new for old, new in dataset_json.get("autoseg", {}).get("remap", {}).items() if new != 0}
    back = {new: old for old, new in remap.items()}
    if len(back) < len(remap) or all(new == old for new, old in back.items()):
        return None
    return {0: 0, **back}


def _files(folder: Path) -> list[Path]:
    """Files of a folder by name; hidden ones (unfinished writes, macOS's `._` files) are not data."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _cases_in_layout(images: Path, channels: int, ending: str, labels: Path | None) -> tuple[Case, ...]:
    """Cases of nnU-Net's layout by name; their images are the expected ones, whether or not each exists."""
    stems = (split_ending(path, [ending])[0] for path in _files(images) if path.name.endswith(ending))
    names = sorted({match.group(1) for stem in stems if (match := _CHANNEL.fullmatch(stem))})
    channels = _files_per_case(images, channels, ending)
    return tuple(
        Case(
            name,
            tuple(images / f"{name}_{channel:04d}{ending}" for channel in range(channels)),
            labels / f"{name}{ending}" if labels else None,
        )
        for name in names
    )


def _files_per_case(folder: Path, channels: int, ending: str) -> int:
    """As many as channels, but one for natural images that hold their colours in one file, as nnU-Net reads them."""
    colours_inside = ending not in IMAGE_ENDINGS and not any(folder.glob(f"*_0001{ending}"))
    return 1 if colours_inside else channels


def _listed_cases(entries: Any, folder: Path, json_path: Path) -> tuple[Case, ...]:
    """Cases that dataset.json lists one by one under nnU-Net's key `dataset`; paths are relative to the dataset."""
    try:
        return tuple(
            Case(
                name,
                tuple(folder / os.path.expandvars(image) for image in entry["images"]),
                folder / os.path.expandvars(entry["label"]),
            )
            for name, entry in sorted(entries.items())
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise DatasetError(
            'The key "dataset" is not as nnU-Net writes it',
            where=json_path,
            found=repr(error),
            expected='{"CASE": {"images": ["path", …], "label": "path"}, …}',
        ) from error


def _group(files: list[Path], channels: int, endings: Iterable[str]) -> tuple[list[Case], list[str]]:
    """Files → cases by channel suffix, and one line for each group that is not a complete case."""
    plain: list[tuple[str, Path]] = []
    numbered: dict[str, dict[int, list[Path]]] = {}
    for path in files:
        stem, _ = split_ending(path, endings)
        match = _CHANNEL.fullmatch(stem)
        if match is None:
            plain.append((stem, path))
        else:
            numbered.setdefault(match.group(1), {}).setdefault(int(match.group(2)), []).append(path)

    found: dict[str, list[Path]] = {}
    problems = []
    for name, by_channel in numbered.items():
        if channels == 1 and 0 not in by_channel:
            # A number that belongs to the name (img_2035), not a channel.
            plain.extend((split_ending(path, endings)[0], path) for paths_ in by_channel.values() for path in paths_)
        elif sorted(by_channel) != list(range(channels)) or any(len(paths_) > 1 for paths_ in by_channel.values()):
            there = sorted(path.name for paths_ in by_channel.values() for path in paths_)
            problems.append(f"{name}: {', '.join(there)}")
        else:
            found[name] = [by_channel[channel][0] for channel in range(channels)]
    for stem, path in plain:
        if channels > 1 or stem in found:
            problems.append(f"{stem}: {path.name}")
        else:
            found[stem] = [path]
    return [Case(name, tuple(found[name])) for name in sorted(found)], sorted(problems)


def _check_json(content: Any, path: Path) -> None:
    """Refuse a dataset.json that lacks what every step needs, naming all of it at once."""
    if not isinstance(content, dict):
        raise DatasetError("dataset.json is not an object", where=path, found=type(content).__name__)
    problems = []
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, dict) or not names or not all(str(key).isdigit() for key in names):
        problems.append(f'"channel_names" must be like {{"0": "CT"}}, found {names!r}')
    elif sorted(map(int, names)) != list(range(len(names))):
        problems.append(f'"channel_names" must be numbered from 0 without gaps, found {sorted(names)}')
    problems += _label_problems(content.get("labels"), content.get("regions_class_order"))
    if not isinstance(content.get("file_ending"), str) or not content["file_ending"].startswith("."):
        problems.append(f'"file_ending" must be like ".nii.gz", found {content.get("file_ending")!r}')
    if problems:
        raise DatasetError(
            "dataset.json is incomplete",
            where=path,
            found="; ".join(problems),
            remedy="correct these keys; a dataset in the Decathlon's layout needs `autoseg convert msd` first",
        )


def _label_problems(labels: Any, regions_order: Any) -> list[str]:
    example = '"labels" must be like {"background": 0, "liver": 1}'
    if not isinstance(labels, dict) or not labels:
        return [f"{example}, found {labels!r}"]
    values = [v for value in labels.values() for v in (value if isinstance(value, list) else [value])]
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        return [f"{example}, or a list of values for a region; found {labels!r}"]
    problems = []
    if labels.get("background") != 0:
        problems.append('"labels" must give background the value 0')
    foreground = [name for name in labels if name not in ("background", "ignore")]
    if not foreground:
        problems.append('"labels" has nothing but background')
    single = {value for value in labels.values() if isinstance(value, int)}
    regions = any(isinstance(value, list) for value in labels.values())
    if not regions:
        if len(single) < len(labels):
            problems.append('"labels" gives two names the same value')
        if single != set(range(len(single))):
            problems.append(f'"labels" must be numbered 0, 1, 2, … without gaps, found {sorted(single)}')
    elif not isinstance(regions_order, list) or len(regions_order) != len(foreground):
        problems.append(f'"regions_class_order" must name one value for each of the {len(foreground)} regions')
    return problems
