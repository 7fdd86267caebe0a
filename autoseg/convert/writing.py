"""Writing a raw nnU-Net dataset whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK

from planners import paths
from planners.cases import run_cases
from planners.dataset import split_ending
from planners.errors import DatasetError
from planners.files import copy_file
from planners.geometry import read_geometry

# Endings that nnU-Net's SimpleITK reader lists; anything else is rewritten as the first of them.
KEPT_ENDINGS = (".nii.gz", ".nrrd", ".mha")


def free_dataset_name(identifier: int, name: str) -> str:
    """`Dataset017_BTCV`, after making sure that no dataset has this id yet."""
    full_name = paths.new_dataset_name(identifier, name)
    taken = [known for known in paths.existing_datasets() if paths.dataset_id(known) == identifier]
    if taken:
        raise DatasetError(
            f"Dataset id {identifier} is taken",
            found=", ".join(taken),
            remedy="choose another id with -d, or remove that dataset's folders first",
        )
    return full_name


@contextmanager
def new_dataset(full_name: str) -> Iterator[Path]:
    """Give a temporary folder for a raw dataset; rename it when the block ends well, remove it otherwise."""
    target = paths.raw(full_name)
    temporary = target.with_name(f".{full_name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a conversion that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_problems(problems: Sequence[str], source: Path) -> None:
    """Raise DatasetError with all problems of a source, if there are any; nothing has been written then."""
    if problems:
        raise DatasetError(
            f"{len(problems)} problem(s); nothing was converted",
            where=source,
            found="\n            ".join(problems),
            remedy="mend or leave out these files and convert again",
        )


def write_cases(function: Callable[..., None], arguments: Mapping[str, tuple], largest_bytes: int) -> None:
    """Call `function(*arguments)` for every case; DatasetError with every case that failed."""
    outcomes = run_cases(function, arguments, description="Writing cases", bytes_per_case=largest_bytes)
    failed = [f"{outcome.name}: {outcome.error}" for outcome in outcomes.values() if outcome.error is not None]
    if failed:
        raise DatasetError(
            f"{len(failed)} of {len(outcomes)} cases could not be written; nothing was kept",
            found="\n            ".join(failed),
            remedy="look at these files and at the free space of the disk",
        )


def copy_image(source: Path, target: Path) -> None:
    """Copy a volume; rewrite it when the target has another format."""
    if split_ending(source)[1] == split_ending(target)[1]:
        copy_file(source, target)
    else:
        write_image(SimpleITK.ReadImage(str(source)), target)


def copy_label(source: Path, target: Path, values: Mapping[int, int]) -> None:
    """Copy a label map with `values` (stored → new) replaced; unchanged values leave the file as it is."""
    if all(old == new for old, new in values.items()):
        copy_image(source, target)
        return
    image = SimpleITK.ReadImage(str(source))
    stored = SimpleITK.GetArrayFromImage(image)
    found, where = np.unique(stored, return_inverse=True)
    new = np.array(
        [values.get(int(value), 0) for value in found], dtype=np.uint8 if max(values.values()) < 256 else np.uint16
    )
    written = SimpleITK.GetImageFromArray(new[where].reshape(stored.shape))
    written.CopyInformation(image)
    write_image(written, target)


def write_image(image: SimpleITK.Image, target: Path) -> None:
    """Write compressed; the folder is made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(target), True)


def header_problem(path: Path, dimensions: Sequence[int], channels: int = 1) -> str | None:
    """What keeps a file from being a scan with one of these numbers of dimensions, or None.

    `channels` is the size of the fourth axis, where there is one.
    """
    header = SimpleITK.ImageFileReader()
    header.SetFileName(str(path))
    try:
        header.ReadImageInformation()
    except RuntimeError as error:
        return f"{path.name}: unreadable ({str(error).strip().splitlines()[-1].strip()})"
    size = header.GetSize()
    if len(size) not in dimensions or header.GetNumberOfComponents() > 1:
        colours = f" of {header.GetNumberOfComponents()} values each" if header.GetNumberOfComponents() > 1 else ""
        shape = " x ".join(map(str, size))
        return f"{path.name}: {len(size)} dimensions ({shape}){colours}, expected {' or '.join(map(str, dimensions))}"
    if len(size) == 4 and size[3] != channels:
        return f"{path.name}: {size[3]} channels, expected {channels}"
    return None


def bytes_to_rewrite(files: Sequence[Path]) -> int:
    """Memory for rewriting the largest file: voxels as read and as written, in double precision at worst."""
    return max((int(np.prod(read_geometry(path).size, dtype=np.int64)) for path in files), default=0) * 16
