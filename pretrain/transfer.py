"""Move pretrained weights into a network: matched by name, adapted by rule, every tensor accounted for.

Rules: another number of input channels takes the sum over the old ones, spread evenly over the new ones, so that the
response to equal channels stays; a kernel of depth 3 becomes depth 1 by summing, depth 1 becomes depth 3 by placing it
in the centre, so that the response to a volume that is constant along the slices stays. Any other difference in shape
means that the tensor is not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from planners.errors import PretrainedMismatch


@dataclass(frozen=True)
class TransferReport:
    """What became of every tensor. Names are those of the target, except `unused`, which are those of the source."""

    encoder_share: float
    """Share of the target encoder's numbers that came from the source, in [0, 1]."""
    loaded: tuple[str, ...]
    adapted: tuple[tuple[str, str], ...]
    """Name and rule."""
    new: tuple[tuple[str, str], ...]
    """Left as they were initialised; name and reason."""
    unused: tuple[str, ...]

    def to_json(self) -> dict:
        return {
            "encoder_share": self.encoder_share,
            "loaded": list(self.loaded),
            "adapted": [list(entry) for entry in self.adapted],
            "new": [list(entry) for entry in self.new],
            "unused": list(self.unused),
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """(tensor, what became of it, why) for every tensor, the loaded ones last."""
        return [
            *((name, "new", why) for name, why in self.new),
            *((name, "unused", "the network has no such tensor of that shape") for name in self.unused),
            *((name, "adapted", rule) for name, rule in self.adapted),
            *((name, "loaded", "") for name in self.loaded),
        ]

    def summary(self) -> str:
        """One line: `encoder 100 %: 42 loaded, 1 adapted, 0 new, 0 unused`."""
        return (
            f"encoder {_percent(self.encoder_share)}: {len(self.loaded)} loaded, {len(self.adapted)} adapted, "
            f"{len(self.new)} new, {len(self.unused)} unused"
        )


def transfer(tensors: Mapping[str, Tensor], target: nn.Module, *, minimum_share: float = 1.0) -> TransferReport:
    """Copy `tensors` into `target` in place. `target` is an encoder, or a whole network with a submodule `encoder`.

    Tensors registered under several names count once. Raises PretrainedMismatch, with the table and without having
    changed anything, when less than `minimum_share` of the target's encoder would be filled.
    """
    state = target.state_dict()
    encoder = getattr(target, "encoder", target)
    encoder_tensors = {identity(tensor) for tensor in encoder.state_dict().values()}
    entry = next((identity(t) for t in encoder.state_dict().values() if t.ndim >= 4), None)

    loaded: list[str] = []
    adapted: list[tuple[str, str]] = []
    new: list[tuple[str, str]] = []
    used: set[str] = set()
    copies: list[tuple[Tensor, Tensor]] = []
    filled = total = 0
    for names in distinct(state.items()):
        tensor = state[names[0]]
        source_name = next((name for name in names if name in tensors), None)
        counted = tensor.numel() if identity(tensor) in encoder_tensors else 0
        total += counted
        if source_name is None:
            new.append((names[0], "not among the pretrained tensors"))
            continue
        value, rule = _fit(tensors[source_name], tensor.shape, is_input=identity(tensor) == entry)
        if value is None:
            new.append((names[0], rule))
            continue
        used.update(name for name in names if name in tensors)
        copies.append((tensor, value))
        filled += counted
        if rule:
            adapted.append((names[0], rule))
        else:
            loaded.append(names[0])

    unused = tuple(names[0] for names in distinct(tensors.items()) if not used.intersection(names))
    report = TransferReport(filled / max(total, 1), tuple(loaded), tuple(adapted), tuple(new), unused)
    if report.encoder_share < minimum_share:
        raise PretrainedMismatch(
            "The pretrained weights do not fit this network\n" + _table(report),
            found=f"{_percent(report.encoder_share)} of the encoder",
            expected=f"at least {_percent(minimum_share)}",
            remedy="pretrain with the plan and configuration that is trained here, or leave out --pretrained",
        )
    with torch.no_grad():
        for tensor, value in copies:
            tensor.copy_(value)
    return report


def identity(tensor: Tensor) -> tuple:
    """Equal for two names of one tensor. Empty tensors have no storage and are told apart by their object."""
    if tensor.numel() == 0:
        return ("empty", id(tensor))
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def distinct(named: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """All names of each distinct tensor, the shortest name first, in order of first appearance."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(identity(tensor), []).append(name)
    return [sorted(names, key=len) for names in groups.values()]


def _fit(source: Tensor, shape: torch.Size, *, is_input: bool) -> tuple[Tensor | None, str]:
    """`source` made to have `shape`, and the rule used ("" if none); None and the reason if no rule applies."""
    different = f"pretrained shape {tuple(source.shape)} against {tuple(shape)}"
    if source.ndim != len(shape):
        return None, different
    rules = []
    if len(shape) == 5 and source.shape[2] != shape[2]:
        if (source.shape[2], shape[2]) == (3, 1):
            source = source.sum(2, keepdim=True)
            rules.append("kernel depth 3 to 1 by summing")
        elif (source.shape[2], shape[2]) == (1, 3):
            source = nn.functional.pad(source, (0, 0, 0, 0, 1, 1))
            rules.append("kernel depth 1 to 3 around the centre")
    if is_input and source.shape[1] != shape[1]:
        rules.append(f"input channels {source.shape[1]} to {shape[1]} by the sum, spread evenly")
        source = (source.sum(1, keepdim=True) / shape[1]).expand(-1, shape[1], *source.shape[2:])
    return (source, ", ".join(rules)) if source.shape == shape else (None, different)


def _percent(share: float) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{int(share * 1000) / 10:g} %"


def _table(report: TransferReport) -> str:
    rows = [row for row in report.rows() if row[1] in ("new", "unused")]
    shown = [f"    {status:<7} {name}  {why}" for name, status, why in rows[:20]]
    if len(rows) > 20:
        shown.append(f"    … and {len(rows) - 20} more")
    return "\n".join([f"  {report.summary()}", *shown])
