"""VoCo (arXiv:2402.17300, arXiv:2410.09890): the encoders, VoComni's whole SwinUNETR, and VoComni for nnU-Net.

Layouts: Luffy03/Large-Scale-Medical, Self-supervised/models/voco_head.py and README.md. Windows and spacing:
Self-supervised/utils/data_trans.py; region of interest for fine-tuning: Downstream/monai/BTCV/main.py.
"""

from __future__ import annotations

from typing import Any

from planners.intensity import WINDOWS, IntensityScheme
from pretrain.importers.contents import Contents
from pretrain.importers.swin import is_swin, swin_architecture, swin_input, swin_name
from pretrain.importers.unet import input_kernel, unet_architecture, unet_name
from pretrain.importers.weights import Weights

_10K = "de4160dc52436e2e437a4c0293822e5fd644f4858738aa14995866a2617fedcd"
_CLASSES = 21
_LICENCE = "Apache-2.0 (huggingface.co/Luffy503/VoCo; for VoCo_10k only its code states it)"
_CITATION = "Wu, Zhuang, Chen: VoCo, CVPR 2024 (arXiv:2402.17300); TPAMI 2026 (arXiv:2410.09890)"
_LEAK = (
    "The pretraining scans are public CT data sets, among them BTCV, TotalSegmentator, FLARE23, LiTS, KiTS and MSD pancreas "
    "(Luffy03/Large-Scale-Medical:Self-supervised/jsons): results on their public test images are not results on unseen images"
)
_160K = "PreCT-160K, public CT of abdomen, chest and head-neck"
_UNET_SHAPE = ([32, 64, 128, 256, 320, 320], [2, 2, 2, 2, 2, 2])


def recognise(contents: Contents) -> Weights | None:
    """An encoder (or training dump) of VoCo, VoComni's SwinUNETR or VoComni's U-Net; None for anything else."""
    if is_swin(contents.tensors) and any(
        swin_name(n, decoder=False).startswith("encoder10.") for n in contents.tensors
    ):
        return _swin(contents)
    return _unet(contents)


def _swin(contents: Contents) -> Weights | None:
    outputs = contents.tensors.get("out.conv.conv.weight")
    omni = outputs is not None
    tensors, dropped = contents.select(lambda name: swin_name(name, decoder=omni))
    architecture = swin_architecture(tensors)
    if outputs is not None and (outputs.shape[0] != _CLASSES or not architecture["arch_kwargs"]["use_v2"]):
        return None  # somebody else's SwinUNETR
    if outputs is None and any(name.startswith("decoder") for name in contents.tensors):
        return None
    channels, dims = swin_input(tensors)
    warnings = [_LEAK]
    if contents.branch:
        warnings.append(f"The file is a training dump of two networks; the {contents.branch} is taken")
    return Weights(
        name=contents.name,
        kind=f"{'VoComni SwinUNETR' if omni else 'VoCo SwinUNETR encoder'}, feature size "
        f"{architecture['arch_kwargs']['feature_size']}{' (VoCo_10k)' if contents.sha256 == _10K else ''}",
        method="vocomni" if omni else "voco",
        architecture=architecture,
        tensors=tensors,
        scope="encoder+decoder" if omni else "encoder",
        channels=channels,
        spatial_dims=dims,
        sha256=contents.sha256,
        patch_size=(96,) * dims,
        spacing=(1.5,) * dims,
        intensity=(_window(),) * channels,
        modality="CT",
        licence=_LICENCE,
        citation=_CITATION,
        trained_on=f"10,000 public CT scans (VoCo_10k) or {_160K} (VoCo_B, L, H)"
        if not omni
        else f"{_160K}, and 20,000 of them with labels of {_CLASSES - 1} organs and tumours (VoComni)",
        dropped=dropped,
        warnings=tuple(warnings),
    )


def _unet(contents: Contents) -> Weights | None:
    tensors, dropped = contents.select(lambda name: unet_name(name, decoder=False))
    architecture = unet_architecture(tensors)
    if architecture is None or not architecture["network_class_name"].endswith("PlainConvUNet"):
        return None
    arguments: dict[str, Any] = architecture["arch_kwargs"]
    outputs = {t.shape[0] for name, t in contents.tensors.items() if name.startswith("decoder.seg_layers.")}
    shape = (arguments["features_per_stage"], arguments["n_conv_per_stage"])
    if shape != _UNET_SHAPE or outputs != {_CLASSES}:
        return None
    first = input_kernel(tensors)
    arguments["strides"][-1] = [1, 2, 2]  # as in the published plan
    return Weights(
        name=contents.name,
        kind="VoComni PlainConvUNet encoder for nnU-Net",
        method="vocomni",
        architecture=architecture,
        tensors=tensors,
        scope="encoder",
        channels=int(first.shape[1]),
        spatial_dims=first.ndim - 2,
        sha256=contents.sha256,
        patch_size=(80, 160, 160),
        spacing=(1.5, 0.781, 0.782),
        intensity=(_window(),),
        modality="CT",
        licence=_LICENCE,
        citation=_CITATION,
        trained_on="20,000 public CT scans with labels of 20 organs and tumours (VoComni)",
        dropped=dropped,
        warnings=(
            _LEAK,
            "Only the encoder is taken: the published plan ends in strides [1, 2, 2], the file was made with [2, 2, 2], so "
            "the first layers of its decoder may never have been trained",
            "The intensities of the published plan are corrupt (they map CT to about [-0.009, 0.002]), so it is not known "
            "which scale the weights expect: try [-175, 250] to [0, 1] on a validation case before trusting them",
        ),
    )


def _window() -> IntensityScheme:
    return IntensityScheme("ct-abdomen", "the window the weights were trained with", WINDOWS["ct-abdomen"])
