"""SwinUNETR of MONAI beside VoCo's: NVIDIA's self-supervised transformer (`model_swinvit.pt`, arXiv:2111.14791) and
networks trained with labels, such as SuPreM's (arXiv:2501.11253) and the universal model's (arXiv:2301.00785).

Names: `SwinUNETR.load_from` in monai.networks.nets.swin_unetr. Scale and spacing of the pretraining:
Project-MONAI/research-contributions, SwinUNETR/Pretrain/main.py.
"""

from __future__ import annotations

from typing import Any

from planners.intensity import IntensityScheme
from pretrain.importers.contents import Contents
from pretrain.importers.swin import is_swin, swin_architecture, swin_input, swin_name
from pretrain.importers.weights import Weights

_ORGAN_HEADS = ("organ_embedding", "precls_conv.", "GAP.", "controller.", "text_to_vision.")
_PUBLIC_CT = "the training images are public CT data sets, so public test images may be among them"


def recognise(contents: Contents) -> Weights | None:
    """A Swin transformer alone, or a SwinUNETR with its decoder; None for anything else."""
    if not is_swin(contents.tensors):
        return None
    tensors, dropped = contents.select(lambda name: swin_name(name, decoder=True))
    parts = tuple(dict.fromkeys(name.partition(".")[0] for name in tensors))
    channels, dims = swin_input(tensors)
    alone = parts == ("swinViT",)
    described = _transformer(channels, dims) if alone else _network(contents, parts)
    return Weights(
        name=contents.name,
        architecture=swin_architecture(tensors),
        tensors=tensors,
        channels=channels,
        spatial_dims=dims,
        sha256=contents.sha256,
        patch_size=(96,) * dims,
        modality="CT",
        dropped=dropped,
        **described,
    )


def _transformer(channels: int, dims: int) -> dict[str, Any]:
    scheme = IntensityScheme("ct:-1000,1000", "the scale of the published pretraining", (-1000.0, 1000.0))
    return {
        "kind": "Swin transformer of SwinUNETR, self-supervised (MONAI)",
        "method": "swin-ssl",
        "scope": "encoder",
        "part": ("swinViT",),
        "spacing": (2.0, 1.5, 1.5) if dims == 3 else None,
        "intensity": (scheme,) * channels,
        "licence": "MONAI: Apache-2.0; weights: not stated in the file",
        "citation": "Tang et al.: Self-supervised pre-training of Swin transformers, CVPR 2022 (arXiv:2111.14791)",
        "trained_on": "5,050 public CT scans (the published model_swinvit.pt)",
        "warnings": (
            "Only the transformer is in the file; the convolutions of the encoder begin untrained",
            f"If this is the published file, {_PUBLIC_CT}",
        ),
    }


def _network(contents: Contents, parts: tuple[str, ...]) -> dict[str, Any]:
    universal = any(name.startswith(_ORGAN_HEADS) for name in contents.tensors)
    decoder = any(part.startswith("decoder") for part in parts)
    return {
        "kind": f"SwinUNETR {'network' if decoder else 'encoder'}"
        + (" with organ embeddings (SuPreM, CLIP-driven universal model)" if universal else ""),
        "method": "supervised" if decoder else "unknown",
        "scope": "encoder+decoder" if decoder else "encoder",
        "spacing": (1.5, 1.5, 1.5) if universal else None,
        "intensity": (IntensityScheme("ct-abdomen", "as the authors train", (-175.0, 250.0)),) if universal else None,
        "citation": "Li et al.: SuPreM, ICLR 2024 (arXiv:2501.11253); Liu et al.: CLIP-driven universal model, ICCV 2023 "
        "(arXiv:2301.00785)"
        if universal
        else "Hatamizadeh et al.: Swin UNETR (arXiv:2201.01266)",
        "trained_on": "labelled public CT of the abdomen (AbdomenAtlas or 14 data sets)" if universal else None,
        "warnings": (f"These weights were trained with labels; {_PUBLIC_CT}",) if universal else (),
    }
