"""Reading files of weights that others made: told apart by their content, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from planners.errors import DatasetError, UnsafeFile

# What checkpoints hold beside tensors and plain values. Stock nnU-Net: logged numbers, which numpy 1 and 2 name differently.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # type: ignore[index]
_PLAIN_GLOBALS: list[Any] = [
    argparse.Namespace,  # training scripts keep their options beside the weights; it is a dict with dots
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")},
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]

_AGAIN = "copy or download it again"

# First bytes of files that are often mistaken for weights: what they are, and what to do.
_OTHER_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, TensorFlow)", "take the PyTorch version of these weights"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first, if it holds weights"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!", "a RAR archive", "unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
    (b"GGUF", "a GGUF file (a language model)", "take the PyTorch version of these weights"),
)


def load_torch(
    path: str | Path, device: torch.device | str = "cpu", *, what: str = "checkpoint", remedy: str = _AGAIN
) -> Any:
    """What `torch.save` wrote, with plain values, tensors, numpy's numbers and argparse's options only.

    Args:
        what: names the file in the messages.
        remedy: for a broken file.

    Raises UnsafeFile for a file that asks for code, DatasetError for one that cannot be read.
    """
    try:
        # a stream, not the path: torch.load chooses another reader for some names
        with torch.serialization.safe_globals(_PLAIN_GLOBALS), Path(path).open("rb") as file:
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error) and "global" not in str(error).lower():
            raise _broken(path, what, error, remedy) from error
        # The remedy is printed, never run: only its reader can know who made the file, and needs a way to its tensors then.
        raise UnsafeFile(
            f"The {what} asks for code to be run; nothing of it was",
            where=path,
            found=next((line.strip()[:200] for line in str(error).splitlines() if "GLOBAL" in line), "not plain data"),
            remedy="do not use this file unless you know who made it; if you do, save its tensors alone, in Python:\n"
            f"            import torch; content = torch.load({str(path)!r}, map_location='cpu', weights_only=False)\n"
            "            torch.save(content['state_dict'], 'weights.pt')  # or network_weights, net, model",
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise _broken(path, what, error, remedy) from error


def load_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and text metadata of a safetensors file; DatasetError for a broken one."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DatasetError(
            "Not readable as safetensors", where=path, found=_first_line(error), remedy=_AGAIN
        ) from error


def load_weights_file(path: Path) -> Any:
    """The content of a file of weights, whatever it is called: PyTorch's formats or safetensors (tensors by name).

    Raises UnsafeFile for a file that asks for code, DatasetError for anything else that is not one of the two formats.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if size == 0:
        raise _not_weights(path, "an empty file", _AGAIN)
    for start, kind, remedy in _OTHER_KINDS:
        if head.startswith(start):
            raise _not_weights(path, kind, remedy)
    if head.startswith(b"PK"):
        _check_zip(path, size)
        return load_torch(path, what="file", remedy=_AGAIN)
    if head[8:9] == b"{" and len(head) > 9:
        return load_safetensors(path)[0]
    if head[:1] == b"\x80":
        return load_torch(path, what="file", remedy=_AGAIN)
    raise _not_weights(path, *_text_or_unknown(head))


def _check_zip(path: Path, size: int) -> None:
    """PyTorch's zip holds `data.pkl` beside the tensors, uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _not_weights(path, f"a zip file that ends too early ({_first_line(error)})", _AGAIN) from error
    names = [entry.filename for entry in entries]
    inner = [name.partition("/")[2] or name for name in names]
    if "constants.pkl" in inner:
        raise UnsafeFile(
            "A TorchScript archive holds a program, not only weights; nothing of it was run",
            where=path,
            remedy="save its tensors alone, in Python:\n"
            f"            import torch; module = torch.jit.load({str(path)!r}, map_location='cpu')  # runs its code\n"
            "            torch.save(module.state_dict(), 'weights.pt')",
        )
    if "data.pkl" not in inner:
        inside = [name for name in names if name.endswith((".pth", ".pt", ".safetensors", ".ckpt"))]
        found = f"a zip file with {', '.join((inside or names)[:5]) or 'nothing in it'}"
        remedy = "unpack it and give the folder that holds the weights" if inside else "give a file of weights"
        raise _not_weights(path, found, remedy)
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size:
        raise _not_weights(path, f"a file of {size} bytes that claims to hold {claimed}", "do not use this file")


def _text_or_unknown(head: bytes) -> tuple[str, str]:
    text = head.decode("utf-8", "replace").strip()
    if text.lower().startswith(("<!doctype", "<html", "<?xml")):
        return "a web page", "the download gave a page instead of the file: download it in a browser, or log in first"
    if text.isprintable() or text.replace("\n", "").replace("\r", "").replace("\t", "").isprintable():
        return f"text: {text.splitlines()[0][:60]}", "give a file of weights"
    return f"unknown content, beginning with {head[:8].hex(' ')}", "give a file of weights"


def _not_weights(path: Path, found: str, remedy: str) -> DatasetError:
    return DatasetError(
        "Not a file of weights", where=path, found=found, expected="a PyTorch or safetensors file", remedy=remedy
    )


def _broken(path: str | Path, what: str, error: Exception, remedy: str) -> DatasetError:
    return DatasetError(f"The {what} cannot be read", where=path, found=_first_line(error), remedy=remedy)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
