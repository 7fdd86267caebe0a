"""Checkpoints of nnU-Net v2, TotalSegmentator's and our own among them: a trained network to start the next one from."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from planners.errors import AutosegError, PretrainedMismatch
from planners.intensity import IntensityScheme
from pretrain.importers.contents import Contents
from pretrain.importers.swin import NETWORK as SWIN
from pretrain.importers.swin import swin_name
from pretrain.importers.unet import unet_name
from pretrain.importers.weights import Weights
from pretrain.networks.registry import check_architecture

_SCHEMES = {
    "CTNormalization": "ct-percentile",
    "ZScoreNormalization": "zscore",
    "RescaleTo01Normalization": "minmax",
    "RGBTo01Normalization": "rgb",
    "NoNormalization": "none",
}


def recognise(contents: Contents) -> Weights | None:
    """A network trained by nnU-Net, with the plan in the file or in `plans.json`; None for anything else.

    Raises UnsafeFile for a plan that names a network outside the table, PretrainedMismatch for a trainer whose network
    its plan does not describe.
    """
    arguments = contents.extra.get("init_args")
    trainer = contents.extra.get("trainer_name")
    if not isinstance(arguments, Mapping) or not isinstance(trainer, str):
        return None
    plan = arguments.get("plans") if isinstance(arguments.get("plans"), Mapping) else contents.extra.get("plans")
    name = arguments.get("configuration")
    if not isinstance(plan, Mapping) or not isinstance(name, str):
        return None
    configuration, architecture = _configuration(plan, name, contents)
    swin = architecture["network_class_name"] == SWIN
    if not swin and not architecture["network_class_name"].endswith("UNet"):
        raise PretrainedMismatch(
            "This network of nnU-Net cannot be used as a start",
            where=contents.path,
            found=architecture["network_class_name"],
            expected="PlainConvUNet, ResidualEncoderUNet, SwinUNETR",
        )
    rename = swin_name if swin else unet_name
    tensors, dropped = contents.select(lambda tensor: rename(tensor, decoder=True))
    first = next((tensor for tensor in tensors.values() if tensor.ndim >= 4), None)
    if first is None:
        raise PretrainedMismatch("The checkpoint's network is not the one of its plan", found=f"trainer {trainer}")
    fold = contents.extra.get("fold") or arguments.get("fold")
    dataset_json = arguments.get("dataset_json") or contents.extra.get("dataset_json") or {}
    dataset = str(plan.get("dataset_name", "a data set that is not named"))
    short = architecture["network_class_name"].rpartition(".")[2]
    return Weights(
        name=contents.name,
        kind=f"nnU-Net {short}, {name} of {dataset}, {_fold_name(fold)} ({trainer})",
        method="supervised",
        architecture=architecture,
        tensors=tensors,
        scope="encoder+decoder",
        channels=int(first.shape[1]),
        spatial_dims=len(configuration["patch_size"]),
        sha256=contents.sha256,
        patch_size=tuple(int(n) for n in configuration["patch_size"]),
        spacing=tuple(float(s) for s in configuration["spacing"]),
        intensity=_intensity(plan, configuration),
        modality=_modality(dataset_json),
        licence=_text(dataset_json, "licence") or _text(dataset_json, "license"),
        citation="Isensee et al.: nnU-Net (arXiv:1809.10486)",
        trained_on=f"{dataset}, with labels",
        dropped=dropped,
        warnings=(f"Trained with the labels of {dataset}: its cases are not unseen ones",),
    )


def _configuration(plan: Mapping[str, Any], name: str, contents: Contents) -> tuple[dict, dict]:
    """One configuration with what it inherits, and its checked architecture; plans of before 2.4 are converted."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nnU-Net announces the conversion of old plans
            configuration = PlansManager(copy.deepcopy(dict(plan))).get_configuration(name).configuration
        architecture = configuration["architecture"]
        check_architecture(architecture)
        for key in ("patch_size", "spacing", "normalization_schemes"):
            configuration[key]
    except AutosegError:
        raise
    except Exception as error:
        raise PretrainedMismatch(
            "The plan in this checkpoint cannot be used",
            where=contents.path,
            found=f"configuration {name}: {error}",
            expected="a plan of nnU-Net v2 with a PlainConvUNet or ResidualEncoderUNet",
        ) from error
    return configuration, {
        key: architecture[key] for key in ("network_class_name", "arch_kwargs", "_kw_requires_import")
    }


def _intensity(plan: Mapping[str, Any], configuration: Mapping[str, Any]) -> tuple[IntensityScheme, ...] | None:
    names: Sequence[str] = configuration["normalization_schemes"]
    masks = configuration.get("use_mask_for_norm") or [False] * len(names)
    if any(name not in _SCHEMES for name in names) or len(masks) != len(names):
        return None
    return tuple(
        _scheme(name, bool(mask), (plan.get("foreground_intensity_properties_per_channel") or {}).get(str(channel), {}))
        for channel, (name, mask) in enumerate(zip(names, masks, strict=True))
    )


def _scheme(name: str, masked: bool, numbers: Mapping[str, float]) -> IntensityScheme:
    scheme = _SCHEMES[name]
    if scheme == "zscore" and masked:
        scheme = "zscore-masked"
    if scheme != "ct-percentile" or not {"percentile_00_5", "percentile_99_5", "mean", "std"} <= set(numbers):
        return IntensityScheme(scheme, "the plan in the file")
    low, high, mean, std = (float(numbers[key]) for key in ("percentile_00_5", "percentile_99_5", "mean", "std"))
    if (mean, std) == (low, high - low):
        return IntensityScheme(f"ct:{low:g},{high:g}", "the window of the plan in the file", (low, high))
    return IntensityScheme(scheme, f"the plan in the file: [{low:g}, {high:g}], mean {mean:g}, std {std:g}")


def _fold_name(fold: object) -> str:
    return str(fold) if str(fold).startswith("fold_") else f"fold_{fold}"


def _modality(dataset_json: Any) -> str | None:
    if not isinstance(dataset_json, Mapping):
        return None
    channels = dataset_json.get("channel_names") or dataset_json.get("modality")
    return ", ".join(str(value) for value in channels.values())[:80] if isinstance(channels, Mapping) else None


def _text(content: Any, key: str) -> str | None:
    value = content.get(key) if isinstance(content, Mapping) else None
    return value[:200] if isinstance(value, str) else None
