"""Numbers that tell of collapse, which the losses do not: all of them are kept out of the gradient.

Sources: the failures seen in facebookresearch/dinov2 (#272, #407); RankMe (arXiv:2210.02885).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize


@torch.no_grad()
def target_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of targets (M, K) as a share of ln K: 1 where the teacher has no opinion, 0 where it is certain."""
    return torch.special.entr(targets.float()).sum(1).mean() / math.log(targets.shape[1])


@torch.no_grad()
def usage_entropy(targets: Tensor) -> Tensor:
    """Entropy of the mean of targets (M, K) as a share of ln min(K, M): 0 where every sample has the same prototype."""
    return torch.special.entr(targets.float().mean(0)).sum() / math.log(max(min(targets.shape), 2))


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """√D times the deviation of normalised features (n, D): about 1 where they point everywhere, 0 where all are alike."""
    directions = normalize(features.float(), dim=1)
    return directions.std(0, correction=0).mean() * math.sqrt(features.shape[1])


@torch.no_grad()
def rank_me(features: Tensor) -> Tensor:
    """By how many equal singular values features (n, D) would be as varied: from 1 to min(n, D)."""
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum() + 1e-7
    return torch.special.entr(share).sum().exp()
