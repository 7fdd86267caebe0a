"""From folders as people keep them to cases: which file is which channel of whom, and which label belongs to it.

Understood are files side by side (`p1_0000.nii.gz` or `p1_Flair.nii.gz`; with one channel just `p1.nii.gz`) and one folder
per case with a file per channel. Labels are named as their cases, with or without a word such as `_seg`, `label` or `_gt`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from planners.dataset import IMAGE_ENDINGS, Case, split_ending

logger = logging.getLogger("autoseg")

_IMAGE_WORDS = "images|image|img|scan|volume|vol"
_LABEL_WORDS = "labels|label|segmentation|seg|mask|gt|manual"
_NUMBER = re.compile(r"(.+)_(\d{4})")


def find_cases(images: Path, labels: Path | None, channels: Sequence[str]) -> tuple[list[Case], list[str]]:
    """Cases below `images` with their labels, and one line for each thing that does not pair up.

    `labels` may be `images` itself; None lists scans without labels.
    """
    together = labels is not None and labels.resolve() == images.resolve()
    side_by_side = _volumes(images)
    if side_by_side:
        scans = [path for path in side_by_side if not (together and _is_label(path))]
        groups = _group_by_suffix(scans, channels)
        own_labels = [path for path in side_by_side if together and _is_label(path)]
    else:
        groups, own_labels = {}, []
        for folder in sorted(path for path in images.iterdir() if path.is_dir()) if images.is_dir() else []:
            channel_files, inner_labels = _files_of_case(folder, channels)
            if channel_files or inner_labels:
                groups[folder.name] = (folder.name, channel_files)
            own_labels += inner_labels
    if not groups:
        wanted = f"{', '.join(IMAGE_ENDINGS)} files for {', '.join(channels)}"
        return [], [f"no scan in {images} (looked for {wanted}, side by side or one folder per case)"]

    cases, problems = [], []
    label_files = _labels_by_key(own_labels, images) if together else _labels_by_key(_label_files(labels), labels)
    for key, (name, files) in sorted(groups.items()):
        for index, channel in enumerate(channels):
            if not files.get(index):
                problems.append(f"{name}: no file for channel {channel}")
            elif len(files[index]) > 1:
                problems.append(f"{name}: several files for channel {channel}: {_listed(files[index])}")
        label = label_files.pop(key, [])
        if labels is not None and not label:
            problems.append(f"{name}: no label (scans without label belong in a folder given with --unlabelled)")
        elif len(label) > 1:
            problems.append(f"{name}: several labels: {_listed(label)}")
        first = [files[index][0] for index in range(len(channels)) if files.get(index)]
        cases.append(Case(name, tuple(first), label[0] if label else None))
    problems += [f"{_listed(left)}: no scan for this label" for left in label_files.values()]
    return cases, problems


def _group_by_suffix(files: Sequence[Path], channels: Sequence[str]) -> dict[str, tuple[str, dict[int, list[Path]]]]:
    """Key → (case name, channel → files) for files side by side."""
    numbers = [int(match.group(2)) for path in files if (match := _NUMBER.fullmatch(split_ending(path)[0]))]
    # Four digits are channels only if all of them can be; patient_0000, patient_0001 of one channel are names.
    numbered = all(number < len(channels) for number in numbers)
    groups: dict[str, tuple[str, dict[int, list[Path]]]] = {}
    for path in files:
        stem = split_ending(path)[0]
        base, channel = _channel(stem, channels, numbered)
        if channel is None and len(channels) > 1:
            logger.info("Left out: %s names none of the channels", path.name)
            continue
        key = _key(base, _IMAGE_WORDS)
        name = re.sub(rf"[ _.-]+({_IMAGE_WORDS})$", "", base, flags=re.IGNORECASE)
        groups.setdefault(key, (name, {}))[1].setdefault(channel or 0, []).append(path)
    return groups


def _files_of_case(folder: Path, channels: Sequence[str]) -> tuple[dict[int, list[Path]], list[Path]]:
    """Channel → files in the folder of one case, and the files among the others that are called labels."""
    found: dict[int, list[Path]] = {}
    rest = []
    for path in _volumes(folder):
        channel = _channel(split_ending(path)[0], channels, numbered=True)[1]
        if channel is None:
            rest.append(path)
        else:
            found.setdefault(channel, []).append(path)
    labels = [path for path in rest if _is_label(path)]
    scans = [path for path in rest if path not in labels]
    if len(channels) == 1 and not found and scans:
        found[0] = scans
    return found, labels


def _channel(stem: str, channels: Sequence[str], numbered: bool) -> tuple[str, int | None]:
    """("p1", 1) from p1_0001 or p1_Flair; the channel is None when the name tells none."""
    match = _NUMBER.fullmatch(stem)
    if match and numbered and int(match.group(2)) < len(channels):
        return match.group(1), int(match.group(2))
    for index, channel in enumerate(channels):
        match = re.fullmatch(rf"(?:(.*?)[ _.-])?{re.escape(channel)}", stem, flags=re.IGNORECASE)
        if match:
            return match.group(1) or "", index
    return stem, None


def _label_files(labels: Path | None) -> list[Path]:
    """Label files of a folder of their own: side by side, or one in each case's folder."""
    if labels is None or not labels.is_dir():
        return []
    inside = [path for folder in sorted(labels.iterdir()) if folder.is_dir() for path in _volumes(folder)]
    return _volumes(labels) or inside


def _labels_by_key(files: Sequence[Path], root: Path | None) -> dict[str, list[Path]]:
    """What a label shares with its case: its folder's name when it has one, else its own."""
    found: dict[str, list[Path]] = {}
    for path in files:
        key = _key(split_ending(path)[0], _LABEL_WORDS) if path.parent == root else path.parent.name
        found.setdefault(key, []).append(path)
    return found


def _key(stem: str, words: str) -> str:
    """What image and label of a case have in common: the name without such a word before or behind it."""
    shorter = re.sub(rf"[ _.-]+({words})$", "", stem, flags=re.IGNORECASE)
    shorter = re.sub(rf"^({words})(?=[\d _.-])[ _.-]*", "", shorter, flags=re.IGNORECASE)
    return shorter or stem


def _is_label(path: Path) -> bool:
    stem = split_ending(path)[0]
    return _key(stem, _LABEL_WORDS) != stem or re.fullmatch(_LABEL_WORDS, stem, flags=re.IGNORECASE) is not None


def _volumes(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return [path for path in files if split_ending(path)[1]]


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(path.name for path in files)
