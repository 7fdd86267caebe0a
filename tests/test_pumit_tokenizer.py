"""The soft visual tokenizer. Shapes, names and exact statements: methods/pumit.md §2.4, §6 and §7."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from planners.errors import PlanError
from pretrain.methods.pumit.tokenizer import Tokenizer, soft
from pretrain.networks.sac import SACConv3d, Spacing

EVERY_DEGREE = range(6)


def tokenizer(**options: Any) -> Tokenizer:
    torch.manual_seed(0)
    return Tokenizer(1, (8, 16, 24), codes=10, **options)


def image(da0: int, *, tokens: tuple[int, int, int] = (4, 4, 4), batch: int = 1, channels: int = 1) -> Tensor:
    """Noise as large as so many tokens (z, y, x); one plane at DA 5."""
    slices = 1 if da0 == 5 else tokens[0] * max(16 >> da0, 1)
    shape = (batch, channels, slices, 16 * tokens[1], 16 * tokens[2])
    return torch.randn(*shape, generator=torch.Generator().manual_seed(da0))


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the released tokenizer."""
    weights = {f"encoder.{i}": (128 << s, (3, 128, 256)[s], *[4 >> (s > 0)] * 3) for s, i in enumerate((0, 3, 6))}
    weights |= {f"{part}.{i}": (512, 512, 3, 3, 3) for part in ("encoder", "decoder") for i in (9, 12)}
    weights = {
        name.replace("decoder.9", "decoder.0").replace("decoder.12", "decoder.3"): s for name, s in weights.items()
    }
    weights |= {f"decoder.{i}.conv.0": (c, c, 3, 3, 3) for i, c in ((6, 256), (7, 128))}
    biases = {name: shape[0] for name, shape in weights.items()}
    norms = {f"encoder.{i}.1": 128 << s for s, i in enumerate((1, 4, 7))}
    norms |= {"encoder.10": 512, "encoder.13": 512, "decoder.1": 512, "decoder.4": 512}
    norms |= {"decoder.6.conv.1": 256, "decoder.7.conv.1": 128}
    ups = {"decoder.6.transposed_conv": (512, 256, 2, 2, 2), "decoder.7.transposed_conv": (256, 128, 2, 2, 2)}
    ups["decoder.8"] = (128, 3, 4, 4, 4)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in (weights | ups).items()}
    shapes |= {f"{name}.bias": (size,) for name, size in (biases | {n: s[1] for n, s in ups.items()}).items()}
    shapes |= {f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")}
    return shapes | {
        "quantize.proj.weight": (1024, 512),
        "quantize.proj.bias": (1024,),
        "quantize.embedding.weight": (1024, 512),
    }


def test_the_released_sizes_have_the_released_tensors() -> None:
    with torch.device("meta"):
        model = Tokenizer(3)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == official_shapes()
    assert sum(parameter.numel() for parameter in model.parameters()) == 34_253_955
    assert {norm.num_groups for norm in model.modules() if isinstance(norm, nn.GroupNorm)} == {8}


@pytest.mark.parametrize("da0", EVERY_DEGREE)
def test_an_image_comes_back_at_its_size(da0: int) -> None:
    model, x = tokenizer().eval(), image(da0)
    grid = (1 if da0 == 5 else 4, 4, 4)
    with torch.no_grad():
        logits, below = model.encode(x, Spacing(da0))
        y, above = model.decode(model.quantize(soft(logits)), below)
        tokens, same = model(x, Spacing(da0))
        listed = model.soft_tokens(x, Spacing(da0))
    assert logits.shape == tokens.shape == (1, *grid, 10)
    assert (y.shape, below, above) == (x.shape, Spacing(da0, 4), Spacing(da0, 0))
    assert torch.equal(y, same)
    assert torch.equal(listed, tokens.reshape(1, -1, 10))  # z', y', x', the last fastest
    assert torch.allclose(listed.sum(-1), torch.ones(()))


def test_the_released_sizes_fit_the_worked_examples() -> None:
    """Five slabs of tokens from 80, 40, 20, 10 and 5 slices of 160 × 160, one from a plane."""
    with torch.device("meta"):
        model = Tokenizer(1)
        for da0, slices in enumerate((80, 40, 20, 10, 5, 1)):
            x = torch.empty(1, 1, slices, 160, 160)
            tokens, y = model(x, Spacing(da0))
            assert tokens.shape == (1, min(slices, 5), 10, 10, 1024)
            assert y.shape == x.shape


@pytest.mark.parametrize("d", EVERY_DEGREE)
def test_thick_slices_have_the_tokens_of_thin_copies_of_them(d: int) -> None:
    """Up to DA 4, where all 3³ kernels act behind stride 16; at DA 5 they are flat for the thick slices alone."""
    model, x = tokenizer().double().eval(), image(d, tokens=(3, 2, 1)).double()
    x = x if d < 5 else x.repeat(1, 1, 2, 1, 1)
    with torch.no_grad():
        thick, _ = model.encode(x, Spacing(d))
        thin, _ = model.encode(x.repeat_interleave(2**d, 2), Spacing(0))
    if d < 5:
        assert torch.allclose(thin, thick, atol=1e-12, rtol=0)
    else:
        assert not torch.allclose(thin[:, ::2], thick, atol=1e-3, rtol=0)


def test_thick_slices_of_the_decoder_are_the_mean_of_thin_ones_or_their_sum() -> None:
    """The last layer alone, from one map: four thin slices to one thick one."""
    x = torch.randn(1, 8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for mode, reduce in (("mean", Tensor.mean), ("sum", Tensor.sum)):
        last = tokenizer(transposed_pool=mode).decoder[8]
        nn.init.zeros_(last.bias)
        thin, thick = last(x, Spacing(0, 2))[0], last(x, Spacing(2, 2))[0]
        assert torch.allclose(thick, reduce(thin, 2, keepdim=True), atol=1e-6)
    assert tokenizer().decoder[8].transposed_pool == "mean"


@pytest.mark.parametrize("rule", ["article", "promote"])
def test_the_rule_for_3_kernels_reaches_all_of_them(rule: str) -> None:
    model = tokenizer(k3_rule=rule)
    threes = [m for m in model.modules() if isinstance(m, SACConv3d) and m.kernel_size == (3, 3, 3)]
    assert [layer.whole_up_to for layer in threes] == [int(rule == "promote")] * 6


def test_images_that_tokens_do_not_cover_are_refused() -> None:
    with pytest.raises(PlanError, match="5 × 16 × 24 voxels") as caught:
        tokenizer().encode(torch.zeros(1, 1, 5, 16, 24), Spacing(2))
    assert "multiples of 4 × 16 × 16" in str(caught.value)


def test_a_token_near_a_code_gives_that_code() -> None:
    codebook = tokenizer().quantize
    tokens = torch.eye(10)[[3, 7]].view(1, 1, 2, 1, 10)
    z = codebook(tokens)
    assert z.shape == (1, 24, 1, 2, 1)
    assert torch.equal(z[0, :, 0, :, 0].T, codebook.embedding.weight[[3, 7]])


def test_the_codebook_starts_with_unit_variance() -> None:
    weight = Tokenizer(1, (8, 8, 64), 512).quantize.embedding.weight
    assert float(weight.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tokens_are_never_in_half_precision(dtype: torch.dtype) -> None:
    tokens = soft(torch.zeros(2, 3, dtype=dtype))
    assert tokens.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_tokenizer_works_in_mixed_precision() -> None:
    model = tokenizer()
    with torch.autocast("cpu", torch.bfloat16):
        tokens, y = model(image(3, tokens=(1, 2, 1), batch=2), Spacing(3))
    (y.float().square().mean() + tokens.square().mean()).backward()
    assert tokens.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
