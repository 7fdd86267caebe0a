"""Files that are whole or absent, hashes of inputs, and a reader for nnU-Net's local pickles that runs no code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planners.errors import DatasetError, UnsafeFile


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it onto `path` when the block ends well, remove it otherwise.

    The temporary name keeps the suffixes, because writers of images choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.partial.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN and numpy types are refused rather than written wrongly."""
    text = json.dumps(content, indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON; a broken file is named."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(
            "Not readable as JSON", where=path, found=error, remedy="repair or remove the file"
        ) from error


def copy_file(source: str | Path, target: str | Path) -> None:
    """Copy with times and permissions, whole or not at all."""
    with replacing(target) as temporary:
        shutil.copy2(source, temporary)


def content_hash(content: Any) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_stamp(path: str | Path) -> list:
    """Name, size and modification time of a file: what decides whether an input has changed."""
    status = Path(path).stat()
    return [Path(path).name, status.st_size, status.st_mtime_ns]


# What the .pkl beside a preprocessed case may contain: nnU-Net writes dicts of numbers, tuples and numpy arrays.
_PICKLE_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise UnsafeFile(
                "A preprocessed case asks for code that case properties never need",
                found=f"{module}.{name}",
                remedy="do not use this file; remove it and run `autoseg plan_and_preprocess` again",
            )
        return super().find_class(module, name)


def read_case_properties(path: str | Path) -> dict:
    """The properties nnU-Net stores beside a preprocessed case, read without running code.

    Raises UnsafeFile for anything but plain values and numpy arrays.
    """
    try:
        return _DataUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except UnsafeFile as error:
        raise UnsafeFile(error.what, where=path, remedy="remove it and preprocess again") from error
