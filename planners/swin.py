"""Patch, batch and memory of SwinUNETR on the data of a plan.

Sources: the published VoCo recipe (Luffy03/Large-Scale-Medical:Downstream/monai/BTCV/main.py: 96³ voxels, 48 features, gradient
checkpointing); MONAI's SwinUNETR for what sizes it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from planners.budget import gpu_memory_gb, is_small, label_count
from planners.decisions import Choice, times
from planners.errors import PlanError

NETWORK = "pretrain.networks.SwinUNETR"
STRIDE = 32
"""Every axis of a patch is a multiple of it."""
_STRIDES = [[1] * 3, [2] * 3, [2] * 3, [2] * 3, [4] * 3]
_EDGE, _SMALL_EDGE = 96, 64
_FEATURES, _SMALL_FEATURES = 48, 12
_WINDOW = 7
_BATCH = 2


def default_features(plan: Mapping) -> int:
    """48 as in the published checkpoints; 12, the least there is, where a CPU trains."""
    return _SMALL_FEATURES if is_small(plan) else _FEATURES


def choose_swin(
    plan: Mapping, parent: Mapping, arguments: Mapping[str, Any], *, patch_size: Sequence[int] | None = None
) -> Choice:
    """Patch, batch and network.

    Args:
        parent: the resolved configuration whose data are used.
        arguments: of the network, without `use_checkpoint`.
        patch_size: an upper limit instead of 96 (64 in the small plan).

    Raises PlanError when the plan's memory does not suffice for the smallest patch.
    """
    small, memory = is_small(plan), gpu_memory_gb(plan)
    median, spacing = parent["median_image_size_in_voxels"], parent["spacing"]
    edge = _SMALL_EDGE if small else _EDGE
    limit = [edge] * 3 if patch_size is None else [max(STRIDE, n // STRIDE * STRIDE) for n in patch_size]
    limit = [min(n, edge) for n in limit] if small else limit
    largest = [min(n, math.ceil(m / STRIDE) * STRIDE) for n, m in zip(limit, median, strict=True)]
    if not _trainable(largest):
        largest[max(range(3), key=lambda a: median[a])] += STRIDE

    def size(patch: Sequence[int], batch: int) -> float:
        return training_gb(patch, arguments["feature_size"], batch, checkpointing=not small, labels=label_count(plan))

    patch, batch = list(largest), _BATCH
    while size(patch, batch) > memory and (smaller := _smaller(patch, spacing)) is not None:
        patch = smaller
    batch = _BATCH if size(patch, _BATCH) <= memory else 1
    if size(patch, batch) > memory:
        raise PlanError(
            f"SwinUNETR with {arguments['feature_size']} features cannot be trained in the memory the plan is made for",
            found=f"about {size(patch, 1):.1f} GB with the smallest patch, {times(patch)}, and batch 1",
            expected=f"at most {memory:g} GB",
            remedy=f"plan for more (--gpu-memory {math.ceil(size(patch, 1))}), or a smaller network (3d_fullres_swin)",
        )
    because = (
        f"multiples of {STRIDE}, at most {times(limit)}, as far as the median case reaches ({times(_whole(median))})"
    )
    if patch != largest:
        because += f"; then shrunk from {times(largest)} to fit into {memory:g} GB"
    because += f"; about {size(patch, batch):.1f} GB (an estimate, not measured on a GPU)"
    return Choice(
        patch_size=patch,
        batch_size=batch,
        architecture={
            "network_class_name": NETWORK,
            "arch_kwargs": {**arguments, "use_checkpoint": not small},
            "_kw_requires_import": [],
        },
        strides=_STRIDES,
        alike=True,
        patch_because=because,
        batch_because="smallest batch nnU-Net trains with" if batch > 1 else f"two do not fit into {memory:g} GB",
        network=f"SwinUNETR, features {arguments['feature_size']}"
        + ("" if arguments["use_v2"] else ", original blocks"),
        network_because=(
            "small enough for a CPU"
            if small and arguments["feature_size"] == _SMALL_FEATURES
            else "the published VoCo network"
            if arguments["feature_size"] == _FEATURES and arguments["use_v2"]
            else "asked for"
        )
        + f"; no deep supervision, {'without' if small else 'with'} gradient checkpointing",
        network_change="-c 3d_fullres_swin_SIZE",
    )


def training_gb(patch: Sequence[int], feature_size: int, batch: int, *, checkpointing: bool, labels: int = 14) -> float:
    """Memory of a training step in GB (10⁹ bytes): weights, gradients, AdamW's two averages, and all that lives at the peak.

    Measured with torch's memory tracker on fake tensors, that is without a GPU: forward, loss and backward of the network with
    12, 24 and 48 features (and 96 on 96³), patches 64×32×32, 32×96×96, 64³, 96³ and 64×96×128, batch 2, 14 labels (and 2, 40,
    105 with 48 features on 96³). In bfloat16 with checkpointing one of three things is the peak: the attention of the first
    stage when it is computed again, the convolutions at full size, or the loss. In float32 without checkpointing it is all that
    is kept. Attention grows with tokens, padded to whole windows. The formula gives -2 % to +8 % of what was
    measured, without checkpointing -6 % to +3 % (the original blocks need a tenth less). Not counted: what CUDA and cuDNN take
    for themselves, and fragments.
    """
    voxels = batch * math.prod(patch)
    tokens = batch * math.prod(2 * _WINDOW * math.ceil(n / (2 * _WINDOW)) for n in patch)  # in voxels
    parameters = 31_500 * feature_size**2 + 700 * feature_size + 200_000
    if checkpointing:
        attention = 1690 * tokens + 3 * feature_size * voxels
        convolutions = 260 * tokens + 38.5 * feature_size * voxels
        loss = (34 * feature_size + 24 * labels) * voxels
        # two bytes more a parameter: its copy in half precision
        return (max(attention, convolutions, loss) + 18 * parameters) / 1e9
    kept = 2015 * tokens + (100 * feature_size - 375 + 24 * (labels - 14)) * voxels
    return (kept + 16 * parameters) / 1e9


def _trainable(patch: Sequence[int]) -> bool:
    """The deepest map is normalised over its voxels, so it needs two."""
    return math.prod(n // STRIDE for n in patch) > 1


def _smaller(patch: Sequence[int], spacing: Sequence[float]) -> list[int] | None:
    """One multiple less on the axis with the most voxels, of equal ones the longest in mm; None below the smallest patch."""
    axis = max(range(3), key=lambda a: (patch[a], patch[a] * spacing[a]))
    smaller = [n - STRIDE if a == axis else n for a, n in enumerate(patch)]
    return smaller if min(smaller) > 0 and _trainable(smaller) else None


def _whole(numbers: Sequence[float]) -> list[int]:
    return [round(n) for n in numbers]
