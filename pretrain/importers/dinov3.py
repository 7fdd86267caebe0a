"""DINOv3's vision transformer (arXiv:2508.10104), as Meta, timm and training runs of facebookresearch/dinov3 write it.

MedDINOv3 (arXiv:2509.02379; ricklisz/MedDINOv3) publishes such a run's teacher. Names: `dinov3/models/vision_transformer.py`,
`dinov3/layers/attention.py` and `dinov3/train/train.py` of the former, huggingface/pytorch-image-models:timm/models/eva.py.

The ε of the layer norms leaves no trace in a file. Meta's released networks have 1e-5 (`layernormbf16` in
`dinov3/hub/backbones.py`), and so has timm; the default of a training run, which MedDINOv3 kept, is 1e-6 (`layernorm`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from planners.errors import PretrainedMismatch
from planners.vit import NETWORK, SIZES, TOKEN, released_arguments
from pretrain.importers.contents import Contents
from pretrain.importers.weights import Named, Weights
from pretrain.networks.dino_vit import STORAGE

_PATCHES, _PERIODS = "patch_embed.proj.weight", "rope_embed.periods"
_TOKENS = {"storage_tokens": "reg_token", "reg_token": "reg_token", "cls_token": "cls_token"}
_SCALE = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
_OTHERS = re.compile(r"(?:patch_embed\.proj|norm)\.(?:weight|bias)$")
_BLOCK = re.compile(r"(blocks\.[0-9]{1,4}\.)((?:norm[12]|attn|mlp|ls[12])\..+|gamma_[12])$")
_HEADS = ("dino_head.", "ibot_head.")
_PLAIN_MLP = ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
_IN_BLOCK = (
    *("gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", *_PLAIN_MLP),
)
_HEAD_DIM = 64  # of S, B and L
_NO_BIAS = 1e-6
_RELEASED_EPS, _TRAINING_EPS = 1e-5, 1e-6

_META = "DINOv3 License (Meta; it covers what is derived from the weights too)"
_MEDDINOV3 = (
    "MedDINOv3: Apache-2.0 as its repository says, although it derives from Meta's weights, whose DINOv3 License covers "
    "derivatives; other training runs: not stated"
)
_CITATION = "Siméoni et al.: DINOv3 (arXiv:2508.10104)"
_MED_CITATION = "Li et al.: MedDINOv3 (arXiv:2509.02379); " + _CITATION


def recognise(contents: Contents) -> Weights | None:
    """The transformer, as the encoder of MedDINOv3's segmentation network; None for anything else.

    Heads and `mask_token` belong to the pretraining and are left out. Biases of queries and values stay, unless all are zero
    as in Meta's files. Positions are no tensors: `rope_embed.periods` is compared with ours and tells the width of a head.

    Raises PretrainedMismatch, with all that differs, for a form that has no place in our network.
    """
    if not _is_dinov3(contents.tensors):
        return None
    trained = bool(contents.branch) or any(name.startswith(_HEADS) for name in contents.tensors)
    selected, dropped = contents.select(_name)
    tensors, problems, zeros = _without_key_biases(selected, contents.tensors)
    width, channels = (int(n) for n in tensors[_PATCHES].shape[:2])
    head_dim = 4 * contents.tensors[_PERIODS].numel() if _PERIODS in contents.tensors else _HEAD_DIM
    problems += _differences(tensors, contents.tensors, width, head_dim)
    if problems:
        raise PretrainedMismatch(
            "A DINOv3 of a form that autoseg has no network for",
            where=contents.path,
            found="; ".join(found for found, _ in problems),
            expected="; ".join(expected for _, expected in problems),
            remedy="give a ViT-S/16, ViT-B/16 or ViT-L/16 with four storage tokens, as Meta and MedDINOv3 publish them",
        )
    transformer = {"embed_dim": width, "depth": _depth(tensors), "num_heads": width // head_dim}
    size = next((size for size, known in SIZES.items() if known == transformer), None)
    return Weights(
        name=contents.name,
        kind=f"DINOv3 transformer{f' {size}' if size else ''}, {transformer['depth']} blocks of {width} features"
        + (", of a training run as MedDINOv3's" if trained else ""),
        method="dinov3",
        architecture={
            "network_class_name": NETWORK,
            "arch_kwargs": {
                **released_arguments(transformer),
                "eps": _TRAINING_EPS if trained else _RELEASED_EPS,
                "qkv_bias": any(name.endswith(".q_bias") for name in tensors),
            },
            "_kw_requires_import": [],
        },
        tensors=tensors,
        scope="encoder",
        channels=channels,
        spatial_dims=2,
        sha256=contents.sha256,
        licence=_MEDDINOV3 if trained else _META,
        citation=_MED_CITATION if trained else _CITATION,
        trained_on="CT-3M: 3.87 million axial slices of 16 public CT sets (MedDINOv3's published file)"
        if trained
        else "natural images, LVD-1689M, or satellite images, SAT-493M (Meta's published files)",
        dropped=(*dropped, *zeros),
        warnings=tuple(_warnings(contents.branch, trained)),
        colours=channels == 3,
    )


def _is_dinov3(tensors: Mapping[str, Tensor]) -> bool:
    """DINOv2 and other transformers have a table of positions, or neither storage tokens nor periods."""
    return (
        {"cls_token", _PATCHES, "blocks.0.attn.qkv.weight"} <= set(tensors)
        and tensors[_PATCHES].ndim == 4
        and "pos_embed" not in tensors
        and any(name in tensors for name in ("storage_tokens", "reg_token", _PERIODS))
        and any(name in tensors for name in ("blocks.0.ls1.gamma", "blocks.0.gamma_1"))
    )


def _name(name: str) -> str:
    """timm's name of a tensor of the encoder, else `!reason`."""
    if name in _TOKENS:
        return _TOKENS[name]
    if name.endswith(".bias_mask"):
        return "!says which biases count; they are multiplied by it"
    if _OTHERS.match(name):
        return name
    if found := _BLOCK.match(name):
        block, inner = found.groups()
        return block + _SCALE.get(inner, inner)
    if name == _PERIODS:
        return "!follows from the sizes"
    if name == "mask_token":
        return "!part of the masked prediction"
    if name.startswith(_HEADS):
        return "!head of the pretraining"
    if name.startswith(("cls_norm.", "local_cls_norm.")):
        return "!norm of the class token alone, which no map shows"
    return "!no part of the transformer"


def _without_key_biases(
    tensors: Mapping[str, Tensor], of_the_file: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[tuple[str, str]], Named]:
    """The tensors with `q_bias` and `v_bias` for `qkv.bias`, or with none if they are zero everywhere; what is wrong with
    the biases; and those that were left out."""
    kept: dict[str, Tensor] = {}
    problems: list[tuple[str, str]] = []
    biases: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not name.endswith("attn.qkv.bias"):
            if name.endswith(("attn.q_bias", "attn.v_bias")):
                biases[name] = name
            kept[name] = tensor
            continue
        mask = of_the_file.get(f"{name}_mask", torch.ones(()))
        if tensor.ndim != 1 or len(tensor) % 3 or mask.shape not in (torch.Size(), tensor.shape):
            problems.append((f"{name} of shape {tuple(tensor.shape)}", "a number for each query, key and value"))
            continue
        query, key, value = (tensor * mask).view(3, -1)
        # Turned by their positions, biases of keys do not cancel out in the softmax.
        if _matters(key):
            problems.append((f"{name} with biases of keys", "biases of queries and values only"))
        start = name.removesuffix("qkv.bias")
        kept |= {f"{start}q_bias": query, f"{start}v_bias": value}
        biases |= {f"{start}q_bias": name, f"{start}v_bias": name}
    if any(_matters(kept[name]) for name in biases):
        return kept, problems, ()
    left = {name: tensor for name, tensor in kept.items() if name not in biases}
    return left, problems, tuple((name, "zero in every block") for name in dict.fromkeys(biases.values()))


def _matters(bias: Tensor) -> bool:
    return bool((bias.float().abs() >= _NO_BIAS).any())


def _differences(
    tensors: Mapping[str, Tensor], of_the_file: Mapping[str, Tensor], width: int, head_dim: int
) -> list[tuple[str, str]]:
    """What is not as in our network: (found, expected) pairs."""
    problems = []
    storage = tensors["reg_token"].shape[1] if "reg_token" in tensors and tensors["reg_token"].ndim == 3 else 0
    if storage != STORAGE:
        problems.append((f"{storage} storage tokens", f"{STORAGE} storage tokens"))
    patch = tuple(tensors[_PATCHES].shape[2:])
    if patch != (TOKEN, TOKEN):
        problems.append(("patches of {} × {} pixels".format(*patch), f"{TOKEN} × {TOKEN}"))
    if not head_dim or not width or width % head_dim:
        problems.append((f"{width} features a token", f"a multiple of {head_dim}, the features of a head"))
    elif _PERIODS in of_the_file and not _are_ours(of_the_file[_PERIODS]):
        problems.append((f"other periods of the positions ({_PERIODS})", "1 to 100, as DINOv3 was published"))
    hidden = tensors.get("blocks.0.mlp.fc1.weight")
    is_plain = hidden is not None and hidden.ndim == 2 and len(hidden) == 4 * width
    if not is_plain:
        found = "a gated MLP, as ViT-S+, ViT-H+ and 7B have" if hidden is None else f"an MLP of {len(hidden)} features"
        problems.append((found, f"a plain MLP, four times as wide as a token ({4 * width})"))
    if missing := list(_missing(tensors, is_plain)):
        problems.append((f"without {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}", "whole blocks"))
    return problems


def _missing(tensors: Mapping[str, Tensor], is_plain: bool) -> Iterator[str]:
    """Names that a transformer of as many blocks has, but not the file."""
    biases = ("attn.q_bias", "attn.v_bias") if any(name.endswith("_bias") for name in tensors) else ()
    block = [name for name in (*_IN_BLOCK, *biases) if is_plain or name not in _PLAIN_MLP]
    names = ["patch_embed.proj.bias", "norm.weight", "norm.bias"]
    names += [f"blocks.{number}.{name}" for number in range(_depth(tensors)) for name in block]
    return (name for name in names if name not in tensors)


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def _are_ours(periods: Tensor) -> bool:
    """Whether periods rise from 1 to 100 as ours do; files hold them rounded to bfloat16, which errs by 0.3 % at most."""
    ours = 100 ** (torch.arange(periods.numel()) / periods.numel())
    return torch.allclose(periods.flatten().float(), ours, rtol=0.01, atol=0)


def _warnings(branch: str, trained: bool) -> Iterator[str]:
    if not trained:
        yield (
            "If this is a published file, it has seen no medical images, only colour images normalised as ImageNet is; the "
            "plan's own intensities are kept"
        )
        return
    if branch:
        yield f"The file is of a training run; its {branch} is taken"
    yield (
        f"The ε of its layer norms is not in the file: {_TRAINING_EPS:g} is taken, the default of training runs and "
        f"MedDINOv3's; a run with layernormbf16, as in Meta's own settings, has {_RELEASED_EPS:g}"
    )
    yield (
        "If this is MedDINOv3's published file, its CT-3M contains the images of test cases of AMOS22, LiTS and BTCV: results "
        "there are not on unseen images"
    )
    yield (
        "MedDINOv3 was trained on CT alone, clamped to [-1000, 1000] HU, less 65.1084, over 178.0166; the plan's own "
        "intensities are kept"
    )
