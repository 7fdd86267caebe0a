"""What the soft tokenizer learns from: reconstruction, and the prior that keeps the codebook in use and each token sharp.

Let q(s) be the token at a random position s of a batch, p̄ their mean, u the uniform distribution over the V codes. KL(p̄‖u) is 0
where every code is equally likely at a random position; it is minimised. E KL(q(s)‖u) is ln V where every token is one code; it
is maximised. With equal weights the two make minus the mutual information of position and code. As KL(p‖u) = ln V - H(p), both
follow from two entropies; these are in nats.

Source: "extended prior regularisation" of PUMIT (arXiv:2312.07630; function2-llx/PUMIT:pumit/tokenizer/quantize.py), whose
expression lacks the constants: here each part is 0 where it should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss


@dataclass(frozen=True)
class Usage:
    """How the codebook is used by the tokens of a batch, of all processes together."""

    mean: Tensor
    """p̄ (V,), sums to 1."""
    entropy: Tensor
    """E H(q(s)), a number from 0 to ln V."""

    @property
    def unevenness(self) -> Tensor:
        """KL(p̄‖u), from 0 where all codes are equally likely to ln V where one is certain."""
        return math.log(len(self.mean)) - entropy(self.mean)

    @property
    def sharpness(self) -> Tensor:
        """E KL(q(s)‖u), from 0 where every token is uniform to ln V where every token is one code."""
        return math.log(len(self.mean)) - self.entropy

    @property
    def perplexity(self) -> Tensor:
        """exp H(p̄): by how many codes, were all as likely, the tokens would be as varied, from 1 to V."""
        return entropy(self.mean).exp()

    @property
    def choices(self) -> Tensor:
        """exp E H(q(s)): among how many codes, were all as likely, a token is undecided, from 1 to V."""
        return self.entropy.exp()

    def prior(self, diversity_weight: float, sharpness_weight: float) -> Tensor:
        """The regulariser, to be minimised: weighted unevenness minus weighted sharpness."""
        return diversity_weight * self.unevenness - sharpness_weight * self.sharpness


def usage(tokens: Tensor, gather: Callable[[Tensor], Tensor], valid: Tensor | None = None) -> Usage:
    """Usage of a batch's tokens (..., V), computed in float32.

    Args:
        gather: `PretrainMethod.gather`. Means are over the tokens of all processes, however many each has, and the averaged
            gradient is that of the joint batch.
        valid: (...), bool; tokens that count. Those of padding do not. Where none does, the usage means nothing, but is finite
            and without gradient.
    """
    flat = tokens.float().flatten(0, -2)
    counts = torch.ones(len(flat), device=flat.device) if valid is None else valid.flatten().float()
    local = torch.cat([counts @ flat, (counts @ entropy(flat))[None], counts.sum()[None]])
    total = gather(local[None]).sum(0)
    number = total[-1].clamp_min(1)
    return Usage(total[:-2] / number, total[-2] / number)


def entropy(p: Tensor) -> Tensor:
    """H of distributions over the last axis, in nats: (..., V) → (...). Finite, and so is its gradient, where some p is 0."""
    return -torch.special.xlogy(p, p.clamp_min(torch.finfo(p.dtype).tiny)).sum(-1)


def code_counts(tokens: Tensor) -> Tensor:
    """How many of the tokens (..., V) have each code as their likeliest: (V,), integer. Codes in use are those above 0."""
    return torch.bincount(tokens.argmax(-1).flatten(), minlength=tokens.shape[-1])


def sharpness_weight(progress: float, final: float) -> float:
    """The weight of sharpness at a share `progress` of the steps: 0 until 0.3, then linear to `final` at 0.7.

    Tokens that must decide before the codes mean anything all decide for one.
    """
    return final * min(max((progress - 0.3) / 0.4, 0.0), 1.0)


def reconstruction(output: Tensor, image: Tensor) -> dict[str, Tensor]:
    """Mean absolute and mean squared difference, `l1` and `mse`, in float32; the loss is their sum.

    L1 alone stays at the constant image where most of a volume is dark.
    """
    return {"l1": l1_loss(output.float(), image.float()), "mse": mse_loss(output.float(), image.float())}
