"""The names of the U-Nets of dynamic-network-architectures, and their architecture read off the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_UNET = "dynamic_network_architectures.architectures.unet"
_NORM = re.compile(r"\.norm\.weight$")
_ALIAS = re.compile(r"\.all_modules\.(\d+)\.")


def unet_name(name: str, *, decoder: bool) -> str:
    """A tensor's one name: relative to the whole network with `decoder`, else to the encoder; `!reason` if not taken.

    These networks register each layer as `conv` and `norm` and again in `all_modules`, and the encoder again in the
    decoder. `all_modules` also holds layers without weights, so its second entry is the norm unless there is dropout,
    which has no weights.
    """
    if name.startswith("decoder.encoder."):
        name = name[len("decoder.") :]
    if match := _ALIAS.search(name):
        layer = "conv" if match.group(1) == "0" else "norm"
        name = f"{name[: match.start()]}.{layer}.{name[match.end() :]}"
    if name.startswith(("stem.", "stages.")):
        name = f"encoder.{name}"
    if name.startswith("encoder."):
        return name if decoder else name[len("encoder.") :]
    if name.startswith(("decoder.seg_layers.", "decoder.seg_layer.", "seg_layers.")):
        return "!output layer for the classes of the file"
    if name.startswith("decoder."):
        return name if decoder else "!decoder"
    return "!no part of the U-Net"


def unet_architecture(encoder: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The plan's `architecture` entry for an encoder of a plain or residual U-Net, from its shapes; None if it is none.

    Strides leave no trace in the shapes: 2 along every axis whose kernels are larger than 1 is taken, as nnU-Net does
    for isotropic data. Affine instance norms and leaky ReLU, nnU-Net's own choice, are taken for granted too.
    """
    plain = _units(encoder, r"stages\.(\d+)\.0\.convs\.(\d+)\.conv\.weight")
    residual = _units(encoder, r"stages\.(\d+)\.blocks\.(\d+)\.conv1\.conv\.weight")
    units = residual or plain
    if not units or sorted(units) != list(range(len(units))) or bool(plain) == bool(residual):
        return None
    first = [stage[0] for _, stage in sorted(units.items())]
    dims = first[0].ndim - 2
    if dims not in (2, 3):
        return None
    kernels = [list(kernel.shape[2:]) for kernel in first]
    arguments: dict[str, Any] = {
        "n_stages": len(first),
        "features_per_stage": [int(kernel.shape[0]) for kernel in first],
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": kernels,
        "strides": [[1] * dims, *([2 if k > 1 else 1 for k in kernel] for kernel in kernels[1:])],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": [len(stage) for _, stage in sorted(units.items())],
        "n_conv_per_stage_decoder": [1 if residual else 2] * (len(first) - 1),
        "conv_bias": any(name.endswith("conv.bias") for name in encoder),
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": any(_NORM.search(name) for name in encoder)},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": f"{_UNET}.{'ResidualEncoderUNet' if residual else 'PlainConvUNet'}",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def input_kernel(encoder: Mapping[str, Tensor]) -> Tensor:
    """The first convolution of an encoder: (features, channels, *kernel)."""
    for name in ("stem.convs.0.conv.weight", "stages.0.0.convs.0.conv.weight"):
        if name in encoder:
            return encoder[name]
    return next(tensor for tensor in encoder.values() if tensor.ndim >= 4)


def _units(encoder: Mapping[str, Tensor], pattern: str) -> dict[int, list[Tensor]]:
    """First kernels of the blocks (or all convolutions) of each stage, in order."""
    found: dict[int, dict[int, Tensor]] = {}
    for name, tensor in encoder.items():
        if match := re.fullmatch(pattern, name):
            found.setdefault(int(match.group(1)), {})[int(match.group(2))] = tensor
    return {stage: [kernels[i] for i in sorted(kernels)] for stage, kernels in found.items()}
