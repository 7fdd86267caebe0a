"""Patch, batch and memory of PUMIT's segmentation network, whose strides and kernels follow the degree of anisotropy (DA).

Source: PUMIT (function2-llx/PUMIT:conf/model/*.yaml for the sizes, downstream/btcv/model.py for the levels).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from planners.anisotropy import degree_of_anisotropy, strides_of_degree
from planners.budget import CPU, FULL, gpu_memory_gb, is_small, label_count
from planners.decisions import Choice, times
from planners.errors import PlanError

NETWORK = "pretrain.networks.PUMIT"
LEVELS = 6
SIZES = {
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
"""The size in the name of a configuration → the transformer; b and l are the published ones."""
_SMALL_SIZE = {"embed_dim": 96, "depth": 4, "num_heads": 3}
_WIDTHS = (1, 2, 4, 8, 16, 16)
_BATCH = 2


def arguments_of_size(plan: Mapping, size: str | None) -> dict[str, Any]:
    """The transformer and the decoder's channels; without a `size` s, and in the small plan one that a CPU can train."""
    transformer = SIZES[size or "s"] if size or not is_small(plan) else _SMALL_SIZE
    width = (CPU if is_small(plan) else FULL).base_features
    return {"features_per_stage": [width * w for w in _WIDTHS], **transformer}


def choose_sac(
    plan: Mapping, parent: Mapping, arguments: Mapping[str, Any], *, patch_size: Sequence[int] | None = None
) -> Choice:
    """Patch, batch and network.

    Args:
        parent: the resolved configuration whose data are used.
        arguments: of the network, without its strides.
        patch_size: what is rounded up instead of the parent's; in the small plan the patch is the smallest there is.

    Raises PlanError when the plan's memory does not suffice for the smallest patch.
    """
    degree = degree_of_anisotropy(parent["spacing"])
    strides = strides_of_degree(degree, LEVELS)
    step = [math.prod(axis) for axis in zip(*strides, strict=True)]
    wanted = step if is_small(plan) else (patch_size or parent["patch_size"])
    median, memory = parent["median_image_size_in_voxels"], gpu_memory_gb(plan)
    largest = [math.ceil(n / s) * s for n, s in zip(wanted, step, strict=True)]
    if largest == step:
        # The coarsest map is normalised over its voxels, so it needs two.
        axis = max(range(3), key=lambda a: median[a] / step[a])
        largest[axis] += step[axis]

    def size(patch: Sequence[int], batch: int) -> float:
        return training_gb(patch, strides, arguments, batch, labels=label_count(plan), half=not is_small(plan))

    patch = list(largest)
    while size(patch, _BATCH) > memory and (smaller := _smaller(patch, step, parent["spacing"])) is not None:
        patch = smaller
    batch = _BATCH if size(patch, _BATCH) <= memory else 1
    if size(patch, batch) > memory:
        raise PlanError(
            f"PUMIT with {arguments['embed_dim']} features a token cannot be trained in the memory the plan is made for",
            found=f"about {size(patch, 1):.1f} GB with the smallest patch, {times(patch)}, and batch 1",
            expected=f"at most {memory:g} GB",
            remedy=f"plan for more (--gpu-memory {math.ceil(size(patch, 1))}), or a smaller network (3d_fullres_sac)",
        )
    because = (
        f"smallest with multiples of {times(step)} and two voxels on the coarsest level"
        if is_small(plan)
        else f"{times(list(wanted))}, rounded up to multiples of {times(step)}"
    )
    if patch != largest:
        because += f"; then shrunk from {times(largest)} to fit into {memory:g} GB"
    return Choice(
        patch_size=patch,
        batch_size=batch,
        architecture={
            "network_class_name": NETWORK,
            "arch_kwargs": {"strides": strides, **arguments},
            "_kw_requires_import": [],
        },
        strides=strides,
        alike=False,
        patch_because=f"{because}; about {size(patch, batch):.1f} GB (an estimate, not measured on a GPU)",
        batch_because="smallest batch nnU-Net trains with" if batch > 1 else f"two do not fit into {memory:g} GB",
        network=f"PUMIT, {arguments['depth']} blocks of {arguments['embed_dim']} features",
        network_because=f"tokens of {times([max(16 >> degree, 1), 16, 16])} voxels, strides and kernels by DA {degree}",
        network_change="-c 3d_fullres_sac_SIZE",
    )


def training_gb(
    patch: Sequence[int],
    strides: Sequence[Sequence[int]],
    arguments: Mapping[str, Any],
    batch: int,
    *,
    half: bool,
    labels: int = 14,
) -> float:
    """Memory of a training step in GB (10⁹ bytes): weights, gradients, AdamW's two averages, and what the forward pass keeps.

    Numbers that the backward pass needs of every convolution, norm and concatenation are counted by hand; for a block of the
    transformer it is what was measured of the same block in Primus (`planners.foreign.primus_training_gb`), for the loss what
    was measured with SwinUNETR. Compared with torch's memory tracker on fake tensors, that is without a GPU, the formula gives
    -1 % to +9 %: size s on 64³ (DA 0) and 40×160×160 (DA 2), b on 32×64×64 (DA 1), in bfloat16, and the small network on
    32×64×32 (DA 0) in float32, 14 labels. Not counted: what CUDA and cuDNN take for themselves, and fragments.

    Args:
        half: in bfloat16, else float32.
    """
    width, depth, features = arguments["embed_dim"], arguments["depth"], arguments["features_per_stage"]
    voxels, size = [], [float(n) for n in patch]
    for stride in strides:
        size = [n / s for n, s in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    # Two convolutions keep four maps and a concatenation two; the two finest levels have two more convolutions, the others one.
    kept = sum((10 if level < 2 else 8) * f * n for level, (f, n) in enumerate(zip(features, voxels, strict=True)))
    enlarged = width * (voxels[2] + 4 * voxels[3])
    blocks, bytes_of_a_number, bytes_of_a_weight = (59, 2, 18) if half else (101, 4, 16)
    activations = (kept + enlarged) * bytes_of_a_number + blocks * voxels[4] * width * depth
    # The peak is in the loss, or where the gradients at full size begin if there are few labels.
    peak = max(24 * labels * sum(voxels[:4]), 4 * features[0] * voxels[0] * bytes_of_a_number)
    transformer = 12 * depth * width**2 + 4096 * width
    joins = sum(81 * fine**2 + 8 * fine * coarse for fine, coarse in itertools.pairwise(features))
    decoder = 20 * width**2 + joins
    return (batch * (activations + peak) + bytes_of_a_weight * (transformer + decoder)) / 1e9


def _smaller(patch: Sequence[int], step: Sequence[int], spacing: Sequence[float]) -> list[int] | None:
    """One step less on the axis with the most steps, of equal ones the longest in mm; None below the smallest patch."""
    axis = max(range(3), key=lambda a: (patch[a] // step[a], patch[a] * spacing[a]))
    smaller = [n - step[a] if a == axis else n for a, n in enumerate(patch)]
    return smaller if min(smaller) > 0 and math.prod(smaller) > math.prod(step) else None
