"""Every problem of a raw dataset at once, each with file, found, expected and remedy.

Each file is read once. Geometry that differs is judged by how far it would move a voxel: nothing to speak of (harmless
rounding), a header that contradicts its partner's on the same number of voxels (fixable), or another grid (wrong).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from planners.cases import Outcome, WorkerLost, run_cases
from planners.dataset import Case, Dataset, load_dataset
from planners.geometry import EQUAL_VOXELS, GEOMETRY_ENDINGS, ROUNDING_VOXELS, Geometry, read_geometry, read_voxels

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, or worth knowing (warning), with what to do about it."""

    kind: str
    severity: Severity
    case: str
    file: str
    found: str
    expected: str
    remedy: str


@dataclass
class _CaseReport:
    """What reading one case gave: its problems, the values of its label, a hash of its voxels."""

    problems: list[Problem] = field(default_factory=list)
    values: tuple[float, ...] = ()
    voxels_hash: str | None = None


def verify_dataset(dataset: int | str, *, workers: int | None = None) -> list[Problem]:
    """All problems of a raw dataset, errors first, then by case.

    A dataset.json that cannot be used raises DatasetError; everything else is in the list.
    """
    loaded = load_dataset(dataset)
    problems = _listing_problems(loaded)
    for cases, prefix in ((loaded.cases, ""), (loaded.unlabelled, "imagesUn/")):
        problems += _missing_files(loaded, cases, prefix)
    readable = {
        prefix + case.name: (loaded.folder, prefix + case.name, case.images, case.label, _declared(loaded))
        for cases, prefix in ((loaded.cases, ""), (loaded.unlabelled, "imagesUn/"))
        for case in cases
        if any(path.is_file() for path in case.images)
    }
    outcomes = run_cases(
        _check_case,
        readable,
        description=f"Verifying {loaded.name}",
        bytes_per_case=_bytes_of_largest((*loaded.cases, *loaded.unlabelled)),
        workers=workers,
    )
    for name, outcome in outcomes.items():
        problems += outcome.value.problems if outcome.error is None else [_not_checked(name, outcome)]
    reports = {name: outcome.value for name, outcome in outcomes.items() if outcome.error is None}
    problems += _duplicates(reports) + _unused_labels(loaded, reports)
    return sorted(problems, key=lambda p: (p.severity, p.case, p.kind, p.file))


def _listing_problems(dataset: Dataset) -> list[Problem]:
    """What the names of files alone tell: orphan labels, stray and surplus files, the count in dataset.json."""
    problems = []
    promised = dataset.json.get("numTraining")
    if isinstance(promised, int) and promised != len(dataset.cases):
        problems.append(
            Problem(
                "number of cases",
                "warning",
                "",
                "dataset.json",
                f"numTraining {promised}",
                f"{len(dataset.cases)}, the cases in imagesTr",
                "correct numTraining, or add the missing cases",
            )
        )
    if "dataset" in dataset.json:  # files are listed one by one, others beside them are nobody's business
        return problems
    ending = dataset.file_ending
    names = {case.name for case in dataset.cases}
    for path in _visible(dataset.folder / "labelsTr"):
        if path.name.endswith(ending) and path.name.removesuffix(ending) not in names:
            name = path.name.removesuffix(ending)
            problems.append(
                Problem(
                    "missing image",
                    "error",
                    name,
                    f"labelsTr/{path.name}",
                    "a label without an image",
                    f"imagesTr/{name}_0000{ending}",
                    "add the image, or remove the label",
                )
            )
    for part, known in (("imagesTr", dataset.cases), ("imagesUn", dataset.unlabelled)):
        expected = {image.name for case in known for image in case.images}
        for path in _visible(dataset.folder / part):
            if path.name not in expected:
                problems.append(_unexpected_file(dataset, part, path))
    return problems


def _unexpected_file(dataset: Dataset, part: str, path: Path) -> Problem:
    channels, ending = len(dataset.channel_names), dataset.file_ending
    file, example = f"{part}/{path.name}", f"CASE_0000{ending}"
    if not path.name.endswith(ending):
        remedy = f"nothing, if it is not a scan; else write it as {example}"
        return Problem("ignored file", "warning", "", file, path.name, f"names like {example}", remedy)
    stem = path.name.removesuffix(ending)
    match = re.fullmatch(r"(.+)_(\d{4})", stem)
    if match is None:
        remedy = f"rename it to {stem}_0000{ending}"
        return Problem("file name", "error", stem, file, "no channel number", f"names like {example}", remedy)
    expected = f"{channels} channel(s): {', '.join(dataset.channel_names)}"
    remedy = "remove the file, or add its channel to channel_names in dataset.json"
    return Problem("surplus channel", "error", match.group(1), file, f"channel {match.group(2)}", expected, remedy)


def _missing_files(dataset: Dataset, cases: Sequence[Case], prefix: str) -> list[Problem]:
    problems = []
    for case in cases:
        wanted: list[tuple[str, Path]] = [("missing channel", image) for image in case.images]
        if case.label is not None:
            wanted.append(("missing label", case.label))
        for kind, path in wanted:
            if not path.is_file():
                remedy = "add the file, or leave the case out" + (
                    " (scans without label belong in imagesUn)" if kind == "missing label" else ""
                )
                file = _shown(path, dataset.folder)
                problems.append(Problem(kind, "error", prefix + case.name, file, "no such file", file, remedy))
    return problems


def _check_case(
    folder: Path, name: str, images: Sequence[Path], label: Path | None, declared: frozenset[int]
) -> _CaseReport:
    """Read one case and judge it; arrays are (z, y, x) or (channel, z, y, x)."""
    report = _CaseReport()
    digest = hashlib.blake2b(digest_size=16)
    first: tuple[str, Geometry] | None = None
    paths_ = [(path, False) for path in images] + ([(label, True)] if label is not None else [])
    for path, is_label in paths_:
        if not path.is_file():
            continue  # reported from the listing
        file = _shown(path, folder)
        try:
            voxels, geometry = read_voxels(path)
        except Exception as error:  # readers raise whatever they like for a broken file
            report.problems.append(_unreadable(name, file, _reason(error)))
            continue
        if first is None:
            first = (file, geometry)
            if path.name.endswith(GEOMETRY_ENDINGS) and min(geometry.size) == 1:
                text = " x ".join(map(str, geometry.size))
                remedy = "nothing, if this is meant; 2D images train the 2d configuration"
                report.problems.append(Problem("single slice", "warning", name, file, text, "a volume", remedy))
        else:
            report.problems += _compare_geometry(name, file, geometry, *first, is_label=is_label)
        if is_label:
            report.values = tuple(float(value) for value in np.unique(voxels))
            report.problems += _label_problems(name, file, report.values, declared)
        else:
            report.problems += _image_problems(name, file, voxels)
            digest.update(str(voxels.shape).encode())
            digest.update(np.ascontiguousarray(voxels, dtype=np.float32).data)
            report.voxels_hash = digest.hexdigest()
    return report


def _compare_geometry(
    name: str, file: str, geometry: Geometry, first_file: str, first: Geometry, *, is_label: bool
) -> list[Problem]:
    if geometry.size != first.size:
        found, expected = (" x ".join(map(str, g.size)) for g in (geometry, first))
        remedy = "resample it onto the image's grid" + (" (nearest neighbour)" if is_label else "")
        what = f"{expected} voxels, as {first_file}"
        return [
            Problem("wrong geometry", "error", name, file, f"{found} voxels", what, f"{remedy}, or replace the file")
        ]
    moved = geometry.shift_voxels(first)
    # nnU-Net refuses channels whose spacings differ by more than numpy's tolerance, however little that moves a voxel.
    refused = not is_label and not np.allclose(geometry.spacing, first.spacing)
    if moved <= EQUAL_VOXELS and not refused:
        return []
    found, expected = f"{geometry}", f"{first}, as {first_file}"
    if moved <= ROUNDING_VOXELS and not refused:
        remedy = f"nothing: the headers differ by {moved:.2g} voxel"
        return [Problem("harmless rounding", "warning", name, file, found, expected, remedy)]
    remedy = (
        f"if the two overlap when laid voxel on voxel, copy the header of {Path(first_file).name} onto {Path(file).name} "
        f"(SimpleITK: image.CopyInformation); else resample. The headers place a corner {moved:.3g} voxels apart"
    )
    return [Problem("fixable geometry", "error", name, file, found, expected, remedy)]


def _image_problems(name: str, file: str, voxels: np.ndarray) -> list[Problem]:
    bad = 0 if np.issubdtype(voxels.dtype, np.integer) else int(voxels.size - np.count_nonzero(np.isfinite(voxels)))
    if bad:
        remedy = "replace these voxels by the value of air or background and write the file again"
        return [Problem("NaN or Inf", "error", name, file, f"{bad} of {voxels.size} voxels", "finite values", remedy)]
    low, high = voxels.min(), voxels.max()
    if low == high:
        remedy = "export the scan again, or leave the case out"
        return [Problem("empty image", "error", name, file, f"{low:g} everywhere", "varying intensities", remedy)]
    return []


def _label_problems(name: str, file: str, values: tuple[float, ...], declared: frozenset[int]) -> list[Problem]:
    broken = [value for value in values if not float(value).is_integer()]
    if broken:
        shown = ", ".join(f"{value:g}" for value in broken[:5]) + (", …" if len(broken) > 5 else "")
        remedy = "labels were interpolated or are probabilities: export them again with nearest neighbour"
        return [Problem("labels not integer", "error", name, file, shown, "whole numbers", remedy)]
    unknown = sorted(int(value) for value in values if int(value) not in declared)
    if unknown:
        remedy = f"declare {_listed(unknown)} in dataset.json, or convert with --remap {unknown[0]}:0"
        expected = f"declared: {_listed(sorted(declared))}"
        return [Problem("undeclared labels", "error", name, file, _listed(unknown), expected, remedy)]
    if len(values) == 1:
        remedy = "nothing, if the case has none of the structures"
        return [Problem("no structure", "warning", name, file, f"{values[0]:g} everywhere", "labelled voxels", remedy)]
    return []


def _duplicates(reports: dict[str, _CaseReport]) -> list[Problem]:
    first_with: dict[str, str] = {}
    problems = []
    for name, report in reports.items():
        if report.voxels_hash is None:
            continue
        twin = first_with.setdefault(report.voxels_hash, name)
        if twin != name:
            remedy = "remove one: the same scan in training and validation makes results look better than they are"
            problems.append(
                Problem("duplicate", "warning", name, name, f"the same voxels as {twin}", "scans of their own", remedy)
            )
    return problems


def _unused_labels(dataset: Dataset, reports: dict[str, _CaseReport]) -> list[Problem]:
    """Declared structures that no readable case holds: nothing can learn them."""
    seen = {int(value) for report in reports.values() for value in report.values if float(value).is_integer()}
    if not seen:
        return []
    unused = [
        f"{name} ({_listed(values)})"
        for name, value in dataset.labels.items()
        for values in [value if isinstance(value, tuple) else (value,)]
        if name not in ("background", "ignore") and seen.isdisjoint(values)
    ]
    if not unused:
        return []
    found = f"{len(unused)} without a voxel in any case: {', '.join(unused[:10])}" + (", …" if len(unused) > 10 else "")
    remedy = "check the values in the label files, or remove the labels"
    return [Problem("unused label", "warning", "", "dataset.json", found, "at least one case each", remedy)]


def _not_checked(name: str, outcome: Outcome) -> Problem:
    remedy = (
        "free memory or use fewer --workers; if it is much larger than the others, check the file"
        if isinstance(outcome.error, WorkerLost)
        else "replace the file"
    )
    return Problem("unreadable", "error", name, name, _reason(outcome.error), "a readable case", remedy)


def _unreadable(name: str, file: str, reason: str) -> Problem:
    remedy = "copy or download the file again; open it in ITK-SNAP or 3D Slicer to check"
    return Problem("unreadable", "error", name, file, reason, "an image", remedy)


def _reason(error: BaseException | None) -> str:
    """The last line that says something: SimpleITK puts its own source lines first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _declared(dataset: Dataset) -> frozenset[int]:
    return frozenset(v for value in dataset.labels.values() for v in (value if isinstance(value, tuple) else (value,)))


def _bytes_of_largest(cases: Sequence[Case]) -> int:
    """Peak memory of checking the largest case, from headers: voxels as read, as float32 and sorted for their values."""
    largest = 0
    for case in cases:
        try:
            size = read_geometry(case.images[0]).size
        except RuntimeError:  # missing, broken or not SimpleITK's: found when it is read
            continue
        largest = max(largest, int(np.prod(size, dtype=np.int64)))
    return largest * 24


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _shown(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)
