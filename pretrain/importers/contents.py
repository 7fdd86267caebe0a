"""A file or folder of weights before anyone knows what it is: its tensors, and everything beside them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planners.errors import DatasetError, PretrainedMismatch
from pretrain.importers.weights import Named
from pretrain.safe_load import load_weights_file

# Entries that hold the weights in the files of one project or another; the first that is there is taken (voco.md 4.2).
_WRAPPERS = ("state_dict", "network_weights", "net", "model")
_BRANCHES = ("student", "teacher")
# What training adds in front of every name: DistributedDataParallel, torch.compile, the authors' own wrapping modules.
_PREFIXES = ("module.", "_orig_mod.", "backbone.")


@dataclass(frozen=True)
class Contents:
    """What is in a file, for the importers to look at."""

    path: Path
    """What was asked for."""
    tensors: dict[str, Tensor]
    """One network's, without leading `module.`, `_orig_mod.`, `backbone.`, `student.`, `teacher.`."""
    branch: str
    """`teacher` or `student` where the file holds both; else empty."""
    extra: Mapping[str, Any]
    """Everything beside the weights: plans, arguments. Plain values; of unknown origin."""
    sha256: str
    others: Named = ()
    """Tensors of the branches that are not looked at, and why."""

    @property
    def name(self) -> str:
        """For a run: of the file, or of the folder where the file's own name says nothing."""
        path = self.path.resolve()
        while path.stem.startswith(("checkpoint_", "fold_", "encoder")) and path.parent != path:
            path = path.parent
        text = path.name if path.is_dir() else path.stem
        return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip(".-") or "weights"

    def select(self, keep: Callable[[str], str | None]) -> tuple[dict[str, Tensor], Named]:
        """The tensors `keep` gives a name to, and the others with the reason.

        Args:
            keep: the new name, or None; a result beginning with `!` is the reason why a tensor is not used.
        """
        kept: dict[str, Tensor] = {}
        dropped = []
        for name, tensor in self.tensors.items():
            result = keep(name) or "!no part of the encoder"
            if result.startswith("!"):
                dropped.append((name, result[1:]))
            elif result in kept and not torch.equal(kept[result], tensor):
                raise DatasetError(
                    "Two tensors of the file have one meaning and different values", where=self.path, found=name
                )
            elif result in kept:
                dropped.append((name, f"another name of {result}"))
            else:
                kept[result] = tensor
        return kept, (*dropped, *self.others)


def read_contents(path: Path, file: Path, beside: Mapping[str, Any], branch: str) -> Iterator[Contents]:
    """What `file` holds, one network at a time: the shared tensors with those of `branch`, then the other branch.

    Args:
        path: what the user gave, for names and messages; file: the file that holds the tensors.
        beside: what lies beside it; the file's own entries count more.
        branch: `teacher` or `student`, whichever shall be looked at first.

    Raises DatasetError where there are no tensors, PretrainedMismatch where they are not finite.
    """
    content = load_weights_file(file)
    state, extra = _unwrap(content)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise DatasetError(
            "The file holds no weights",
            where=file,
            found=f"no tensor under {keys}",
            expected="a state_dict",
            remedy="save the network with torch.save(network.state_dict(), 'weights.pt')",
        )
    tensors = _checked(tensors, file)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    branches = _branches(tensors)
    order = sorted(branches, key=lambda name: (name != "", name != branch))
    for chosen in order:
        others = tuple(
            (f"{other}.{name}" if other else name, f"of the {other or 'shared part'}; {chosen or 'the rest'} is used")
            for other in order
            if other != chosen
            for name in branches[other]
        )
        yield Contents(path, branches[chosen], chosen, {**beside, **extra}, digest.hexdigest(), others)


def read_extra_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object beside the weights, or None."""
    file = folder / name
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError("Not readable as JSON", where=file, found=error, remedy="download it again") from error
    return content if isinstance(content, dict) else None


def _unwrap(content: Any) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The mapping that holds the tensors, and what lay beside it."""
    extra: dict[str, Any] = {}
    while isinstance(content, Mapping):
        inner = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        extra |= {str(key): value for key, value in content.items() if key != inner}
        content = content[inner]
    if not isinstance(content, Mapping):
        return {}, extra
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if key in _BRANCHES and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": tensor for name, tensor in _unwrap(value)[0].items()}
        else:
            flat[key] = value
    return flat, extra


def _branches(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors without the leading prefixes, by branch: "" (neither), student, teacher."""
    branches: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, branch = _stripped(full), ""
        for known in _BRANCHES:
            if name.startswith(f"{known}."):
                branch, name = known, _stripped(name[len(known) + 1 :])
        group = branches.setdefault(branch, {})
        group[full if name in group else name] = tensor
    return branches


def _stripped(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name[len(prefix) :]
    return name


def _checked(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """float32 instead of half precision, whole, finite."""
    checked = {}
    broken = []
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise DatasetError(
                "A tensor claims a size that the file does not hold",
                where=file,
                found=f"{name} {tuple(tensor.shape)}",
                remedy="do not use this file",
            )
        checked[name] = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            broken.append(name)
    if broken:
        raise PretrainedMismatch(
            "The weights hold values that are not finite",
            where=file,
            found=", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else ""),
            remedy="take another checkpoint of that training; these weights are of no use",
        )
    return checked
