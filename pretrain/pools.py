"""Which scans a run learns from: training cases, `imagesUn`, folders, other datasets; preprocessed, and all lying alike."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from planners import paths
from planners.dataset import Case, Dataset, load_dataset, scans_in_folder, single_images
from planners.errors import DatasetError, SettingsError
from planners.files import content_hash
from planners.own_grid import preprocess_on_own_grid
from planners.plans import folds, resolved
from planners.preprocess import preprocess_dataset, preprocess_unlabelled
from pretrain.case_index import index_cases
from pretrain.orientation import AS_STORED, Alignment, alignment
from pretrain.volumes import CaseInfo, Pool

logger = logging.getLogger("autoseg")

_SAME_SPACING = 0.01  # relative


def build_pool(
    dataset: Dataset,
    plan: dict,
    configuration: str,
    *,
    images: Path | None = None,
    more_datasets: Sequence[int | str] = (),
    exclude_fold: int | None = None,
    own_grid: bool = False,
    workers: int | None = None,
) -> Pool:
    """All scans a run may use: training cases and `imagesUn` of the home dataset, `images`, other datasets.

    The home dataset is preprocessed by its plan. So is the rest, which then must have its channels, and all scans are brought
    to the orientation that most of the home dataset have. With `own_grid` the rest keeps its voxels (`planners.own_grid`),
    may have any channels, and lies with its thickest axis first.

    Args:
        images: a folder of scans; with `own_grid` each file is a scan, 2D images too.
        exclude_fold: leaves out the validation cases of that fold, so that training on it stays honest.

    Raises CasesFailed naming scans that cannot be preprocessed, DatasetError for other channels or no case at all.
    """
    preprocess_dataset(dataset.name, plan["plans_name"], [configuration], workers=workers)
    excluded = _validation_cases(dataset, exclude_fold)
    settings = resolved(plan, configuration)
    transpose = plan["transpose_forward"]
    home: list[CaseInfo] = []
    others: list[CaseInfo] = []
    files: dict[str, Path] = {}

    def index(source: str, folder: Path, names: Sequence[str], *, foreign: bool) -> None:
        spacing = [] if foreign and own_grid else settings["spacing"]
        for case in index_cases(source, folder, names, transpose, spacing, workers):
            (others if foreign else home).append(case)
            files[case.id] = folder / f"{case.id.removeprefix(source + '/')}.b2nd"

    def add(source: str, pool_name: str, cases: Sequence[Case], *, foreign: bool, same_channels: bool = True) -> None:
        if not cases:
            return
        if foreign and own_grid:
            folder = preprocess_on_own_grid(
                dataset.name, plan, configuration, pool_name, cases, home_intensities=same_channels, workers=workers
            )
        else:
            folder = preprocess_unlabelled(dataset.name, plan, configuration, pool_name, cases, workers=workers)
        index(source, folder, [case.name for case in cases], foreign=foreign)

    folder = paths.preprocessed(dataset.name) / settings["data_identifier"]
    index(dataset.name, folder, [case.name for case in dataset.cases if case.name not in excluded], foreign=False)
    add(f"{dataset.name}/imagesUn", "imagesUn", dataset.unlabelled, foreign=False)
    if images is not None:
        name = f"{Path(images).resolve().name}-{content_hash(str(Path(images).resolve()))[:8]}"
        if own_grid:
            # A file without a channel's name is taken for the home dataset's kind where there is but one.
            volumes, pictures = (_new_to(dataset, scans, images) for scans in single_images(images))
            add(name, name, volumes, foreign=True, same_channels=len(dataset.channel_names) == 1)
            add(f"{name}/2d", f"{name}-2d", pictures, foreign=True, same_channels=False)
        else:
            scans = scans_in_folder(images, len(dataset.channel_names), dataset.file_ending)
            add(name, name, _new_to(dataset, scans, images), foreign=True)
    for other in more_datasets:
        foreign = load_dataset(other)
        same = foreign.channel_names == dataset.channel_names
        if not own_grid and len(foreign.channel_names) != len(dataset.channel_names):
            raise DatasetError(
                f"{foreign.name} has other channels than {dataset.name}",
                found=", ".join(foreign.channel_names),
                expected=", ".join(dataset.channel_names),
                remedy="leave this dataset out, or take --method pumit, which sees one channel at a time",
            )
        add(foreign.name, foreign.name, [*foreign.cases, *foreign.unlabelled], foreign=True, same_channels=same)

    if not home and not others:
        raise DatasetError(f"{dataset.name} has no scan to learn from", remedy="add scans with --images FOLDER")
    cases = [*lying_alike(home), *map(thickest_first, others)] if own_grid else lying_alike([*home, *others])
    counts = Counter(case.source for case in cases)
    logger.info("Scans: %s", ", ".join(f"{count} from {source}" for source, count in counts.items()))
    return Pool(tuple(cases), files)


def lying_alike(cases: Sequence[CaseInfo]) -> list[CaseInfo]:
    """The cases with their axes in the places and directions that most cases of the first one's source have.

    Axes that would change places must have equal spacing, or the grid would be another; such cases stay as they are, and
    are named in a warning. So are those that do not say how they lie, where others do.
    """
    if not cases:
        return []
    known = Counter(case.orientation for case in cases if case.orientation and case.source == cases[0].source)
    known = known or Counter(case.orientation for case in cases if case.orientation)
    if not known:
        return list(cases)
    wanted = known.most_common(1)[0][0]
    found, mute, stuck = [], [], []
    for case in cases:
        if not case.orientation:
            mute.append(case.id)
            found.append(case)
            continue
        turned = aligned(case, alignment(case.orientation, wanted))
        if any(abs(a - b) > _SAME_SPACING * b for a, b in zip(turned.spacing, case.spacing, strict=True)):
            stuck.append(case.id)
            turned = case
        found.append(turned)
    moved = sum(case.alignment != AS_STORED for case in found)
    if moved:
        logger.info(
            "%d of %d scans lie another way than most: they are read mirrored or turned to %s",
            moved,
            len(found),
            wanted,
        )
    for these, what in ((mute, "do not say how they lie"), (stuck, "have their slices along another axis")):
        if these:
            logger.warning(
                "%d of %d scans %s, so they are read as stored (%s …); tasks about direction learn less from them",
                len(these), len(found), what, ", ".join(these[:3]),
            )  # fmt: skip
    return found


def thickest_first(case: CaseInfo) -> CaseInfo:
    """The case with the axis of its largest spacing first, where plans have it; the others keep their order."""
    spacing = case.spacing
    first = max(range(len(spacing)), key=lambda axis: spacing[axis])
    if spacing[first] <= (1 + _SAME_SPACING) * spacing[0]:
        return case
    return aligned(case, Alignment((first, *(axis for axis in range(len(spacing)) if axis != first))))


def aligned(case: CaseInfo, how: Alignment) -> CaseInfo:
    """What is known of a case when its stored axes are rearranged."""
    box = [case.foreground_box[axis] for axis in how.order]
    shape = tuple(case.shape[axis] for axis in how.order)
    return replace(
        case,
        shape=shape,
        spacing=tuple(case.spacing[axis] for axis in how.order),
        original_spacing=tuple(case.original_spacing[axis] for axis in how.order),
        foreground_box=tuple(
            (n - last, n - first) if mirrored else (first, last)
            for n, (first, last), mirrored in zip(shape, box, how.mirrored, strict=True)
        ),
        alignment=how,
    )


def _new_to(dataset: Dataset, scans: Sequence[Case], folder: Path) -> list[Case]:
    """The scans that the dataset has not: the same scan again would count twice, or bring an excluded case back."""
    known = {path.resolve() for case in (*dataset.cases, *dataset.unlabelled) for path in case.images}
    new = [scan for scan in scans if not known.intersection(path.resolve() for path in scan.images)]
    if len(new) < len(scans):
        logger.info("%d of the scans in %s belong to the dataset already", len(scans) - len(new), folder)
    return new


def _validation_cases(dataset: Dataset, fold: int | None) -> set[str]:
    if fold is None:
        return set()
    splits = folds(dataset.name)
    if not 0 <= fold < len(splits):
        raise SettingsError("No such fold", found=fold, expected=f"0 to {len(splits) - 1}")
    return set(splits[fold]["val"])
