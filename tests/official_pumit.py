"""The authors' own PUMIT out of a checkout of function2-llx/PUMIT, with stand-ins for what its networks do not need.

Only `pumit/sac.py`, `pumit/tokenizer/{base,quantize,simple}.py`, `pumit/model/{vit,rope,mim}.py`, `mylib/types.py` and
`mylib/models/layers/factories.py` are run. Stood in for: training (lightning, jsonargparse, optimisers, logging), reading of
images, and xformers, whose attention becomes torch's on the same (n, length, heads, features).
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn


@contextmanager
def official(root: Path) -> Iterator[types.SimpleNamespace]:
    """Their `sac`, `simple`, `quantize`, `vit`, `mim` modules; gone from `sys.modules` afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name, content in _stand_ins().items():
            patch.setitem(sys.modules, name, _module(name, **content))
        for package in ("pumit", "pumit.tokenizer", "pumit.model", "mylib", "mylib.models", "mylib.models.layers"):
            # With the folder and without what its __init__ imports.
            module = sys.modules.get(package) or _module(package)
            module.__path__ = [str(root / package.replace(".", "/"))]
            patch.setitem(sys.modules, package, module)
        layers = importlib.import_module("mylib.models.layers.factories")
        sys.modules["mylib.models.layers"].LayerNormNd = layers.LayerNormNd
        sys.modules["pumit"].sac = importlib.import_module("pumit.sac")
        base = importlib.import_module("pumit.tokenizer.base")
        sys.modules["pumit.tokenizer"].VQTokenizer = base.VQTokenizer
        names = ("sac", "tokenizer.simple", "tokenizer.quantize", "model.vit", "model.mim")
        yield types.SimpleNamespace(
            **{n.rpartition(".")[2]: importlib.import_module(f"pumit.{n}") for n in names},
        )
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("pumit", "mylib"):
            del sys.modules[name]


def tokenizer(code: types.SimpleNamespace, channels: tuple[int, int, int], codes: int) -> nn.Module:
    """SimpleVQTokenizer in its soft mode, of three channels, in float64."""
    quantize = code.quantize.VectorQuantizer(codes, channels[-1], "soft")
    return code.simple.SimpleVQTokenizer(3, 4, channels, channels, quantize=quantize).double().eval()


def transformer(
    code: types.SimpleNamespace, tokens: nn.Module, sizes: tuple[int, int, int], mask_blocks: Sequence[int]
) -> nn.Module:
    """ViTForMIM of three channels, in float64.

    Args:
        tokens: its tokenizer.
        sizes: width, blocks, heads.
        mask_blocks: the blocks that see the mask tokens.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # its frequencies are made in the default precision
    try:
        model = code.mim.ViTForMIM(
            patch_size=16, pos_embed_shape=(5, 10, 10), embed_dim=sizes[0], depth=sizes[1], num_heads=sizes[2],
            pretrained_ckpt=code.vit.Checkpoint(), tokenizer=tokens, mask_ratio=0.55, mask_layer_ids=mask_blocks,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(default)
    model.train(False)  # theirs returns nothing, so there is no .eval()
    return model


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    return module


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(n, length, heads, features) thrice."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _stand_ins() -> dict[str, dict[str, Any]]:
    @dataclasses.dataclass
    class Schedule:
        scheduler: Any = None

    attention = _module("xformers.ops", memory_efficient_attention=_attention)
    last, first = "n c ... -> n ... c", "n ... c -> n c ..."

    def rearranging(pattern: str) -> type[nn.Module]:
        return type("Rearranging", (Rearrange,), {"__init__": lambda self: Rearrange.__init__(self, pattern)})

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return {
        "xformers": {"ops": attention},
        "xformers.ops": vars(attention),
        "jsonargparse": {"class_from_function": lambda function: function},
        "lightning": {"Fabric": object},
        "lightning.pytorch": {},
        "lightning.pytorch.utilities": {},
        "lightning.pytorch.utilities.types": {"LRSchedulerConfig": Schedule},
        "mylib.models": {"load_ckpt": nothing},
        "mylib.models.layers": {},
        "mylib.utils": {
            "channel_last": lambda x: x.movedim(1, -1),
            "channel_first": lambda x: x.movedim(-1, 1),
            "ChannelLast": rearranging(last),
            "ChannelFirst": rearranging(first),
        },
        "mylib.utils.grad": {"grad_norm": nothing},
        "mylib.utils.lightning": {"LightningModule": nn.Module},
        "pumit.optim": {"build_optimizer": nothing, "build_lr_scheduler": nothing},
        "pumit.transforms": {"RGB_TO_GRAY_WEIGHT": (0.299, 0.587, 0.114)},
        "torchvision.utils": {"save_image": nothing},
    }
