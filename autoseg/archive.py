"""One zip that carries a model or an encoder: written the same way every time, and read without trusting it.

`manifest.json` lists every other file with its size and SHA-256. Which names a file may have is a literal table, so that a
name can neither leave the folder nor meet another one on a file system that ignores case. Entries are stored, not
compressed: weights hardly shrink, and the bytes then do not depend on the version of a compressor.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import zipfile
import zlib
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from planners.errors import DatasetError, UnsafeFile
from planners.files import replacing, write_json

MANIFEST = "manifest.json"
CARD = "README.md"
SCHEMA = 1
"""Of the manifest and of what it lists. A higher one is refused: it may mean something this version does not know."""

_NAMES = re.compile(
    r"README\.md|plans\.json|dataset\.json|transfer\.json|encoder\.json|encoder\.safetensors"
    r"|fold_(?:0|[1-9]\d?|all)/(?:fold\.json|weights\.safetensors)"
)
_LARGEST_JSON = 32 * 2**20
_LARGEST_RATIO = 20
"""Of what is unpacked to the archive itself. Ours are not compressed; a folder zipped again by hand shrinks a little."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CHUNK = 2**20


@dataclass(frozen=True)
class FileEntry:
    """One file as the manifest lists it."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What an archive is."""

    schema: int
    kind: Literal["model", "encoder"]
    name: str
    """A model's run (`scratch` for the one without a name), an encoder's folder name."""
    autoseg: str
    """Version that wrote it."""
    files: dict[str, FileEntry]


def is_ours(name: str) -> bool:
    """Whether an archive may hold a file of that name."""
    return name == MANIFEST or _NAMES.fullmatch(name) is not None


def seal(folder: Path, kind: Literal["model", "encoder"], name: str) -> Manifest:
    """Write the manifest over what lies in `folder`."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {name: FileEntry(sha256_of(folder / name), (folder / name).stat().st_size) for name in names}
    manifest = Manifest(SCHEMA, kind, name, version("autoseg"), files)
    write_json(folder / MANIFEST, asdict(manifest))
    return manifest


def write_zip(folder: Path, target: Path, *, inside: str = "") -> None:
    """Zip a folder's files, below the folder `inside` of the archive; whole or not at all.

    Equal files give equal bytes: entries are sorted and carry one fixed time.
    """
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(inside + path.relative_to(folder).as_posix(), _EPOCH)
            entry.external_attr = 0o644 << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as sink:
                while chunk := source.read(_CHUNK):
                    sink.write(chunk)


def unpack(archive_path: Path, folder: Path) -> Manifest:
    """Check an archive's structure, then unpack it into `folder` (empty), checking sizes and hashes on the way.

    Raises UnsafeFile for an archive that tries to do more than carry these files, DatasetError for a broken one.
    """
    if not archive_path.is_file():
        raise DatasetError("No such archive", where=archive_path, remedy="give the .zip that `autoseg export` wrote")
    try:
        with zipfile.ZipFile(archive_path) as archive:
            entries = _checked_entries(archive, archive_path)
            manifest = parse_manifest(_read(archive, entries[MANIFEST], _LARGEST_JSON), archive_path)
            _check_against(manifest, entries, archive_path)
            for name, expected in manifest.files.items():
                _extract(archive, entries[name], expected, folder / name, archive_path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DatasetError(
            "The archive cannot be read",
            where=archive_path,
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy="copy or download it again; models of stock nnU-Net are installed with "
            "nnUNetv2_install_pretrained_model_from_zip",
        ) from error
    return manifest


def check_folder(folder: Path, *, without: tuple[str, ...] = ()) -> Manifest:
    """Check an unpacked archive: every file of the manifest, but for `without`, with its size and hash."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DatasetError("Nothing that autoseg exported", where=folder, found=f"no {MANIFEST}")
    manifest = parse_manifest(path.read_bytes(), path)
    for name, expected in manifest.files.items():
        file = folder / name
        if name in without:
            continue
        if not file.is_file() or file.stat().st_size != expected.size or sha256_of(file) != expected.sha256:
            raise _changed(name, folder)
    return manifest


def parse_manifest(content: bytes, where: Path | str) -> Manifest:
    """The manifest, every field checked, its names among those an archive may hold."""
    found = parse_json(content, MANIFEST, where)
    if isinstance(found.get("schema"), int) and found["schema"] > SCHEMA:
        raise DatasetError(
            "The archive was written by a newer autoseg",
            where=where,
            found=f"schema {found['schema']}, autoseg {found.get('autoseg')}",
            expected=f"schema {SCHEMA}",
            remedy="update autoseg",
        )
    try:
        manifest = TypeAdapter(Manifest).validate_json(content, strict=True)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}" for e in error.errors()]
        raise DatasetError(
            "The manifest is not as autoseg writes it", where=where, found="; ".join(problems)
        ) from error
    for name in manifest.files:
        if _NAMES.fullmatch(name) is None:
            raise _refusal("The manifest lists a file that has no place in an archive", where, repr(name))
    return manifest


def parse_json(content: bytes, name: str, where: object) -> dict[str, Any]:
    """A JSON object; NaN, infinities, endless nesting and anything but an object are refused."""
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{name} is not readable as JSON", where=where, found=str(error) or "too deep") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{name} is not a JSON object", where=where, found=type(found).__name__)
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _checked_entries(archive: zipfile.ZipFile, where: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries by name, after looking at the directory only."""
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.orig_filename
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if name != MANIFEST and _NAMES.fullmatch(name) is None:
            raise _refusal("The archive holds a file that has no place in it", where, repr(name))
        if kind not in (0, stat.S_IFREG):
            raise _refusal("The archive holds a link or a device instead of a file", where, repr(name))
        if name in entries:
            raise _refusal("The archive holds two files of one name", where, repr(name))
        if entry.flag_bits & 0x1:
            raise DatasetError("The archive is encrypted", where=where, remedy="ask for one without a password")
        entries[name] = entry
    if MANIFEST not in entries:
        raise DatasetError(
            "Not an archive of autoseg",
            where=where,
            found=f"no {MANIFEST}",
            remedy="export it with `autoseg export`; models of stock nnU-Net are installed with "
            "nnUNetv2_install_pretrained_model_from_zip",
        )
    unpacked, packed = sum(entry.file_size for entry in entries.values()), where.stat().st_size
    if unpacked > _LARGEST_RATIO * packed or sum(entry.compress_size for entry in entries.values()) > packed:
        raise _refusal(
            "The archive would unpack to far more than it can hold", where, f"{unpacked} bytes from {packed}"
        )
    return entries


def _check_against(manifest: Manifest, entries: dict[str, zipfile.ZipInfo], where: Path) -> None:
    extra = sorted(set(entries) - set(manifest.files) - {MANIFEST})
    if extra:
        raise _refusal("The archive holds files that its manifest does not list", where, ", ".join(extra))
    missing = sorted(set(manifest.files) - set(entries))
    if missing:
        raise DatasetError("The archive is not complete", where=where, found=f"no {', no '.join(missing)}")
    for name, expected in manifest.files.items():
        if not name.endswith(".safetensors") and expected.size > _LARGEST_JSON:
            raise _refusal("A description in the archive is implausibly large", where, f"{name}: {expected.size} bytes")


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, expected: FileEntry, target: Path, where: Path) -> None:
    digest, left = hashlib.sha256(), expected.size
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("xb") as sink:
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise _changed(entry.filename, where)
            digest.update(chunk)
            sink.write(chunk)
    if left or digest.hexdigest() != expected.sha256:
        raise _changed(entry.filename, where)


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, largest: int) -> bytes:
    with archive.open(entry) as source:
        content = source.read(largest + 1)
    if len(content) > largest:
        raise zipfile.BadZipFile(f"{entry.filename} is larger than {largest} bytes")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _refusal(what: str, where: object, found: str) -> UnsafeFile:
    return UnsafeFile(
        f"{what}; nothing was installed", where=where, found=found[:300], remedy="do not use it; ask for a new export"
    )


def _changed(name: str, where: object) -> DatasetError:
    return DatasetError(
        "A file is not the one that was exported; nothing was installed",
        where=where,
        found=f"{name} with another size or SHA-256 than the manifest has",
        remedy="copy or download it again",
    )
