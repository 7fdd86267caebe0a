"""Checkpoints of nnssl, the OpenMind models among them (arXiv:2412.17041), and bare U-Net encoders read off their shapes.

Layout: MIC-DKFZ/nnssl, src/nnssl/adaptation_planning/adaptation_plan.py; presets: src/nnssl/architectures/
architecture_registry.py and dynamic_network_architectures.architectures.primus. Of the file's plan only what is named here
is read: nnssl also stores paths and subject names of its training images, which are nobody's business downstream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from planners.errors import PretrainedMismatch
from planners.intensity import IntensityScheme
from pretrain.importers import primus
from pretrain.importers.contents import Contents
from pretrain.importers.unet import input_kernel, unet_architecture, unet_name
from pretrain.importers.weights import Weights
from pretrain.networks.registry import check_architecture

_UNET = "dynamic_network_architectures.architectures.unet"
_IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]
_RESENC_L: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}

# Words of a trainer's name, and the method they mean; the first that is there counts.
_METHODS = (
    ("spark", "spark"),
    ("simmim", "simmim"),
    ("mae", "mae"),
    ("voco", "voco"),
    ("simclr", "simclr"),
    ("swinunetr", "swin-ssl"),
    ("volumefusion", "volume-fusion"),
    ("genesis", "models-genesis"),
    ("pclr", "pcrlv2"),
    ("gvsl", "gvsl"),
)
_LICENCE = "not stated in the file; the nnssl repository: CC-BY-SA-4.0"


def recognise(contents: Contents) -> Weights | None:
    """A checkpoint with nnssl's adaptation plan (in the file, or `adaptation_plan.json` beside it); None without.

    Raises UnsafeFile for a network outside the table, PretrainedMismatch for a plan that contradicts the tensors.
    """
    plan = contents.extra.get("nnssl_adaptation_plan")
    if not isinstance(plan, Mapping):
        return None
    try:
        return _described(contents, plan)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise PretrainedMismatch(
            "The adaptation plan of this nnssl checkpoint is not complete",
            where=contents.path,
            found=f"{type(error).__name__}: {error}",
            remedy="download the checkpoint and its adaptation_plan.json again",
        ) from error


def recognise_bare(contents: Contents) -> Weights | None:
    """The encoder of a plain or residual U-Net without any plan: sizes from the shapes, the rest as nnU-Net has it."""
    tensors, dropped = contents.select(lambda name: unet_name(name, decoder=False))
    architecture = unet_architecture(tensors)
    if architecture is None:
        return None
    first = input_kernel(tensors)
    return Weights(
        name=contents.name,
        kind=f"{architecture['network_class_name'].rpartition('.')[2]} encoder without a plan, read off its shapes",
        method=_method(contents.extra.get("trainer_name")),
        architecture=architecture,
        tensors=tensors,
        scope="encoder",
        channels=int(first.shape[1]),
        spatial_dims=first.ndim - 2,
        sha256=contents.sha256,
        dropped=dropped,
        warnings=("Spacing, patch and intensities of its training are not known; strides are guessed",),
    )


def _described(contents: Contents, plan: Mapping[str, Any]) -> Weights:
    encoder, stem = str(plan["key_to_encoder"]), str(plan["key_to_stem"])
    parent = encoder.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""

    def keep(name: str) -> str:
        if not name.startswith((f"{encoder}.", f"{stem}.")):
            return "!no part of the encoder: its head, projector or decoder"
        short = name.removeprefix(prefix)
        return unet_name(short, decoder=False) if short.startswith(("stages.", "stem.")) else short

    tensors, dropped = contents.select(keep)
    if not tensors:
        raise PretrainedMismatch(
            "The adaptation plan names tensors that the checkpoint does not have",
            where=contents.path,
            found=f"nothing under {encoder} or {stem}",
        )
    used = _configuration(plan, contents)
    network = str(plan["architecture_plans"]["arch_class_name"])
    trainer = contents.extra.get("trainer_name") or plan.get("trainer_name")
    warnings: list[str] = []
    if network in primus.SIZES:
        architecture = _primus_architecture(network, tensors, used)
        if _method(trainer) != "simmim":  # its module counts tokens as Primus does
            tensors = _in_order_of_primus(tensors, architecture, warnings)
    else:
        architecture = _unet_architecture(network, plan["architecture_plans"].get("arch_kwargs"))
    check_architecture(architecture)
    if network == "NoSkipResEncL":
        warnings.append("Pretrained without skip connections: the finer stages learned only through the deepest one")
    patch = plan.get("recommended_downstream_patchsize") or used.get("patch_size")
    spacing = used.get("spacing")
    dataset = str(plan["pretrain_plan"].get("dataset_name", "")) or None
    first = input_kernel(tensors)
    return Weights(
        name=contents.name,
        kind=f"nnssl {network} encoder" + (f" ({trainer})" if isinstance(trainer, str) else ""),
        method=_method(trainer),
        architecture=architecture,
        tensors=tensors,
        scope="encoder",
        channels=int(first.shape[1]),
        spatial_dims=first.ndim - 2,
        sha256=contents.sha256,
        patch_size=tuple(int(n) for n in patch) if patch else None,
        spacing=tuple(float(s) for s in spacing) if spacing else None,
        intensity=_intensity(used, int(first.shape[1])),
        modality="MR" if dataset and ("openmind" in dataset.lower() or "openneuro" in dataset.lower()) else None,
        licence=_LICENCE,
        citation=_citation(contents.extra.get("citations")),
        trained_on=dataset,
        dropped=dropped,
        warnings=tuple(warnings),
        position_grids=_grids(architecture, tensors),
    )


def _unet_architecture(network: str, arguments: Any) -> dict[str, Any]:
    if network in ("ResEncL", "NoSkipResEncL"):
        return {
            "network_class_name": f"{_UNET}.ResidualEncoderUNet",
            "arch_kwargs": dict(_RESENC_L),
            "_kw_requires_import": list(_IMPORTED),
        }
    given = {key: arguments[key] for key in _RESENC_L if key in arguments}
    if network == "PlainConvUNet":
        given["n_conv_per_stage"] = given.pop("n_blocks_per_stage")
    path = f"{_UNET}.{network}" if network in ("PlainConvUNet", "ResidualEncoderUNet") else network
    return {"network_class_name": path, "arch_kwargs": given, "_kw_requires_import": list(_IMPORTED)}


def _primus_architecture(network: str, tensors: Mapping[str, Tensor], used: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes from the tensors, except the number of heads, which leaves no trace in them."""
    kernel = tensors["down_projection.proj.weight"]
    blocks = {name.split(".")[2] for name in tensors if name.startswith("eva.blocks.")}
    return {
        "network_class_name": primus.NETWORK,
        "arch_kwargs": {
            "embed_dim": int(kernel.shape[0]),
            "eva_depth": len(blocks),
            "eva_numheads": primus.SIZES[network]["eva_numheads"],
            "patch_embed_size": [int(n) for n in kernel.shape[2:]],
            "input_shape": [int(n) for n in used["patch_size"]],
            "init_values": 0.1 if "eva.blocks.0.gamma_1" in tensors else None,
            "scale_attn_inner": "eva.blocks.0.attn.norm.weight" in tensors,
        },
        "_kw_requires_import": [],
    }


def _in_order_of_primus(
    tensors: dict[str, Tensor], architecture: Mapping[str, Any], warnings: list[str]
) -> dict[str, Tensor]:
    """The same network with tokens counted along (z, y, x).

    nnssl's own module counts them along (y, z, x), so there the table of positions and the rotary positions of the first
    two axes change places. Here the table is turned, and so are the channels of queries and keys that are rotated by these
    two axes: thirds of each head, one for each axis. Attention sums over the channels, so the features stay the same.
    """
    grid = primus.position_grids(architecture)["eva.pos_embed"]
    heads = architecture["arch_kwargs"]["eva_numheads"]
    if len(set(grid)) != 1:
        warnings.append(
            f"The tokens of a grid that is no cube {grid} are ordered differently in nnssl; they were not turned"
        )
        return tensors
    turned = dict(tensors)
    table = tensors.get("eva.pos_embed")
    if table is not None and table.shape[1] == math.prod(grid):
        turned["eva.pos_embed"] = table.unflatten(1, grid).transpose(1, 2).flatten(1, 3).contiguous()
    for name, tensor in tensors.items():
        if ".attn.q_proj." in name or ".attn.k_proj." in name:
            first, second, third = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
            turned[name] = torch.stack([second, first, third], 1).flatten(0, 2)
    return turned


def _grids(architecture: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: grid for name, grid in primus.position_grids(architecture).items() if name in tensors}


def _configuration(plan: Mapping[str, Any], contents: Contents) -> Mapping[str, Any]:
    """The configuration that was pretrained with; nnssl stores the one, as a rule."""
    every = plan["pretrain_plan"]["configurations"]
    if "spacing" in every:
        return every
    arguments = contents.extra.get("init_args")
    asked = arguments.get("configuration_name") if isinstance(arguments, Mapping) else None
    return every[asked] if asked in every else next(iter(every.values()))


def _intensity(used: Mapping[str, Any], channels: int) -> tuple[IntensityScheme, ...] | None:
    names = list(used.get("normalization_schemes") or [])
    if set(names) != {"ZScoreNormalization"}:
        return None
    mask = used.get("use_mask_for_norm")
    masked = bool(mask[0] if isinstance(mask, list) and mask else mask)
    return (IntensityScheme("zscore-masked" if masked else "zscore", "the plan in the file"),) * channels


def _method(trainer: object) -> str:
    name = str(trainer or "").lower()
    return next((method for word, method in _METHODS if word in name), "unknown")


def _citation(citations: Any) -> str | None:
    found = []
    for entry in citations if isinstance(citations, list) else []:
        if isinstance(entry, Mapping):
            texts = entry.get("apa_citations") or entry.get("bibtex_citations") or entry.get("name")
            found += [str(text)[:400] for text in (texts if isinstance(texts, list) else [texts]) if text]
    return "; ".join(found) or "Wald et al.: OpenMind (arXiv:2412.17041)"
