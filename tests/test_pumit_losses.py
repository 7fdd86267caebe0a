"""The tokenizer's losses. Values: by hand (methods/pumit.md §3.3 and checks 8 to 10 of §7)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.methods.pumit.losses import code_counts, entropy, reconstruction, sharpness_weight, usage
from tests.gathering import two_threads


def itself(tensor: Tensor) -> Tensor:
    return tensor


def tokens_of(kind: str, codes: int) -> Tensor:
    """As many tokens as codes."""
    eye = torch.eye(codes)
    if kind == "uniform":
        return torch.full((codes, codes), 1 / codes)
    if kind == "one code":
        return eye[:1].expand(codes, -1)
    if kind == "each code":
        return eye
    return (eye[0::2] + eye[1::2]).repeat(2, 1) / 2  # "pairs": each token undecided between two of its own


CASES = ["uniform", "one code", "each code", "pairs"]


@pytest.mark.parametrize(
    ("codes", "priors"), [(1024, [0, 0, -6.9315, -6.2383]), (4, [0, 0, -1.3863, -0.6931])], ids=["V1024", "V4"]
)
def test_the_prior_is_minus_the_information_of_position_and_code(codes: int, priors: list[float]) -> None:
    found = [float(usage(tokens_of(kind, codes), itself).prior(1, 1)) for kind in CASES]
    assert found == pytest.approx(priors, abs=1e-4)


@pytest.mark.parametrize("codes", [1024, 4])
def test_both_parts_are_0_where_they_should_be(codes: int) -> None:
    log = math.log(codes)
    parts = [(0, 0), (log, log), (0, log), (0, log - math.log(2))]
    for kind, expected in zip(CASES, parts, strict=True):
        found = usage(tokens_of(kind, codes), itself)
        assert (float(found.unevenness), float(found.sharpness)) == pytest.approx(expected, abs=1e-4)


def test_the_prior_is_the_published_expression_but_for_constants() -> None:
    """The weights of the authors' command line, .03 and 1: 0.03 Σ p̄ ln p̄ + E H."""
    for kind, published in zip(CASES, (6.7235, 0, -0.2079), strict=False):
        prior = usage(tokens_of(kind, 1024), itself).prior(0.03, 1)
        assert float(prior) + (1 - 0.03) * math.log(1024) == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize("codes", [1024, 4])
def test_perplexity_and_choices_are_numbers_of_codes(codes: int) -> None:
    expected = [(codes, codes), (1, 1), (codes, 1), (codes, 2)]
    for kind, numbers in zip(CASES, expected, strict=True):
        found = usage(tokens_of(kind, codes), itself)
        assert (float(found.perplexity), float(found.choices)) == pytest.approx(numbers, rel=1e-4)


def test_codes_in_use_are_those_that_are_likeliest_somewhere() -> None:
    tokens = torch.tensor([[0.5, 0.4, 0.1, 0], [0.6, 0.4, 0, 0], [0, 0.1, 0.2, 0.7]]).view(1, 3, 1, 1, 4)
    assert code_counts(tokens).tolist() == [2, 0, 0, 1]
    assert int((code_counts(tokens_of("each code", 6)) > 0).sum()) == 6


def test_codes_that_are_never_likely_leave_everything_finite() -> None:
    logits = torch.tensor([[0.0, 0, -1e4], [200, 0, -1e4]], requires_grad=True)
    tokens = logits.softmax(-1)
    assert (tokens.mean(0) == 0).any()
    found = usage(tokens, itself)
    (found.prior(1, 1) + found.perplexity + found.choices).backward()
    assert float(found.entropy) == pytest.approx(math.log(2) / 2)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0


def test_descending_the_prior_evens_out_the_codes_and_sharpens_the_tokens() -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + torch.arange(8) / 2
    start = usage(logits.softmax(-1), itself)
    for _ in range(50):
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(usage(logits.softmax(-1), itself).prior(1, 0.5), logits)
        logits = (logits - 20 * gradient).detach()
    end = usage(logits.softmax(-1), itself)
    assert float(end.unevenness) < 0.7 * float(start.unevenness)
    assert float(end.choices) < 0.5 * float(start.choices)


def test_tokens_of_padding_do_not_count() -> None:
    tokens = torch.randn(2, 3, 2, 2, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    valid = torch.ones(2, 3, 2, 2, dtype=torch.bool)
    valid[1, 2] = False
    found, expected = usage(tokens, itself, valid), usage(tokens[valid], itself)
    assert torch.allclose(found.mean, expected.mean)
    assert torch.allclose(found.entropy, expected.entropy)
    assert float(found.mean.sum()) == pytest.approx(1)


def test_entropies_are_taken_in_float32() -> None:
    found = usage(torch.full((3, 1024), 1 / 1024, dtype=torch.bfloat16), itself)
    assert found.mean.dtype == found.entropy.dtype == torch.float32
    assert float(found.unevenness) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("first", [6, 2], ids=["equal", "unequal"])
def test_two_processes_regularise_the_joint_batch(first: int) -> None:
    """Value and averaged gradient, also where one process has fewer tokens."""
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    joint = usage(logits.softmax(-1), itself)
    (expected,) = torch.autograd.grad(joint.prior(0.7, 0.2), logits)
    ranks = two_threads(usage, logits.softmax(-1).split([first, 12 - first]))
    priors = [found.prior(0.7, 0.2) for found in ranks]
    (found,) = torch.autograd.grad(sum(priors) / 2, logits)  # type: ignore[arg-type]
    assert [float(prior.detach()) for prior in priors] == pytest.approx([float(joint.prior(0.7, 0.2).detach())] * 2)
    assert torch.allclose(found, expected, atol=1e-7)
    assert float(expected.norm()) > 1e-3


@pytest.mark.parametrize(
    ("progress", "weight"), [(0, 0), (0.3, 0), (0.5, 0.025), (0.6, 0.0375), (0.7, 0.05), (0.99, 0.05)]
)
def test_sharpness_is_asked_for_once_the_codes_mean_something(progress: float, weight: float) -> None:
    assert sharpness_weight(progress, 0.05) == pytest.approx(weight)


def test_reconstruction_is_measured_in_absolutes_and_squares() -> None:
    found = reconstruction(torch.tensor([0.0, 1.0, -1.0], dtype=torch.bfloat16), torch.tensor([0.5, 1.0, 1.0]))
    assert {name: float(value) for name, value in found.items()} == pytest.approx({"l1": 2.5 / 3, "mse": 4.25 / 3})
    assert all(value.dtype == torch.float32 for value in found.values())
