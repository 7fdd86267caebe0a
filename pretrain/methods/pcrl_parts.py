"""What PCRL puts on a U-Net: the body without its output layers, TransAtt, the embedding with its running norm, the
queue, the contrastive losses, and the sum of a loss whose parts need not be in memory together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from planners.errors import PlanError
from pretrain.encoders import encoder_of

_NORM_EPSILON = 1e-5
_LEAST_WEIGHT = 0.05
_NCE_EPSILON = 1e-5


class Body(nn.Module):
    """Encoder and decoder of a plan's U-Net, their tensors named as in the network; its output layers stay outside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder_of(network)
        decoder = getattr(network, "decoder", None)
        if not hasattr(decoder, "transpconvs"):
            raise PlanError(
                "PCRL needs the decoder of a U-Net",
                where="the network of the plan's configuration",
                found=type(network).__name__,
                expected="a network whose decoder has transpconvs and stages, as nnU-Net's",
                remedy="choose another configuration with -c",
            )
        self.decoder = nn.Module()
        self.decoder.transpconvs, self.decoder.stages = decoder.transpconvs, decoder.stages  # type: ignore[union-attr]

    def decode(self, maps: Sequence[Tensor], *, skips: bool = True) -> list[Tensor]:
        """The output of every stage of the decoder, coarsest first, from the encoder's maps, finest first.

        Without `skips` the stages see zeros in their place: then nothing gets past the deepest map.
        """
        outputs, below = [], maps[-1]
        parts: Any = self.decoder
        for up, stage, skip in zip(parts.transpconvs, parts.stages, maps[-2::-1], strict=True):
            below = stage(torch.cat([up(below), skip if skips else torch.zeros_like(skip)], 1))
            outputs.append(below)
        return outputs


class TransAtt(nn.Module):
    """Gates the channels of a map by a vector: (B, channels, *space), (B, length) → (B, channels, *space).

    The paper's version has an outer product too; its authors took it out because it was not stable (Luchixiang/PCRL,
    issue 4).
    """

    def __init__(self, length: int, channels: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(length, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, features: Tensor, code: Tensor) -> Tensor:
        gates = self.layers(code)
        return features * gates.reshape(*gates.shape, *[1] * (features.ndim - 2))


class RunningNorm(nn.Module):
    """(N, features) minus a running mean, over a running standard deviation; the same in training and evaluation.

    Pooled features behind instance norms hardly differ between images; without their mean the embeddings collapse. The
    statistics are those of the steps before, so a batch of two works and no gradient passes through them.
    """

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("square", torch.ones(features))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        variance = (self.square - self.mean**2).clamp(min=0)
        return (x - self.mean) / (variance + _NORM_EPSILON).sqrt()

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move the statistics towards those of a batch, which may be empty: the mean of all batches at first, then of
        about the last twenty."""
        if not len(x):
            return
        self.count += 1
        weight = max(_LEAST_WEIGHT, 1 / int(self.count))
        self.mean.lerp_(x.mean(0).to(self.mean), weight)
        self.square.lerp_((x**2).mean(0).to(self.square), weight)


class Embedding(nn.Module):
    """A map to a point on the unit sphere: pooling, running norm, two linear layers."""

    def __init__(self, channels: int, width: int, *, pooling: str, running_norm: bool) -> None:
        super().__init__()
        self.pooling = pooling
        features = channels * len(pooling.split("+"))
        self.norm = RunningNorm(features) if running_norm else None
        self.layers = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, *space) → embeddings (B, width) of length 1, and the pooled features (B, …) for the norm's
        update."""
        with torch.autocast(features.device.type, enabled=False):
            flat = full(features).flatten(2)
            pooled = torch.cat([flat.mean(2), flat.amax(2)], 1) if self.pooling == "avg+max" else flat.mean(2)
            return normalize(self.layers(pooled if self.norm is None else self.norm(pooled)), dim=1), pooled.detach()


class KeyQueue(nn.Module):
    """The last keys (size, width), each with its case: what contrast takes its negatives from. Starts empty."""

    keys: Tensor
    cases: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, width))
        self.register_buffer("cases", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def counted(self, cases: Tensor, *, mask_same_case: bool) -> Tensor:
        """Which entries are negatives for queries of `cases` (B,): (B, size). Empty ones never, nor those of the own
        case."""
        there = (self.cases >= 0).expand(len(cases), -1)
        return there & (self.cases[None] != cases[:, None]) if mask_same_case else there

    @property
    def filled(self) -> int:
        return int((self.cases >= 0).sum())

    @torch.no_grad()
    def push(self, keys: Tensor, cases: Tensor) -> None:
        """Put keys (n, width) over the oldest entries; a case of -1 is a key that must not be used."""
        size = len(self.keys)
        keys, cases = keys[-size:], cases[-size:]
        places = (self.pointer + torch.arange(len(keys), device=self.keys.device)) % size
        self.keys[places] = keys.to(self.keys)
        self.cases[places] = cases
        self.pointer.copy_((self.pointer + len(keys)) % size)


class Graph:
    """Adds up a loss: as one graph, or with `run` part by part, so that one decoder pass is in memory at a time.

    Then parts hang on copies of the encoder's maps, and `close` sends the gradients gathered there through the encoder,
    once.
    """

    def __init__(self, run: Callable[[Tensor], None] | None = None) -> None:
        self._run = run
        self._cuts: list[tuple[Sequence[Tensor], list[Tensor]]] = []
        self.total: Tensor | float = 0.0

    def cut(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """What the parts use instead of `maps`."""
        if self._run is None:
            return list(maps)
        leaves = [one.detach().requires_grad_() for one in maps]
        self._cuts.append((maps, leaves))
        return leaves

    def add(self, part: Tensor) -> None:
        if self._run is not None:
            self._run(part)
            part = part.detach()
        self.total = self.total + part

    def close(self) -> None:
        """After the last part that uses what was cut."""
        for maps, leaves in self._cuts:
            used = [(one, leaf.grad) for one, leaf in zip(maps, leaves, strict=True) if leaf.grad is not None]
            torch.autograd.backward([one for one, _ in used], [gradient for _, gradient in used])
        self._cuts.clear()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(N, width) and (M, width) of unit length → (N, M), in full precision within autocast too: divided by a temperature,
    what bfloat16 loses of a cosine is as large as what tells scans apart."""
    with torch.autocast(a.device.type, enabled=False):
        return full(a) @ b.to(full(a)).T


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """How far each query (B, width) is from choosing its key (B, width) among `negatives` (K, width), of which those
    `counted` (B, K) are candidates: (B,)."""
    own = (query * key).sum(1, keepdim=True)
    others = cosines(query, negatives).masked_fill(~counted, -math.inf)
    logits = torch.cat([own, others], 1) / temperature
    return logits.logsumexp(1) - logits[:, 0]


def noise_contrast(own: Tensor, others: Tensor, counted: Tensor, images: int) -> Tensor:
    """The loss of the authors' code: tell keys from noise of density 1 / images. Scores own (B,), others (B, K) → (B,).

    Source: Luchixiang/PCRL:pytorch/lib/NCECriterion.py, with the number of images where that has the number of batches.
    """
    noise = counted.sum(1) / images
    found = (own / (own + noise + _NCE_EPSILON)).log()
    rejected = (noise[:, None] / (others + noise[:, None] + _NCE_EPSILON)).clamp(min=_NCE_EPSILON**2).log()
    return -(found + (rejected * counted).sum(1))


def full(x: Tensor) -> Tensor:
    """At least single precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of values (B,) over the valid samples; 0 without any."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


def squared_errors(answer: Tensor, target: Tensor) -> Tensor:
    """Mean over voxels and channels: (B, channels, *space) → (B,)."""
    return ((full(answer) - target) ** 2).flatten(1).mean(1)


def metric(name: str, values: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """The mean of values (B,) over the samples that count; nothing without any, so that no average takes it in."""
    return {name: mean_over(values.detach(), counted)} if counted.any() else {}


def explained(name: str, errors: Tensor, target: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """`explained_NAME`: share of the variance of the targets (B, channels, *space) that errors (B,) leave none of; 1 is
    perfect, 0 is what each target's mean reaches. Nothing where no sample counts."""
    if not counted.any():
        return {}
    variance = mean_over(target.flatten(2).var(2, correction=0).mean(1), counted)
    return {f"explained_{name}": 1 - mean_over(errors.detach(), counted) / variance.clamp(min=1e-8)}


def mean_similarity(embeddings: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """`similarity`: the mean cosine between different samples (B, width) of unit length; nothing unless two count."""
    embeddings = embeddings[counted.bool()].detach()
    count = len(embeddings)
    if count < 2:
        return {}
    each = cosines(embeddings, embeddings)
    return {"similarity": (each.sum() - each.diagonal().sum()) / (count * (count - 1))}
