"""Which tokens the transformer sees, and what it pays for the others.

Source: function2-llx/PUMIT:pumit/model/mim.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pretrain.methods.pumit.losses import entropy


def visible_count(tokens: int, masked: float) -> int:
    """How many of a view's tokens are seen: the share 1 - `masked`, cut off, but at least one seen and one masked.

    >>> visible_count(500, 0.55), visible_count(100, 0.55)
    (224, 44)
    """
    # As the authors' code writes it: rounding errors of the product count, 224 of 500 and not 225.
    return min(max(int(tokens * (1 - masked)), 1), tokens - 1)


def draw_visible(inside: np.ndarray, masked: float, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the tokens that are seen, rising: as many for every view of as many tokens.

    Tokens `inside` the scan (tokens,) and those of padding are drawn apart, each in the same proportion.
    """
    count = visible_count(len(inside), masked)
    real, padding = (rng.permutation(np.flatnonzero(inside == wanted)) for wanted in (True, False))
    seen = visible_count(len(real), masked) if len(real) > 1 else len(real)
    seen = min(max(seen, count - len(padding)), count)
    return np.sort(np.concatenate([real[:seen], padding[: count - seen]]))


def masked_tokens(visible: Tensor, length: int) -> Tensor:
    """(N, n) numbers of tokens that are seen → (N, length), True where a token is not."""
    return torch.ones(len(visible), length, dtype=torch.bool, device=visible.device).scatter(1, visible, False)


def masked_terms(logits: Tensor, targets: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """What predicting tokens (N, L, V) by `logits` costs where `counted` (N, L), in nats, in float32.

    Returns:
        ce: mean cross entropy; kl: what of it is not the target's own entropy, with the same gradient; prior: what always
        answering the mean of the batch's targets would cost instead of `kl`.
    """
    weight = counted.float() / counted.sum().clamp_min(1)
    own = (weight * entropy(targets.float())).sum()
    ce = (weight * -(targets * logits.float().log_softmax(-1)).sum(-1)).sum()
    mean = (weight[..., None] * targets.float()).flatten(0, -2).sum(0)
    return {"ce": ce, "kl": ce - own, "prior": entropy(mean) - own}
