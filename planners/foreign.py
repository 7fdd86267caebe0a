"""Somebody else's network on the data of a plan, with a patch that the plan's memory can hold: U-Nets, Primus, PCRL's U-Net."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

from planners.budget import (
    CPU,
    DEFAULT_GPU_MEMORY_GB,
    MIN_EDGE,
    feature_map_elements,
    gpu_memory_gb,
    is_small,
    label_count,
)
from planners.decisions import Choice, times
from planners.errors import PlanError

PRIMUS = "pretrain.networks.Primus"
PCRL_UNET = "pretrain.networks.PCRLUNet"
_UNET = "dynamic_network_architectures.architectures.unet"
UNETS = {
    "PlainConvUNet": "n_conv_per_stage",
    "ResidualEncoderUNet": "n_blocks_per_stage",
    "ResidualUNet": "n_blocks_per_stage",
}
"""Class -> its argument with the number of convolutions or blocks of each encoder stage."""

# nnU-Net's ResEnc planner: feature map elements of one patch that go with 8 GB and these batches.
_REFERENCE = {3: (680_000_000, 2), 2: (135_000_000, 12)}
_SMALLEST_BATCH = 2
_PCRL_STRIDE = 8
# Outputs of all convolutions, in numbers for each voxel and feature (counted); nnU-Net's estimate counts the same.
_PCRL_MAPS = 7.24


def choose_unet(
    plan: Mapping, parent: Mapping, architecture: Mapping[str, Any], *, patch_size: Sequence[int] | None = None
) -> Choice:
    """The features, blocks, normalisation and non-linearity of `architecture` with strides and kernels by nnU-Net's rule for
    the spacing of `parent`, cut to the smaller number of stages; the patch shrinks until nnU-Net's estimate fits the memory.

    Args:
        parent: the resolved configuration whose data are used.
        patch_size: what to begin with, clipped to the median case; None: the parent's.
    """
    dims, median = len(parent["spacing"]), parent["median_image_size_in_voxels"]
    start = list(parent["patch_size"])
    if patch_size is not None and len(patch_size) == dims:
        start = [min(n, math.ceil(m)) for n, m in zip(patch_size, median, strict=True)]
    elements, batch = _REFERENCE[dims]
    elements = round(elements * gpu_memory_gb(plan) / DEFAULT_GPU_MEMORY_GB)
    voxels = (CPU.max_voxels_3d if dims == 3 else CPU.max_voxels_2d) if is_small(plan) else None

    patch, divisor = start, [1] * dims
    while True:
        _, strides, kernels, padded, divisor = get_pool_and_conv_props(parent["spacing"], patch, MIN_EDGE, 999999)
        patch = [int(n) for n in padded]
        fitted = _fitted(architecture, parent, strides, kernels)
        needed = _elements(fitted, parent, patch, label_count(plan))
        if math.prod(patch) <= voxels if voxels is not None else needed <= elements:
            break
        patch = _shrunk(patch, divisor, median, parent["spacing"], least=MIN_EDGE)
    if voxels is None:
        batch = max(_SMALLEST_BATCH, min(round(elements / needed * batch), parent["batch_size"]))
    else:
        batch = CPU.fixed_batch or _SMALLEST_BATCH
    kwargs = fitted["arch_kwargs"]
    budget = "that a CPU can train" if voxels is not None else f"for {gpu_memory_gb(plan):g} GB"
    return Choice(
        patch_size=patch,
        batch_size=batch,
        architecture=fitted,
        strides=kwargs["strides"],
        alike=False,
        patch_because=f"{times(start)}, as far as it fits the strides and the memory: largest {budget}",
        batch_because=f"what fits beside the patch {budget}, at most that of the plan's own network, at least 2",
        network=f"{_class_of(fitted)}, features {'-'.join(map(str, kwargs['features_per_stage']))}",
        network_because=(
            f"that of the weights; {kwargs['n_stages']} stages, strides and kernels by the plan's spacing, total stride "
            f"{times(np.prod(kwargs['strides'], axis=0).tolist())}"
        ),
        network_change="other weights",
    )


def choose_primus(
    plan: Mapping, parent: Mapping, architecture: Mapping[str, Any], *, patch_size: Sequence[int] | None = None
) -> Choice:
    """Primus of `architecture`; its patch is a multiple of its tokens, `input_shape` is the patch.

    Args as for `choose_unet`; without a `patch_size` the architecture's `input_shape` is what it begins with.
    """
    arguments = dict(architecture["arch_kwargs"])
    token = [int(n) for n in arguments["patch_embed_size"]]
    median, memory = parent["median_image_size_in_voxels"], gpu_memory_gb(plan)
    wanted = patch_size or arguments.get("input_shape") or parent["patch_size"]
    patch = [max(t, min(n // t, math.ceil(m / t)) * t) for n, m, t in zip(wanted, median, token, strict=True)]
    start = list(patch)

    def needed() -> float:
        return primus_training_gb(patch, arguments, label_count(plan), small=is_small(plan))

    most = CPU.max_voxels_3d if is_small(plan) else None
    while needed() > memory or (most is not None and math.prod(patch) > most):
        patch = _shrunk(patch, token, median, parent["spacing"])
    arguments["input_shape"] = patch
    because = f"{times(start)}: multiples of the tokens' {times(token)} voxels, as far as the median case reaches"
    if patch != start:
        because += f"; then shrunk to {times(patch)} to fit " + ("a CPU" if is_small(plan) else f"into {memory:g} GB")
    return Choice(
        patch_size=patch,
        batch_size=_SMALLEST_BATCH,
        architecture={"network_class_name": PRIMUS, "arch_kwargs": arguments, "_kw_requires_import": []},
        strides=[token],
        alike=True,
        patch_because=f"{because}; about {needed():.1f} GB (an estimate, not measured on a GPU)",
        batch_because="smallest batch nnU-Net trains with",
        network=f"Primus, {arguments['eva_depth']} blocks of {arguments['embed_dim']} features",
        network_because="that of the weights; no deep supervision",
        network_change="other weights",
    )


def choose_pcrl_unet(
    plan: Mapping, parent: Mapping, architecture: Mapping[str, Any], *, patch_size: Sequence[int] | None = None
) -> Choice:
    """The U-Net of PCRL's weights; its patch is a multiple of 8 and shrinks until its feature maps are as many as nnU-Net's
    rule allows a U-Net. Args as for `choose_unet`."""
    width, step = int(architecture["arch_kwargs"]["width"]), [_PCRL_STRIDE] * 3
    median, memory = parent["median_image_size_in_voxels"], gpu_memory_gb(plan)
    wanted = patch_size or parent["patch_size"]
    start = [max(2 * s, min(n // s, math.ceil(m / s)) * s) for n, m, s in zip(wanted, median, step, strict=True)]
    most = round(_REFERENCE[3][0] * memory / DEFAULT_GPU_MEMORY_GB)
    voxels = CPU.max_voxels_3d if is_small(plan) else None
    patch = list(start)
    while math.prod(patch) > (voxels or most / (_PCRL_MAPS * width)):
        patch = _shrunk(patch, step, median, parent["spacing"], least=2 * _PCRL_STRIDE)
    budget = "that a CPU can train" if voxels else f"for {memory:g} GB"
    return Choice(
        patch_size=patch,
        batch_size=_SMALLEST_BATCH,
        architecture={"network_class_name": PCRL_UNET, "arch_kwargs": {"width": width}, "_kw_requires_import": []},
        strides=[[1, 1, 1], *[[2, 2, 2]] * 3],
        alike=True,
        patch_because=f"{times(start)}, multiples of 8, as far as it fits the memory: largest {budget}",
        batch_because="smallest batch nnU-Net trains with",
        network=f"PCRLUNet, {width} features at full size",
        network_because="that of the weights; four levels, no deep supervision",
        network_change="other weights",
    )


def primus_training_gb(patch: Sequence[int], arguments: Mapping[str, Any], labels: int, *, small: bool) -> float:
    """Memory of a training step of batch 2 in GB (10⁹ bytes).

    Measured like `planners.swin.training_gb`, with 396 features, 2 and 12 blocks, patches 64³ and 96³ and tokens of 8³: the
    formula gives +1 % to +5 % of that in bfloat16 (`small`: in float32, as on a CPU, 0 % to +3 %). Attention is counted as
    torch computes it, in pieces.
    """
    features, depth, voxels = arguments["embed_dim"], arguments["eva_depth"], math.prod(patch)
    tokens = voxels / math.prod(arguments["patch_embed_size"])
    parameters = (12.1 * depth + 6.5) * features**2 + tokens * features
    of_blocks, of_decoder, of_weights = (101, 0.6, 16) if small else (59, 0.38, 18)
    kept = of_blocks * tokens * features * depth + voxels * (24 * labels + of_decoder * features)
    return (_SMALLEST_BATCH * kept + of_weights * parameters) / 1e9


def _fitted(architecture: Mapping, parent: Mapping, strides: Sequence, kernels: Sequence) -> dict[str, Any]:
    """`architecture` with these strides and kernels and as many stages as both have, in the dimensions of `parent`."""
    name = _class_of(architecture)
    own, plans_own = dict(architecture["arch_kwargs"]), parent["architecture"]["arch_kwargs"]
    dims = len(parent["spacing"])
    stages = min(int(own["n_stages"]), len(strides))
    for key in ("features_per_stage", UNETS[name]):
        if isinstance(own[key], list | tuple):
            own[key] = list(own[key][:stages])
    own["features_per_stage"] = (
        own["features_per_stage"]
        if isinstance(own["features_per_stage"], list)
        else [own["features_per_stage"]] * stages
    )
    decoder = own["n_conv_per_stage_decoder"]
    own["n_conv_per_stage_decoder"] = list(decoder[: stages - 1]) if isinstance(decoder, list | tuple) else decoder
    for key in ("norm_op", "dropout_op"):
        if own.get(key):
            own[key] = own[key].replace("2d", f"{dims}d").replace("3d", f"{dims}d")
    own |= {
        "n_stages": stages,
        "conv_op": plans_own["conv_op"],
        "strides": [list(map(int, stride)) for stride in strides[:stages]],
        "kernel_sizes": [list(map(int, kernel)) for kernel in kernels[:stages]],
    }
    return {
        "network_class_name": f"{_UNET}.{name}",
        "arch_kwargs": own,
        "_kw_requires_import": list(architecture["_kw_requires_import"]),
    }


def _elements(architecture: Mapping, parent: Mapping, patch: Sequence[int], labels: int) -> int:
    """nnU-Net's estimate. The layers' names are the plan's: those of a file are not for this function to import, and a
    non-linearity has no feature maps of its own."""
    plans_own = parent["architecture"]["arch_kwargs"]
    layers = ("conv_op", "norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs", "nonlin", "nonlin_kwargs")
    kwargs = {**architecture["arch_kwargs"], **{key: plans_own[key] for key in layers}}
    imported = parent["architecture"]["_kw_requires_import"]
    channels = len(parent["normalization_schemes"])
    return feature_map_elements(patch, channels, labels, architecture["network_class_name"], kwargs, imported)


def _shrunk(
    patch: Sequence[int], step: Sequence[int], median: Sequence[float], spacing: Sequence[float], *, least: int = 1
) -> list[int]:
    """One step less on the axis that is largest beside the median case, as nnU-Net does it."""
    able = [axis for axis in range(len(patch)) if patch[axis] - step[axis] >= max(least, step[axis])]
    if not able:
        raise PlanError(
            "This network cannot be trained in the memory the plan is made for",
            found=f"too large even with a patch of {times(list(patch))}",
            remedy="plan for more memory (--gpu-memory GB)",
        )
    axis = max(able, key=lambda a: (patch[a] / median[a], patch[a] * spacing[a]))
    return [n - int(step[a]) if a == axis else n for a, n in enumerate(patch)]


def _class_of(architecture: Mapping) -> str:
    return architecture["network_class_name"].rpartition(".")[2]
