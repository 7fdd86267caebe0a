"""The plan in words: every decision as value — because — how to change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from planners.anisotropy import leading_in_plane_stages


@dataclass(frozen=True)
class Decision:
    """One row of the plan table."""

    name: str
    value: str
    because: str
    change: str = ""

    def to_json(self) -> dict[str, str]:
        """A JSON object with the four texts."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """Patch, batch and network of a configuration that is added to a plan, with the reasons."""

    patch_size: list[int]
    batch_size: int
    architecture: dict[str, Any]
    strides: list[list[int]]
    """Of the encoder's stages, the first at full size."""
    alike: bool
    """Whether the network treats all axes alike, whatever the spacing."""
    patch_because: str
    batch_because: str
    network: str
    network_because: str
    network_change: str
    spacing: list[float] | None = None
    """In mm, where it is not that of the configuration whose data are used."""
    spacing_because: str = ""


def explain(
    configuration: Mapping[str, Any],
    plan: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    *,
    asked: Mapping[str, Any],
    gpu_memory_gb: float,
    small: bool,
) -> list[Decision]:
    """The rows for one configuration that has its own patch and network.

    Args:
        asked: what was decided otherwise than by rule: `spacing`, why; `patch_size`, which; None where the rule decided.
        small: the plan a CPU can train.
    """
    rows = [_spacing(configuration, plan, fingerprint, asked)]
    if len(configuration["spacing"]) == 3:
        rows.append(_anisotropy(configuration, plan))
    rows += [_intensity(channel) for channel in plan["autoseg"]["intensity"]]
    rows.append(_patch(configuration, asked, gpu_memory_gb, small))
    rows.append(_batch(configuration, gpu_memory_gb, small))
    rows.append(_network(configuration, small))
    return rows


def explain_added(choice: Choice, parent: Mapping[str, Any]) -> list[Decision]:
    """The rows for a configuration that is added on the data of another, `parent`, which is resolved."""
    own = parent.get("autoseg", {})
    kept = ("spacing", "intensity") if choice.spacing is None else ("intensity",)
    rows = [Decision(**row) for row in own.get("decisions", []) if row["name"].startswith(kept)]
    if choice.spacing is not None:
        rows.insert(0, Decision("spacing, mm", times(choice.spacing), choice.spacing_because, "--spacing Z,Y,X"))
    if len(parent["spacing"]) == 3:
        because = _thickness(parent["spacing"])
        because += "; the network halves all axes alike" if choice.alike else "; strides and kernels follow from it"
        rows.insert(1, Decision("anisotropy DA", str(own.get("DA")), because, "follows from --spacing"))
    return [
        *rows,
        Decision("patch, voxels", times(choice.patch_size), choice.patch_because, "--gpu-memory GB"),
        Decision("batch", str(choice.batch_size), choice.batch_because, "--gpu-memory GB"),
        Decision("network", choice.network, choice.network_because, choice.network_change),
    ]


def times(numbers: Sequence[float]) -> str:
    """`40×56×40`; lengths with at most three decimals."""
    return "×".join(f"{n:.3f}".rstrip("0").rstrip(".") if isinstance(n, float) else str(n) for n in numbers)


def _spacing(configuration: Mapping, plan: Mapping, fingerprint: Mapping, asked: Mapping) -> Decision:
    spacing = configuration["spacing"]
    spacings = np.asarray(fingerprint["spacings"])[:, plan["transpose_forward"]]
    if asked["spacing"] is not None:
        because = asked["spacing"]
    elif len(spacing) == 2:
        because = "median of the cases in the plane; slices are taken as they are"
    elif np.allclose(spacing, np.median(spacings, axis=0), atol=1e-4):
        because = f"median of {len(spacings)} cases"
    else:
        because = (
            f"median of {len(spacings)} cases; on the slice axis the 10th percentile, because slices are more than "
            "three times thicker than the plane's voxels"
        )
    if len(set(map(tuple, np.round(spacings, 3)))) > 1:
        low, high = spacings.min(axis=0), spacings.max(axis=0)
        because += f" (they range from {times(low.tolist())} to {times(high.tolist())})"
    return Decision("spacing, mm", times([float(s) for s in spacing]), because, "--spacing Z,Y,X")


def _anisotropy(configuration: Mapping, plan: Mapping) -> Decision:
    facts = configuration["autoseg"]
    degree = facts["DA"]
    strides = configuration["architecture"]["arch_kwargs"]["strides"]
    leading = leading_in_plane_stages(strides)
    because = _thickness(configuration["spacing"])
    if leading < degree:
        because += f"; the network has {leading} in-plane stages, fewer than DA, because the plane runs out of voxels"
    elif leading > degree:
        because += (
            f"; the network has {leading} in-plane stages, more than DA, because there are too few slices to halve"
        )
    else:
        halvings = "first halving leaves" if degree == 1 else f"first {degree} halvings leave"
        because += f", so the {halvings} the slices alone" if degree else ", so all axes are halved alike"
    cases = plan["autoseg"]["DA_cases"]
    if cases["min"] != cases["max"]:
        because += f" (raw cases: DA {cases['min']} to {cases['max']})"
    return Decision("anisotropy DA", str(degree), because, "follows from --spacing")


def _thickness(spacing: Sequence[float]) -> str:
    return f"slices are {spacing[0] / min(spacing[1:]):.1f} times as thick as the finer plane voxels"


def _intensity(channel: Mapping) -> Decision:
    value = channel["scheme"]
    if channel["window"]:
        low, high = channel["window"]
        value += f" [{low:g}, {high:g}] → [0, 1]"
    return Decision(f"intensity of {channel['channel']}", value, channel["because"], "--intensity SCHEME")


def _patch(configuration: Mapping, asked: Mapping, gpu_memory_gb: float, small: bool) -> Decision:
    patch = configuration["patch_size"]
    median = [round(n) for n in configuration["median_image_size_in_voxels"]]
    if asked["patch_size"] is not None and tuple(asked["patch_size"]) == tuple(patch):
        because = "asked for with --patch-size"
    elif all(p >= m for p, m in zip(patch, median, strict=True)):
        because = f"holds the median case ({times(median)} voxels) whole"
    elif small:
        because = f"largest in the median case's proportions ({times(median)}) that a CPU can train"
    else:
        because = f"largest in the median case's proportions ({times(median)}) for {gpu_memory_gb:g} GB"
    return Decision("patch, voxels", times(patch), because, "--patch-size Z,Y,X or --gpu-memory GB")


def _batch(configuration: Mapping, gpu_memory_gb: float, small: bool) -> Decision:
    if small:
        because = "smallest batch nnU-Net trains with"
    else:
        because = (
            f"what fits into {gpu_memory_gb:g} GB beside the patch, at most 5 % of the data set's voxels, at least 2"
        )
    return Decision("batch", str(configuration["batch_size"]), because, "--gpu-memory GB")


def _network(configuration: Mapping, small: bool) -> Decision:
    arch = configuration["architecture"]["arch_kwargs"]
    name = configuration["architecture"]["network_class_name"].rsplit(".", 1)[-1]
    value = f"{name}, features {'-'.join(map(str, arch['features_per_stage']))}"
    because = "small enough for a CPU" if small else "nnU-Net's residual encoder preset"
    because += f"; {arch['n_stages']} stages, total stride {times(np.prod(arch['strides'], axis=0).tolist())}"
    return Decision("network", value, because, "-p autosegPlans for the full size" if small else "--gpu-memory GB")
