"""The exact literal table of networks and layers a plan may name.

nnU-Net imports whatever dotted path a plan contains, and `torch.nn.functional.torch.hub.os.system` is such a path: a
list of allowed prefixes would not protect. Here a string is looked up as a whole; what is not in the table is refused
before anything is imported. Strings found are replaced by the path of today, so that plans of older versions build.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from planners.errors import PlanError, UnsafeFile

_UNET = "dynamic_network_architectures.architectures.unet"

NETWORKS: dict[str, str] = {
    f"{_UNET}.PlainConvUNet": f"{_UNET}.PlainConvUNet",
    f"{_UNET}.ResidualEncoderUNet": f"{_UNET}.ResidualEncoderUNet",
    f"{_UNET}.ResidualUNet": f"{_UNET}.ResidualUNet",
    # where dynamic-network-architectures kept it before 0.2; nnU-Net still writes it when it converts old plans
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": f"{_UNET}.ResidualEncoderUNet",
    "pretrain.networks.SwinUNETR": "pretrain.networks.SwinUNETR",
    "pretrain.networks.Primus": "pretrain.networks.Primus",
    "pretrain.networks.PCRLUNet": "pretrain.networks.PCRLUNet",
    "pretrain.networks.PUMIT": "pretrain.networks.PUMIT",
    "pretrain.networks.MedDINOv3": "pretrain.networks.MedDINOv3",
}

_ONE_OUTPUT = (
    "pretrain.networks.SwinUNETR",
    "pretrain.networks.Primus",
    "pretrain.networks.PCRLUNet",
    "pretrain.networks.MedDINOv3",
)

_LAYER_MODULES: dict[str, tuple[str, ...]] = {
    "conv": ("Conv2d", "Conv3d"),
    "instancenorm": ("InstanceNorm2d", "InstanceNorm3d"),
    "batchnorm": ("BatchNorm2d", "BatchNorm3d"),
    "dropout": ("Dropout", "Dropout2d", "Dropout3d"),
    "activation": ("ReLU", "LeakyReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish"),
}


def _both_spellings(*modules: str) -> dict[str, str]:
    return {
        spelling: f"torch.nn.{name}"
        for module in modules
        for name in _LAYER_MODULES[module]
        for spelling in (f"torch.nn.{name}", f"torch.nn.modules.{module}.{name}")
    }


LAYERS: dict[str, dict[str, str]] = {
    "conv_op": _both_spellings("conv"),
    "norm_op": _both_spellings("instancenorm", "batchnorm"),
    "dropout_op": _both_spellings("dropout"),
    "nonlin": _both_spellings("activation"),
}
"""Argument of a network -> the strings it may hold -> the class each stands for."""


def check_architecture(architecture: dict) -> None:
    """Refuse an architecture (a plan's `architecture` entry) that names anything outside the tables.

    Nothing is imported or run. Raises UnsafeFile for a name outside the tables, PlanError when an entry is missing.
    """
    try:
        network, arguments, imported = (
            architecture[key] for key in ("network_class_name", "arch_kwargs", "_kw_requires_import")
        )
    except (KeyError, TypeError) as error:
        raise PlanError(
            "The plan does not describe a network",
            found=f"no entry {error}",
            expected="architecture: {network_class_name, arch_kwargs, _kw_requires_import}",
            remedy="plan again with `autoseg plan_and_preprocess`",
        ) from error
    if not isinstance(network, str) or network not in NETWORKS:
        raise _refusal("network_class_name", network, NETWORKS)
    for argument in imported:
        if argument not in LAYERS:
            raise _refusal("_kw_requires_import", argument, LAYERS)
        value = arguments.get(argument)
        if value is not None and (not isinstance(value, str) or value not in LAYERS[argument]):
            raise _refusal(f"arch_kwargs.{argument}", value, LAYERS[argument])


def has_deep_supervision(architecture: dict) -> bool:
    """Whether the network of an architecture can return an output for each stage of its decoder."""
    return architecture["network_class_name"] not in _ONE_OUTPUT


def build_network(
    architecture: dict,
    input_channels: int,
    output_channels: int,
    *,
    deep_supervision: bool,
    initialise: bool = True,
) -> nn.Module:
    """The network of a plan's `architecture` entry, as nnU-Net builds it, after `check_architecture`."""
    check_architecture(architecture)
    # Imported late: it brings torch._dynamo and friends, which the check must not depend on.
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    arguments: dict[str, Any] = dict(architecture["arch_kwargs"])
    for argument in architecture["_kw_requires_import"]:
        if arguments.get(argument) is not None:
            arguments[argument] = LAYERS[argument][arguments[argument]]
    with _NumbersInMemory():
        return get_network_from_plans(
            NETWORKS[architecture["network_class_name"]],
            arguments,
            architecture["_kw_requires_import"],
            input_channels,
            output_channels,
            allow_init=initialise,
            deep_supervision=deep_supervision,
        )


class _NumbersInMemory(TorchFunctionMode):
    """Lets transformers be built on the meta device: they take their rates of dropped paths out of a `linspace`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def _refusal(entry: str, found: object, allowed: dict[str, Any]) -> UnsafeFile:
    return UnsafeFile(
        "The plan names a class that is not in the table of networks and layers; nothing was imported",
        where=f"architecture.{entry}",
        found=repr(found),
        expected=", ".join(allowed),
        remedy="use plans of nnU-Net or autoseg; do not use a file from a source you do not trust",
    )
