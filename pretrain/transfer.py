"""Move pretrained weights into a network: matched by name, adapted by rule, every tensor accounted for.

Rules: another number of input channels takes the sum over the old ones, spread evenly over the new ones, so that the
response to equal channels stays; a kernel of depth 3 becomes depth 1 by summing, depth 1 becomes depth 3 by placing it
in the centre, so that the response to a volume that is constant along the slices stays. A 3d kernel becomes 2d by the same
sum and a 2d kernel is one of depth 1; up-sampling kernels, whose slices lie beside each other in the output, are averaged
or repeated instead. A table of positions is interpolated linearly over its grid, corner on corner. Any other difference in
shape means that the tensor is not used. Integer tensors are derived from the network's sizes: never copied, but compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from planners.errors import PretrainedMismatch
from pretrain.kernel_depth import inflate_depth, pool_depth


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
            *((name, "unused", "the network has no such tensor, or one of another shape") for name in self.unused),
            *((name, "adapted", rule) for name, rule in self.adapted),
            *((name, "loaded", "") for name in self.loaded),
        ]

    def summary(self) -> str:
        """One line: `encoder 100 %: 42 loaded, 1 adapted, 0 new, 0 unused`."""
        return (
            f"encoder {_percent(self.encoder_share)}: {len(self.loaded)} loaded, {len(self.adapted)} adapted, "
            f"{len(self.new)} new, {len(self.unused)} unused"
        )


def transfer(
    tensors: Mapping[str, Tensor],
    target: nn.Module,
    *,
    minimum_share: float = 1.0,
    position_grids: Mapping[str, tuple[int, ...]] | None = None,
    part: Sequence[str] = (),
    mix_channels: bool = False,
) -> TransferReport:
    """Copy `tensors` into `target` in place. `target` is an encoder, or a whole network with an `encoder`.

    Tensors registered under several names count once.

    Args:
        position_grids: token grid of each position table among `tensors`; those of the target are its encoder's
            `position_grids`.
        part: submodules of the encoder that `tensors` are meant for; `minimum_share` is then asked of these alone.
        mix_channels: spread the sum over the input channels evenly over as many, too, because they mean something else.

    Raises PretrainedMismatch, with the table and without having changed anything, when less than `minimum_share` of the
    target's encoder would be filled, or when a derived tensor differs.
    """
    state = target.state_dict()
    _compare_derived(tensors, state)
    encoder = getattr(target, "encoder", target)
    encoder_state = {n: t for n, t in encoder.state_dict().items() if t.is_floating_point()}
    in_encoder = {identity(tensor) for tensor in encoder_state.values()}
    wanted = {identity(t) for n, t in encoder_state.items() if not part or n.startswith(tuple(f"{p}." for p in part))}
    grids = {identity(encoder_state[n]): grid for n, grid in getattr(encoder, "position_grids", {}).items()}
    upsampling = {
        identity(m.weight) for m in target.modules() if isinstance(m, nn.ConvTranspose2d | nn.ConvTranspose3d)
    }

    matches = [
        (names, state[names[0]], next((name for name in names if name in tensors), None))
        for names in distinct((name, tensor) for name, tensor in state.items() if tensor.is_floating_point())
    ]
    kernels = {name: tensor for name, tensor in encoder_state.items() if identity(tensor) not in grids}
    channels = _image_channels(kernels, matches, tensors, mix=mix_channels)
    loaded: list[str] = []
    adapted: list[tuple[str, str]] = []
    new: list[tuple[str, str]] = []
    used: set[str] = set()
    copies: list[tuple[Tensor, Tensor]] = []
    filled: set[tuple] = set()
    for names, tensor, source_name in matches:
        if source_name is None:
            new.append((names[0], _absence(names[0], tensors)))
            continue
        source, mine = tensors[source_name], identity(tensor)
        if mine in grids and tensor.ndim == len(grids[mine]) + 2:
            value, rule = _resample_grid(source, tensor.shape)
        elif mine in grids and source_name in (position_grids or {}):
            value, rule = _resample_table(source, tensor.shape, (position_grids or {})[source_name], grids[mine])
        else:
            value, rule = _fit(
                source, tensor.shape, channels if mine in in_encoder else None, upsampling=mine in upsampling
            )
        if value is None:
            new.append((names[0], rule))
            continue
        used.update(name for name in names if name in tensors)
        copies.append((tensor, value))
        filled.add(mine)
        if rule:
            adapted.append((names[0], rule))
        else:
            loaded.append(names[0])

    derived = {name for name, tensor in tensors.items() if name in state and not tensor.is_floating_point()}
    unused = tuple(names[0] for names in distinct(tensors.items()) if not (used | derived).intersection(names))
    sizes = {identity(tensor): tensor.numel() for tensor in encoder_state.values()}
    report = TransferReport(_share(sizes, in_encoder, filled), tuple(loaded), tuple(adapted), tuple(new), unused)
    share = _share(sizes, wanted, filled)
    if share < minimum_share:
        raise PretrainedMismatch(
            "The pretrained weights do not fit this network\n" + _table(report),
            found=f"{_percent(share)} of the encoder" + (f"'s {', '.join(part)}" if part else ""),
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


def _share(sizes: Mapping[tuple, int], wanted: set[tuple], filled: set[tuple]) -> float:
    return sum(sizes[key] for key in wanted & filled) / max(sum(sizes[key] for key in wanted), 1)


def _compare_derived(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Index tables follow from the sizes of a network: where they differ, equal shapes do not mean equal networks."""
    for name, source in tensors.items():
        target = state.get(name)
        if target is None or target.is_floating_point() or target.ndim == 0 or source.shape != target.shape:
            continue
        if not torch.equal(source.to(target.device), target):
            raise PretrainedMismatch(
                "A table that follows from the network's sizes differs between the pretrained weights and this network",
                found=name,
                remedy="the weights come from another kind of network; use the one they were made for",
            )


def _image_channels(
    kernels: Mapping[str, Tensor],
    matches: Iterable[tuple[list[str], Tensor, str | None]],
    tensors: Mapping,
    *,
    mix: bool,
) -> tuple[int, int] | None:
    """Input channels of the source's and the target's first kernel. Every kernel of the encoder with the same two numbers
    looks at the image too, as the second branch of SwinUNETR does; None where they are equal and not to be mixed."""
    first = next((identity(tensor) for tensor in kernels.values() if tensor.ndim >= 4), None)
    for _, tensor, source_name in matches:
        if identity(tensor) == first and source_name is not None and tensors[source_name].ndim >= 4:
            old, new = tensors[source_name].shape[1], tensor.shape[1]
            return None if old == new and not mix else (old, new)
    return None


def _fit(
    source: Tensor, shape: torch.Size, channels: tuple[int, int] | None, *, upsampling: bool
) -> tuple[Tensor | None, str]:
    """`source` made to have `shape`, and the rule used ("" if none); None and the reason if no rule applies."""
    different = f"pretrained shape {tuple(source.shape)} against {tuple(shape)}"
    rules = []
    pooling: Literal["sum", "mean"] = "mean" if upsampling else "sum"
    if (source.ndim, len(shape)) == (5, 4):
        source = pool_depth(source, 1, pooling).squeeze(2)
        rules.append(f"3d to 2d by the {pooling} over depth")
    elif (source.ndim, len(shape)) == (4, 5):
        source = source.unsqueeze(2)
        rules.append("2d to 3d as depth 1")
    if source.ndim != len(shape):
        return None, different
    if len(shape) == 5 and source.shape[2] != shape[2]:
        old, new = source.shape[2], shape[2]
        if new == 1 and (upsampling or old == 3):
            source = pool_depth(source, 1, pooling)
            rules.append(
                f"up-sampling depth {old} to 1 by the mean" if upsampling else "kernel depth 3 to 1 by summing"
            )
        elif old == 1 and (upsampling or new == 3):
            source = inflate_depth(source, new, "repeat" if upsampling else "centre")
            rules.append(
                f"up-sampling depth 1 to {new} by repeating" if upsampling else "kernel depth 1 to 3 around the centre"
            )
    if channels is not None and len(shape) >= 4 and (source.shape[1], shape[1]) == channels:
        rules.append(f"input channels {channels[0]} to {channels[1]} by the sum, spread evenly")
        source = (source.sum(1, keepdim=True) / shape[1]).expand(-1, shape[1], *source.shape[2:])
    return (source, ", ".join(rules)) if source.shape == shape else (None, different)


def _resample_table(
    source: Tensor, shape: torch.Size, old: Sequence[int], new: Sequence[int]
) -> tuple[Tensor | None, str]:
    """A table of positions (1, extra + tokens, features) on another token grid.

    Extra tokens (class, registers) come first; those the target has no place for are dropped, from the end.
    """
    different = f"position table {tuple(source.shape)} of grid {tuple(old)} against {tuple(shape)} of {tuple(new)}"
    extra, kept = (s[1] - math.prod(grid) if len(s) == 3 else -1 for s, grid in ((source.shape, old), (shape, new)))
    if not 0 <= kept <= extra or len(old) != len(new) or source.shape[2] != shape[2]:
        return None, different
    table = source[:, extra:].float().reshape(1, *old, source.shape[2])
    for axis, (before, after) in enumerate(zip(old, new, strict=True), start=1):
        if before != after:
            table = _resample_axis(table, axis, after)
    rules = [f"positions {tuple(old)} to {tuple(new)} by linear interpolation"] if tuple(old) != tuple(new) else []
    rules += [f"{extra - kept} of {extra} class tokens dropped"] if extra != kept else []
    return torch.cat([source[:, :kept].float(), table.flatten(1, -2)], 1).to(source.dtype), ", ".join(rules)


def _resample_grid(source: Tensor, shape: torch.Size) -> tuple[Tensor | None, str]:
    """A table of positions (1, features, *grid) on another grid."""
    if source.ndim != len(shape) or source.shape[:2] != shape[:2]:
        return None, f"positions {tuple(source.shape)} against {tuple(shape)}"
    table = source.float()
    for axis in range(2, len(shape)):
        if source.shape[axis] != shape[axis]:
            table = _resample_axis(table, axis, shape[axis])
    old, new = tuple(source.shape[2:]), tuple(shape[2:])
    return table.to(source.dtype), f"positions {old} to {new} by linear interpolation" if old != new else ""


def _resample_axis(table: Tensor, axis: int, size: int) -> Tensor:
    """`size` points between the first and the last of an axis; one point is the middle."""
    last = table.shape[axis] - 1
    at = torch.linspace(0, last, size) if size > 1 else torch.tensor([last / 2])
    low = at.floor().long().clamp(max=max(last - 1, 0))
    weight = (at - low).view(-1, *[1] * (table.ndim - axis - 1)).to(table)
    high = (low + 1).clamp(max=last)
    return torch.lerp(table.index_select(axis, low), table.index_select(axis, high), weight)


def _absence(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Why a tensor of the target has no source: the outermost numbered part (a stage, a block) that the source lacks."""
    parts = name.split(".")
    for length in range(2, len(parts)):
        start = ".".join(parts[:length])
        if parts[length - 1].isdigit() and not any(other.startswith(start + ".") for other in tensors):
            parent = ".".join(parts[: length - 1])
            if any(other.startswith(parent + ".") for other in tensors):
                return f"the pretrained network has no {start}"
    return "not among the pretrained tensors"


def _percent(share: float) -> str:
    """Rounded down, so that 100 % means all."""
    return f"{int(share * 1000) / 10:g} %"


def _table(report: TransferReport) -> str:
    rows = [row for row in report.rows() if row[1] in ("new", "unused")]
    shown = [f"    {status:<7} {name}  {why}" for name, status, why in rows[:20]]
    if len(rows) > 20:
        shown.append(f"    … and {len(rows) - 20} more")
    return "\n".join([f"  {report.summary()}", *shown])
