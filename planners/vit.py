"""Resolution, patch, batch and memory of MedDINOv3's segmentation network, whose tokens of 16 pixels need enlarged slices.

Source: MedDINOv3 (arXiv:2509.02379; ricklisz/MedDINOv3), which trains on 896 × 896 pixels of what nnU-Net's 2d patch shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from planners.budget import gpu_memory_gb, is_small, label_count
from planners.decisions import Choice, times
from planners.errors import PlanError
from planners.files import content_hash

NETWORK = "pretrain.networks.MedDINOv3"
TOKEN = 16
"""Both sides of a patch are multiples of it."""
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
"""The size in the name of a configuration → the transformer; base is the published one."""
_LAST = "last"
SIZE_NAMES = (*SIZES, _LAST, *(f"{size}_{_LAST}" for size in SIZES))
"""What may follow `2d_vit_`; with `last` the decoder sees the last block alone, as in the paper's ablation."""
_FOR_A_CPU = {"embed_dim": 96, "depth": 4, "num_heads": 3}
_LONG_SIDE, _SHORT_SIDE = 896, 224
_LARGEST_FACTOR = 4
_TOKENS, _SMALL_TOKENS = 56 * 56, 28 * 14
_BATCH, _LARGEST_BATCH = 2, 12
_DROP_PATH = 0.2


def arguments_of_size(plan: Mapping, size: str | None) -> dict[str, Any]:
    """The network of a size (of `SIZE_NAMES`); without one base, and in the small plan one that a CPU trains in minutes."""
    parts = size.split("_") if size else []
    usual = _FOR_A_CPU if is_small(plan) else SIZES["base"]
    transformer = SIZES.get(parts[0], usual) if parts else usual
    arguments = released_arguments(transformer)
    return arguments | {"taken": [transformer["depth"] - 1]} if _LAST in parts else arguments


def released_arguments(transformer: Mapping[str, int]) -> dict[str, Any]:
    """The network's arguments for one of that width, depth and number of heads, as Meta released its own."""
    return {
        **transformer,
        "taken": None,
        "eps": 1e-5,
        "qkv_bias": False,
        "drop_path": _DROP_PATH,
    }


def choose_vit(plan: Mapping, parent: Mapping, arguments: Mapping[str, Any]) -> Choice:
    """Patch, its spacing, batch and network.

    The patch shows what that of `parent` shows, with more pixels: at most 4 times as many a side and 896 on the longer one, but
    at least 224 on the shorter one; in the small plan 224 on the shorter one. Fewer where the memory does not suffice.

    Args:
        parent: the resolved configuration whose field of view is taken, in 2d.
        arguments: of the network, without `use_checkpoint`.

    Raises PlanError when the plan's memory does not suffice for the smallest patch.
    """
    small, memory = is_small(plan), gpu_memory_gb(plan)
    shown = parent["patch_size"]
    factor = _SHORT_SIDE / min(shown)
    if not small:
        factor = max(min(_LONG_SIDE / max(shown), _LARGEST_FACTOR), factor)

    def size(patch: Sequence[int], batch: int) -> float:
        return training_gb(patch, arguments, batch, labels=label_count(plan), half=not small)

    most = _SMALL_TOKENS if small else _TOKENS
    wanted = patch = _enlarged(shown, factor)
    while _count(patch) > most or size(patch, _BATCH) > memory:
        if max(patch) == TOKEN:
            width = arguments["embed_dim"]
            raise PlanError(
                f"MedDINOv3 with {width} features a token cannot be trained in the memory the plan is made for",
                found=f"about {size(patch, _BATCH):.1f} GB with the smallest patch, {times(patch)}, and batch {_BATCH}",
                expected=f"at most {memory:g} GB",
                remedy=f"plan for more (--gpu-memory {math.ceil(size(patch, _BATCH))}), or a smaller network (2d_vit_small)",
            )
        factor = (max(patch) - TOKEN) / max(shown)
        patch = _enlarged(shown, factor)
    batches = 1 if small else max(1, min(_LARGEST_BATCH, parent["batch_size"]) - _BATCH + 1)
    batch = max(b for b in range(_BATCH, _BATCH + batches) if b == _BATCH or size(patch, b) <= memory)
    # Exact on each axis, so that the patch shows the same although its sides are rounded.
    spacing = [s * n / p for s, n, p in zip(parent["spacing"], shown, patch, strict=True)]
    because = f"what {times(list(shown))} pixels of 2d show, in multiples of {TOKEN}, {factor:.2f} times as many"
    if patch != wanted:
        because += f"; {times(wanted)} would be too many for {'a CPU' if small else f'{memory:g} GB or {most} tokens'}"
    return Choice(
        patch_size=patch,
        batch_size=batch,
        architecture={
            "network_class_name": NETWORK,
            "arch_kwargs": {**arguments, "use_checkpoint": not small},
            "_kw_requires_import": [],
        },
        strides=[[TOKEN, TOKEN]],
        alike=True,
        patch_because=f"{because}; about {size(patch, batch):.1f} GB (an estimate, not measured on a GPU)",
        batch_because="smallest batch nnU-Net trains with"
        if small
        else f"what fits into {memory:g} GB, at least {_BATCH}",
        network=f"MedDINOv3, {arguments['depth']} blocks of {arguments['embed_dim']} features",
        network_because=("small enough for a CPU" if small else f"tokens of {TOKEN}×{TOKEN} pixels")
        + f"; no deep supervision, {'without' if small else 'with'} gradient checkpointing",
        network_change="-c 2d_vit_SIZE",
        spacing=spacing,
        spacing_because=f"from {times([float(s) for s in parent['spacing']])} of 2d: the patch shows the same with more pixels",
    )


def own_data(choice: Choice, parent: Mapping) -> dict[str, Any]:
    """The entries of a configuration whose spacing is not its parent's: its data are others."""
    spacing = [float(s) for s in choice.spacing or parent["spacing"]]
    content = {"parent": parent["data_identifier"], "spacing": [round(s, 6) for s in spacing]}
    sizes = zip(parent["median_image_size_in_voxels"], parent["spacing"], spacing, strict=True)
    return {
        "data_identifier": f"autoseg_{content_hash(content)[:8]}_2d_vit",
        "spacing": spacing,
        "median_image_size_in_voxels": [n * old / new for n, old, new in sizes],
    }


def _enlarged(patch: Sequence[int], factor: float) -> list[int]:
    return [max(TOKEN, round(n * factor / TOKEN) * TOKEN) for n in patch]


def _count(patch: Sequence[int]) -> int:
    return math.prod(patch) // TOKEN**2


def training_gb(
    patch: Sequence[int], arguments: Mapping[str, Any], batch: int, *, half: bool, labels: int = 14
) -> float:
    """Memory of a training step in GB (10⁹ bytes): weights, gradients, AdamW's two averages, and all that lives at the peak.

    Counted by hand, but for a block of the transformer, which is what was measured of the same block in Primus
    (`planners.foreign.primus_training_gb`). Compared with torch's memory tracker on fake tensors, that is without a GPU, the
    formula gives 0 % to +12 %: base on 896×896 (batch 2) and 640×320 (batch 4), small on 512×512 with 40 labels, in bfloat16,
    and tiny on 224×224 in float32. Not counted: what CUDA and cuDNN take for themselves, and fragments.

    Args:
        half: in bfloat16 with the two finest stages checkpointed image by image, else in float32 with everything kept.
    """
    width, depth = arguments["embed_dim"], arguments["depth"]
    channels = width * (4 if arguments["taken"] is None else len(arguments["taken"]))
    tokens, pixels = _count(patch), math.prod(patch)
    stages = [(channels >> n) * tokens * 4**n for n in range(1, 5)]
    # What a stage keeps of each number: what norm, activation and the next convolution are given. Under autocast the first two
    # are in single precision.
    blocks, kept, bytes_of_a_weight = (59, 10, 18) if half else (101, 12, 16)
    activations = blocks * tokens * width * depth + kept * sum(stages[:2] if half else stages)
    finest = kept * sum(stages[2:]) + 2 * stages[3] if half else 4 * stages[3] * batch
    peak = max(finest, 24 * labels * pixels * batch)
    parameters = 12 * depth * width**2 + 2.66 * channels**2
    return (batch * activations + peak + bytes_of_a_weight * parameters) / 1e9
