"""Numbers that PUMIT's networks gave on 2026-11-28, when they were the authors' (tests/test_official.py), so that later work on
the code cannot change what imported weights compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.methods.pumit.tokenizer import Tokenizer, soft
from pretrain.networks.pumit_vit import ViT
from pretrain.networks.sac import Spacing
from tests.layouts import noise, randomised

DEGREES = range(6)
CHANNELS, CODES = (8, 16, 24), 10
WIDTH, DEPTH, HEADS = 72, 3, 3
VISIBLE = torch.tensor([[0, 2, 3, 5]])
"""Of the tokens of the first slab, 2 × 3."""


def picture(degree: int) -> Tensor:
    """(1, 3, z, 32, 48) of two slabs of tokens, one plane at DA 5."""
    return noise(f"picture {degree}", (1, 3, 1 if degree == 5 else 2 * (16 >> degree), 32, 48))


def digest(values: Tensor) -> list[float]:
    """Norm, and product with a wave, which no other order of the numbers has."""
    flat = values.detach().contiguous().flatten()
    return [float(flat.norm()), float(flat @ (0.37 * torch.arange(flat.numel(), dtype=flat.dtype)).cos())]


def tokenizer() -> Tokenizer:
    model = Tokenizer(3, CHANNELS, CODES, transposed_pool="sum").double().eval()
    randomised(model)
    return model


def transformer() -> tuple[ViT, Tensor]:
    """And a mask token."""
    model = ViT(3, WIDTH, DEPTH, HEADS).double().eval()
    randomised(model)
    return model, noise("mask_token", (1, 1, WIDTH)) / 5


TOKENIZER: dict[int, list[list[float]]] = {
    0: [
        [12.85444507, 6.674328614],
        [9.124395067, -0.909374227],
        [1.112440111, -0.4716649636],
        [112.465844, 20.6477731],
    ],
    1: [
        [13.38434934, 11.2675021],
        [9.273276929, -2.545263918],
        [1.097150542, -0.4863572603],
        [89.7048683, -22.24111748],
    ],
    2: [
        [13.282478, 5.695148606],
        [9.69952029, -1.316772898],
        [1.141433082, -0.4286233938],
        [76.41798775, -55.85666144],
    ],
    3: [
        [12.97100089, 16.92627709],
        [8.797321049, -0.6192437461],
        [1.138238215, -0.4445008427],
        [53.77271769, 29.99241547],
    ],
    4: [
        [13.11836929, 4.679459555],
        [8.994338283, -0.7968299602],
        [1.109312745, 0.1771796726],
        [38.6861023, -26.40117886],
    ],
    5: [
        [9.312451004, 0.7755709082],
        [6.929736943, -0.1420768734],
        [0.790326053, -0.1506551571],
        [27.16758549, -16.28873226],
    ],
}
"""DA → digests of the encoder's features, the logits, the mixed codes, the image."""
TRANSFORMER: dict[int, list[list[float]]] = {
    0: [
        [56.60703891, -62.57842313],
        [31.42709464, -33.35820645],
        [31.95346402, -3.30638058],
        [31.00422041, 2.83154511],
    ],
    1: [[59.48331076, -5.546650111], [32.10743815, 6.39754014], [32.72500327, 16.33931078], [31.47998468, 16.0059387]],
    2: [
        [59.05368173, -33.81647219],
        [31.61588708, 0.2556132618],
        [32.53656797, -2.640035888],
        [31.32362761, -5.245761162],
    ],
    3: [[57.88615163, 10.3432393], [31.91024327, 5.197342055], [32.48449282, 4.805910027], [30.76253106, 10.13499188]],
    4: [
        [60.81977407, -26.48889671],
        [32.67181841, -9.342843155],
        [32.84785759, -5.477833786],
        [31.61647385, -7.944760386],
    ],
    5: [[47.00867156, 3.057014322], [23.30467218, 3.803006205], [23.28479961, 5.736631787], [23.35905799, 7.125350785]],
}
"""DA → digests of the second block's tokens, the last ones, those with mask tokens everywhere, and in the last block alone."""


@torch.no_grad()
def tokenizer_values(degree: int) -> list[list[float]]:
    model, x = tokenizer(), picture(degree)
    features, below = model.encoder(x, Spacing(degree))
    logits, _ = model.encode(x, Spacing(degree))
    codes = model.quantize(soft(logits))
    return [digest(v) for v in (features, logits, codes, model.decode(codes, below)[0])]


@torch.no_grad()
def transformer_values(degree: int) -> list[list[float]]:
    (model, mask), x = transformer(), picture(degree)
    (second,) = model(x, degree, return_blocks=[1])
    masked = [model(x, degree, VISIBLE, mask_token=mask, mask_block=block) for block in (0, 2)]
    return [digest(v) for v in (second, model(x, degree), *masked)]


@pytest.mark.parametrize("degree", DEGREES)
def test_the_tokenizer_computes_the_known_numbers(degree: int) -> None:
    for found, known in zip(tokenizer_values(degree), TOKENIZER[degree], strict=True):
        assert found == pytest.approx(known, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("degree", DEGREES)
def test_the_transformer_computes_the_known_numbers(degree: int) -> None:
    for found, known in zip(transformer_values(degree), TRANSFORMER[degree], strict=True):
        assert found == pytest.approx(known, rel=1e-8, abs=1e-8)
