"""PCRL and PCRLv2 (arXiv:2109.04379, arXiv:2301.00772): the encoder of the published 3D U-Net.

Layout: RL4M/PCRLv2 (branches `main` and `finetune`), Luchixiang/PCRL, both after Models Genesis, whose files are the same but
for the heads. All of them train on arrays with the axes (x, y, z) (RL4M/PCRLv2:luna_preprocess.py,
MrGiovanni/ModelsGenesis:infinite_generator_3D.py), so kernels are turned to (z, y, x). PCRL's files also hold the options of
their training (`opt`), an optimiser, heads, and a decoder without skips, which is of no use for segmentation: the authors take
`down_tr*` too.
The 2D files hold a ResNet-18, which autoseg does not have.
"""

from __future__ import annotations

import re
from typing import Any

from planners.errors import PretrainedMismatch
from planners.intensity import IntensityScheme
from pretrain.importers.contents import Contents
from pretrain.importers.weights import Weights

_ENCODER = re.compile(r"down_tr(?:64|128|256|512)\.ops\.[01]\.(?:conv1|bn1)\.\w+$")
_FIRST = "down_tr64.ops.1.conv1.weight"
_RESNET = re.compile(r"(?:model\.)?encoder\.layer[1-4]\.[01]\.conv[12]\.weight$")
_V1 = re.compile(r"aug_fc1\.")
_V2 = re.compile(r"up_tr\d+\.predictor_head\.")


def recognise(contents: Contents) -> Weights | None:
    """The encoder of a 3D file of PCRL or PCRLv2, or of one with their layout; None for anything else.

    Raises PretrainedMismatch for a 2D file or another ResNet-18 of its layout, naming the network.
    """
    if any(_RESNET.match(name) for name in contents.tensors):
        raise _residual_2d(contents)
    if _FIRST not in contents.tensors:
        return None
    tensors, dropped = contents.select(lambda name: name if _ENCODER.match(name) else _reason(name))
    channels = int(tensors["down_tr64.ops.0.conv1.weight"].shape[1])
    return Weights(
        name=contents.name,
        architecture={
            "network_class_name": "pretrain.networks.PCRLUNet",
            "arch_kwargs": {"width": int(tensors[_FIRST].shape[0])},
            "_kw_requires_import": [],
        },
        tensors={name: t.transpose(2, 4).contiguous() if t.ndim == 5 else t for name, t in tensors.items()},
        scope="encoder",
        channels=channels,
        spatial_dims=3,
        sha256=contents.sha256,
        dropped=dropped,
        **_origin(contents, channels),
    )


def _origin(contents: Contents, channels: int) -> dict[str, Any]:
    """Whose weights these are, by the heads that only PCRL's files have, and what follows from that."""
    second = any(_V2.match(name) for name in contents.tensors)
    if not second and not any(_V1.match(name) for name in contents.tensors):
        return {
            "kind": "3D U-Net encoder with the layout of Models Genesis and PCRL",
            "method": "unknown",
            "warnings": (
                "The heads that would tell its training are missing: spacing, patch and intensities are not known",
                "Its kernels are taken to see (x, y, z), as those of Models Genesis and PCRL do",
                "Only the encoder is taken",
            ),
        }
    return {
        "kind": f"PCRL{'v2' if second else ''} U-Net encoder",
        "method": "pcrlv2" if second else "pcrl",
        "patch_size": (32, 64, 64),
        "spacing": (1.0, 1.0, 1.0),
        "intensity": (IntensityScheme("ct:-1000,1000", "as the authors train", (-1000.0, 1000.0)),) * channels,
        "modality": "CT",
        "licence": "MIT (RL4M/PCRLv2)" if second else "not stated (Luchixiang/PCRL has none)",
        "citation": "Zhou et al.: PCRL, ICCV 2021 (arXiv:2109.04379); PCRLv2, TPAMI 2023 (arXiv:2301.00772)",
        "trained_on": "623 CT of LUNA16 (the published file)",
        "warnings": (
            "If this is the published file, it was trained on folds 0 to 6 of LUNA16: results there are not on unseen images",
            "Only the encoder is taken; the published decoder has no skips",
        ),
    }


def _reason(name: str) -> str:
    if name.startswith(("up_tr", "out_tr")) and ".predictor_head." not in name:
        return "!decoder"
    return "!head of the pretraining"


def _residual_2d(contents: Contents) -> PretrainedMismatch:
    return PretrainedMismatch(
        "autoseg has no network for these weights, which have the layout of PCRL's 2D files",
        where=contents.path,
        found="a ResNet-18 of segmentation_models_pytorch (X-ray images)",
        expected="the 3D U-Net (down_tr64 … down_tr512)",
        remedy="take the 3D file (LUNA), or pretrain a 2D plan: autoseg pretrain --method pcrl --set pcrl.mode=v2 -c 2d",
    )
