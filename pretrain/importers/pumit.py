"""PUMIT (arXiv:2312.07630): the vision transformer and the soft tokenizer of function2-llx/PUMIT, release v1.

Names: `pumit/model/{vit,mim}.py` for the transformer, which Lightning saves under `state_dict` without the tokenizer it was
trained with; `pumit/tokenizer/{simple,quantize}.py` and `scripts/tokenizer/main.py` for the tokenizer, which lies under
`model` beside its discriminator, optimisers and step. The names of the published files themselves were not seen.
The repository states no licence, so nothing of it is here or fetched: the file is one that the user gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from planners.anisotropy import strides_of_degree
from planners.errors import DatasetError, PretrainedMismatch
from planners.sac import LEVELS, NETWORK, SIZES
from pretrain.importers.contents import Contents, read_contents
from pretrain.importers.folders import weights_file
from pretrain.importers.weights import Named, Weights
from pretrain.methods.pumit.tokenizer import Tokenizer
from pretrain.networks.pumit_vit import timm_names

_PATCHES = "patch_embed.proj.weight"
_ENCODER = re.compile(
    r"(?:cls_token|pos_embed|patch_embed\.proj\.\w+|norm\.\w+|blocks\.\d+\.(?:norm[12]|attn|mlp)\..+)$"
)
_TABLE = re.compile(r"(?:.+\.)?rope\.\w+$")
_HEAD_DIM = 64  # of both published sizes; the number of heads is not in the file
_DECODER = [32, 64, 128, 256, 512, 512]  # the authors' (downstream/btcv/model.py); not among these weights
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in pumit/transforms.py
_DOWN = ("encoder.0.weight", "encoder.3.weight", "encoder.6.weight")
_FIRST, _LAST, _CODEBOOK = _DOWN[0], "decoder.8.weight", "quantize.embedding.weight"

LICENCE = "not stated (function2-llx/PUMIT has none)"
CITATION = "Luo et al.: Building Universal Foundation Models for Medical Image Analysis (PUMIT, arXiv:2312.07630)"
_TRAINED_ON = "55 public data sets of CT, MR and 2D images (the published file)"


def recognise(contents: Contents) -> Weights | None:
    """The transformer, as the encoder of a PUMIT for any DA; None for anything else.

    `mask_token` and `mim_head` belong to the masked prediction and are left out. The mask token has no position of its own:
    `ViT.forward` adds none to it either, so it could be taken as it is.

    Raises PretrainedMismatch for the tokenizer, naming it, and for a width of which the number of heads is not known.
    """
    if _is_tokenizer(contents.tensors):
        raise PretrainedMismatch(
            "PUMIT's tokenizer is no encoder of a segmentation network",
            where=contents.path,
            found=f"a codebook, {_CODEBOOK} {tuple(contents.tensors[_CODEBOOK].shape)}",
            expected="PUMIT's transformer (patch_embed, blocks.0 …)",
            remedy="give the file of the transformer; the tokenizer only makes the targets of its pretraining",
        )
    if not _is_transformer(contents.tensors):
        return None
    tensors, dropped = contents.select(_name)
    width, channels = (int(n) for n in tensors[_PATCHES].shape[:2])
    if width % _HEAD_DIM:
        raise PretrainedMismatch(
            "How many attention heads these weights have is not in the file",
            where=contents.path,
            found=f"{width} features a token",
            expected=f"a multiple of {_HEAD_DIM}, the features of a head in both published sizes",
        )
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    transformer = {"embed_dim": width, "depth": depth, "num_heads": width // _HEAD_DIM}
    size = next((size for size, known in SIZES.items() if known == transformer), None)
    return Weights(
        name=contents.name,
        kind=f"PUMIT transformer{f' {size.upper()}' if size else ''}, {depth} blocks of {width} features",
        method="pumit",
        # Strides are those of DA 0 for want of a spacing; the encoder is the same for all.
        architecture={
            "network_class_name": NETWORK,
            "arch_kwargs": {
                "strides": strides_of_degree(0, LEVELS),
                "features_per_stage": list(_DECODER),
                **transformer,
            },
            "_kw_requires_import": [],
        },
        tensors={f"vit.{name}": tensor for name, tensor in timm_names(tensors).items()},
        scope="encoder",
        channels=channels,
        spatial_dims=3,
        sha256=contents.sha256,
        licence=LICENCE,
        citation=CITATION,
        trained_on=_TRAINED_ON,
        dropped=dropped,
        warnings=(
            "If this is the published file, its images are public, among them all tasks of the Medical Segmentation Decathlon, "
            "BTCV, AMOS22, CHAOS, FLARE22, ACDC and TotalSegmentator (function2-llx/PUMIT:scripts/data/process.py): results "
            "there are not on unseen images",
            "It was trained on percentiles 0.5 to 99.5 of an image scaled to [0, 1] and normalised as ImageNet is; the plan's "
            "own intensities are kept",
        ),
    )


@dataclass(frozen=True)
class TokenizerWeights:
    """A tokenizer of the authors: `Tokenizer(**options)` takes `tensors` whole."""

    name: str
    options: dict[str, Any]
    """What the file says (channels, codes) and what it was trained with (rule for 3³ kernels, pooling of the decoder)."""
    tensors: dict[str, Tensor]
    """float32."""
    sha256: str
    dropped: Named
    """Tensors beside those of the tokenizer, and why they are not used."""
    warnings: tuple[str, ...]
    licence: str = LICENCE
    citation: str = CITATION


def read_tokenizer(path: Path, *, gray: bool = False) -> TokenizerWeights:
    """PUMIT's tokenizer from a file of the authors, `simple-soft.ckpt`. Nothing in it is run.

    Its images have three equal channels with values in [-1, 1], and its decoder sums slices.

    Args:
        gray: for images of one channel instead: the first kernel is summed over its channels, which gives the same tokens, and
            of the decoded colours the brightness is taken.

    Raises UnsafeFile for a file that asks for code, PretrainedMismatch for other weights or an incomplete tokenizer,
    DatasetError for a path that is missing, broken, or no file of weights.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError("No such file of weights", where=path, remedy="check the path")
    contents = next(read_contents(path, *weights_file(path), ""))
    if not _is_tokenizer(contents.tensors):
        raise PretrainedMismatch(
            "No tokenizer of PUMIT",
            where=path,
            found=f"{len(contents.tensors)} tensors: {', '.join(list(contents.tensors)[:6])}",
            expected=f"{_FIRST}, {_CODEBOOK} and the rest of SimpleVQTokenizer in its soft mode",
            remedy="give the file of the tokenizer, simple-soft.ckpt",
        )
    options: dict[str, Any] = {
        "in_channels": int(contents.tensors[_FIRST].shape[1]),
        "channels": tuple(int(contents.tensors[name].shape[0]) for name in _DOWN),
        "codes": int(contents.tensors[_CODEBOOK].shape[0]),
        "k3_rule": "article",
        "transposed_pool": "sum",
    }
    places = _places(options, path)
    tensors, dropped = contents.select(lambda name: name if name in places else "!no part of the tokenizer")
    wrong = [name for name, shape in places.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        raise PretrainedMismatch(
            "The tokenizer is not complete, or not the one that was published",
            where=path,
            found=f"{len(wrong)} of {len(places)} tensors missing or of another shape: {', '.join(wrong[:5])}",
            remedy="give the file of the soft tokenizer, simple-soft.ckpt",
        )
    if gray:
        tensors, options = _gray(tensors, options["in_channels"]), {**options, "in_channels": 1}
    return TokenizerWeights(
        contents.name,
        options,
        tensors,
        contents.sha256,
        dropped,
        (
            "It was trained on percentiles 0.5 to 99.5 of an image scaled to [-1, 1]",
            "How its decoder pools slices is not in the file: the sum, as in the authors' code, is assumed",
        ),
    )


def _is_transformer(tensors: Mapping[str, Tensor]) -> bool:
    """EVA-02's own files have the names too, but kernels and positions of a plane."""
    return {"blocks.0.attn.q_bias", "blocks.0.mlp.ffn_ln.weight", _PATCHES, "pos_embed"} <= set(tensors) and all(
        tensors[name].ndim == 5 for name in (_PATCHES, "pos_embed")
    )


def _is_tokenizer(tensors: Mapping[str, Tensor]) -> bool:
    dimensions = {**dict.fromkeys((*_DOWN, "decoder.6.transposed_conv.weight", _LAST), 5), _CODEBOOK: 2}
    return all(name in tensors and tensors[name].ndim == n for name, n in dimensions.items())


def _name(name: str) -> str:
    """A tensor's own name where it is one of the encoder, else `!reason`."""
    if _TABLE.match(name):
        return "!follows from the sizes"
    if _ENCODER.match(name):
        return name
    if name == "mask_token" or name.startswith("mim_head."):
        return "!part of the masked prediction"
    if name.startswith("tokenizer."):
        return "!tokenizer"
    return "!no part of the transformer"


def _places(options: Mapping[str, Any], path: Path) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the tokenizer described; its widths come from a file that may hold anything."""
    if max(*options["channels"], options["codes"], options["in_channels"]) > 100_000:
        raise PretrainedMismatch("The file describes a tokenizer of absurd size", where=path, found=options)
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in Tokenizer(**options).state_dict().items()}
    except (ValueError, RuntimeError) as error:
        raise PretrainedMismatch(
            "The tokenizer that the file describes cannot be built", where=path, found=f"{options}: {error}"
        ) from error


def _gray(tensors: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Summed over the channels that look at the image, and the brightness of those that make one: (128, 3, 4, 4, 4) twice."""
    shares = torch.tensor(_LUMA if channels == 3 else (1 / channels,) * channels)
    changed = dict(tensors)
    changed[_FIRST] = tensors[_FIRST].sum(1, keepdim=True)
    changed[_LAST] = torch.einsum("c,ic...->i...", shares, tensors[_LAST])[:, None]
    changed["decoder.8.bias"] = (shares @ tensors["decoder.8.bias"])[None]
    return changed
