"""What MedDINOv3 learns from: agreement of class tokens (DINO) and of masked patches (iBOT) with a teacher, spread (KoLeo), and
patch similarities that stay as an earlier teacher had them (Gram). All in float32, whatever the precision around.

Source: DINOv3 (arXiv:2508.10104; facebookresearch/dinov3:dinov3/loss/*.py). Differs from it on purpose: Sinkhorn-Knopp is
computed in logarithms, where nothing overflows or becomes 0/0; KoLeo never takes a sample for its own neighbour; the logits of
masked patches are never all there at once, neither the student's nor the teacher's.

`gather` is that of `PretrainMethod`: it puts a tensor of all processes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torch.utils.checkpoint import checkpoint

Gather = Callable[[Tensor], Tensor]
STUDENT_TEMPERATURE = 0.1

# What the teacher says -------------------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn_shift(scores: Iterable[Tensor], temperature: float, gather: Gather, *, iterations: int = 3) -> Tensor:
    """What to take off each prototype's logits (K,) so that the targets of all samples use the prototypes about equally.

    Args:
        scores: the teacher's logits, (m, K) of some samples at a time; gone through once an iteration. Equal use is over those
            of all processes.
    """
    shift: Tensor | float = 0.0
    for number in range(iterations):
        masses = []
        for logits in scores:
            log = logits.float() / temperature - shift
            # A sample counts as 1 from the second iteration on; in the first as much as its logits say.
            masses.append((log.log_softmax(1) if number else log).logsumexp(0))
        shift = shift + gather(torch.stack(masses).logsumexp(0)[None]).logsumexp(0)
    return shift * temperature  # type: ignore[return-value]


@torch.no_grad()
def targets_of(logits: Tensor, shift: Tensor, temperature: float) -> Tensor:
    """Targets (M, K), each of which sums to 1, of the teacher's logits less `shift` (K,): that of `sinkhorn_shift`, or their
    running mean where batches are too small for it."""
    return ((logits.float() - shift) / temperature).softmax(1)


@torch.no_grad()
def moved_centre(centre: Tensor, total: Tensor, gather: Gather, *, momentum: float = 0.9) -> Tensor:
    """The running mean (K,) of logits after another batch, of which `total` (K + 1,) holds the sums and the number."""
    *sums, count = gather(total.float()[None]).sum(0).split([len(centre), 1])
    return torch.where(count > 0, momentum * centre + (1 - momentum) * sums[0] / count.clamp_min(1), centre)


# What the student learns -----------------------------------------------------------------------------------------------


def dino_loss(student: Tensor, targets: Tensor, *, same_crops: bool = False) -> Tensor:
    """Mean cross-entropy over all pairs of a student's crop and a teacher's crop of one slice.

    Args:
        student: logits (S, B, K).
        targets: (T, B, K), each sums to 1.
        same_crops: the student's crops are the teacher's, in one order; pairs of a crop with itself do not count.
    """
    log = (student.float() / STUDENT_TEMPERATURE).log_softmax(-1)
    with torch.autocast(log.device.type, enabled=False):
        pairs = -log.flatten(1) @ targets.float().flatten(1).T
    count = pairs.numel()
    if same_crops:
        count -= len(pairs)
        pairs = pairs - pairs.diag().diag()
    return pairs.sum() / (count * student.shape[1])


def pair_shares(large: int, small: int) -> tuple[float, float]:
    """Weights of the DINO loss of large crops among themselves and of small crops with large ones: their shares of all pairs.

    >>> [round(share, 3) for share in pair_shares(2, 8)]
    [0.111, 0.889]
    """
    among, across = large * (large - 1), large * small
    return among / (among + across), across / (among + across)


def masked_weights(masked: Tensor) -> Tensor:
    """One over the number of masked patches of its crop for each masked patch: (crops, L), bool, to (n,), in its order."""
    return (1 / masked.sum(1, keepdim=True).clamp_min(1)).expand(masked.shape)[masked]


def ibot_loss(
    features: Tensor,
    head: Callable[[Tensor], Tensor],
    known: Tensor,
    answers: Callable[[Tensor], Tensor],
    weights: Tensor,
    crops: int,
    *,
    rows: int,
) -> Tensor:
    """Weighted cross-entropy of masked patches, divided by the number of all crops, masked or not.

    Logits and targets are made for `rows` patches at a time, and made once more in the backward pass.

    Args:
        features: (n, D), the student's masked patches; n may be 0.
        head: to logits (n, K).
        known: (n, …), what the teacher makes its targets from.
        answers: from some rows of `known` to the targets, (rows, K).
        weights: (n,), as `masked_weights` gives them.
    """

    def part(features: Tensor, known: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            targets = answers(known)
        log = (head(features).float() / STUDENT_TEMPERATURE).log_softmax(1)
        return -(weights * (log * targets).sum(1)).sum()

    total = features.sum() * 0
    chunks = (tensor.split(rows) for tensor in (features, known, weights))
    for chunk in zip(*chunks, strict=True):
        total = total + checkpoint(part, *chunk, use_reentrant=False)
    return total / crops


def koleo(features: Tensor) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour on the sphere; 0 for a single sample.

    Args:
        features: (B, D), class tokens of different slices, never two views of one; gathered, if neighbours are to be sought
            among those of all processes.
    """
    if len(features) < 2:
        return features.sum() * 0
    with torch.autocast(features.device.type, enabled=False):
        u = normalize(features.float(), dim=1, eps=1e-8)
        with torch.no_grad():
            nearest = (u @ u.T).fill_diagonal_(-torch.inf).argmax(1)
        distance = (u - u[nearest] + 1e-8).norm(dim=1)
        return -(distance + 1e-8).log().mean()


def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities of all pairs of patches of an image; (B, P, D) each.

    The mean over pairs, not the paper's sum: the published weights go with it. Nothing flows back to `anchor`.
    """
    with torch.autocast(student.device.type, enabled=False):
        x, g = (normalize(tokens.float(), dim=2) for tokens in (student, anchor.detach()))
        return (x @ x.mT - g @ g.mT).square().mean()


def resized_tokens(tokens: Tensor, grid: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Tokens (B, P, D) of a grid (y, x), row by row, on another grid: bicubic, in float32, without a filter before."""
    maps = tokens.float().transpose(1, 2).unflatten(2, list(grid))
    return interpolate(maps, list(wanted), mode="bicubic").flatten(2).transpose(1, 2)
