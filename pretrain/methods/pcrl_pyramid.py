"""PCRLv2 (mode `v2`): restoration and comparison at every scale of the decoder, without skips; large and small views.

Zhou et al., "A Unified Visual Information Preservation Framework for Self-supervised Pre-training in Medical Image
Analysis", TPAMI 2023, arXiv:2301.00772. Consulted: RL4M/PCRLv2 (MIT). One network, no average, no queue. Zeros take the
place of the skips, so that shapes are those of the network that is trained later; the half of each kernel that sees
them keeps its first values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from pretrain.crops import LINEAR
from pretrain.method import Batch, MomentumPair, Step, Terms
from pretrain.methods.pcrl_parts import (
    Body,
    Graph,
    explained,
    full,
    mean_over,
    mean_similarity,
    squared_errors,
)
from pretrain.methods.pcrl_picture import Panel

if TYPE_CHECKING:
    from pretrain.methods.pcrl import PCRLConfig, PCRLSpec


class Predictor(nn.Module):
    """One scale's comparison head: (N, channels) → (N, channels), twice as wide inside.

    Both norms take their statistics from the views of the batch and keep none, so training and evaluation compute the
    same. Those of the steps before, as PCRL's contrast takes them, lag behind features that chase each other: the
    comparison then gets worse from step to step.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, track_running_stats=False)
        self.layers = nn.Sequential(
            nn.Linear(channels, 2 * channels),
            nn.BatchNorm1d(2 * channels, track_running_stats=False),
            nn.ReLU(inplace=True),
            nn.Linear(2 * channels, channels),
        )

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The normed features z and their prediction p."""
        z = self.norm(pooled)
        return z, self.layers(z)


class Pyramid(nn.Module):
    """Mode `v2`."""

    def __init__(self, network: nn.Module, spec: PCRLSpec, config: PCRLConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.body = Body(network)
        widths = list(reversed(self.body.encoder.output_channels[:-1]))
        self.predictors = nn.ModuleList(Predictor(width) for width in widths)
        self.middle_heads = nn.ModuleList(restoration_head(width, spec) for width in widths)
        self.head = restoration_head(widths[-1], spec)

    def pairs(self) -> Sequence[MomentumPair]:
        return []

    def terms(self, batch: Batch, step: Step, graph: Graph) -> Terms:
        """`restore` (full size), `middle` (one scale, fading), `compare` (the two large views), `compare_local`."""
        views, small, valid = batch["input"], batch["local"], batch["valid"]
        cases, count = small.shape[:2]
        scales = [int(i) for i in batch["scales"][0]]
        target = batch["clean"][:, 0]
        large = self.decoded(views.transpose(0, 1).flatten(0, 1))
        local = self.decoded(small.transpose(0, 1).flatten(0, 1))

        errors = squared_errors(self.head(large[-1][:cases]), target)
        error = mean_over(errors, valid)
        middle = mean_over(squared_errors(self.middle(large, scales[0], cases), target), valid)
        # What shows nothing stays out of the norms' statistics; where all is so, it has no weight.
        seen = valid.bool() if valid.any() else torch.ones_like(valid, dtype=torch.bool)
        pooled, heads = [], []
        with torch.autocast(views.device.type, enabled=False):
            for predictor, a, b in zip(self.predictors, large, local, strict=True):
                # Views are the first axis: the two large ones, then the small ones.
                rows = torch.cat([full(maps).flatten(2).mean(2) for maps in (a, b)]).unflatten(0, (2 + count, cases))
                pooled.append(rows[0])
                z, p = predictor(rows[:, seen].flatten(0, 1))
                heads.append((z.unflatten(0, (2 + count, -1)), p.unflatten(0, (2 + count, -1))))

            def compare(a: int, b: int, scale: int) -> Tensor:
                z, p = heads[scale]
                return mean_over(comparison(p[a], p[b], z[a], z[b]), valid[seen])

            compared = compare(0, 1, scales[0])
            pairs = [(view, 2 + number) for number in range(count) for view in (0, 1)]
            around = [compare(*pair, scale) for pair, scale in zip(pairs, scales[1:], strict=True)]
            compared_local = torch.stack(around).mean()
        loss = error + fading(step) * middle + compared + compared_local
        graph.add(loss)
        return {
            "loss": graph.total,  # type: ignore[dict-item]
            "restore": error.detach(),
            "middle": middle.detach(),
            "compare": compared.detach(),
            "compare_local": compared_local.detach(),
            "shown": valid.mean(),
            **explained("restore", errors, target, valid),
            # Before the norm: behind it even features that are all alike are spread out.
            **mean_similarity(normalize(pooled[scales[0]], dim=1), valid),
        }

    def decoded(self, images: Tensor) -> list[Tensor]:
        """The decoder's stages, coarsest first, without skips."""
        return self.body.decode(list(self.body.encoder(images)), skips=False)

    def middle(self, stages: Sequence[Tensor], scale: int, cases: int) -> Tensor:
        """The image restored from one scale for the first `cases` rows, at full size."""
        image = self.middle_heads[scale](stages[scale][:cases])
        return interpolate(full(image), size=self.spec.patch, mode=LINEAR[len(self.spec.patch)], align_corners=False)

    def update(self, batch: Batch, terms: Terms, gather: Callable[[Tensor], Tensor]) -> None:
        """Nothing is kept from step to step."""

    @torch.no_grad()
    def panels(self, batch: Batch, case: int) -> list[list[Panel]]:
        """One row: what the encoder sees, the target, and the image restored from the coarsest scale to the finest."""
        image = batch["input"][case : case + 1, 0]
        stages = self.decoded(image)
        rows = [[Panel("the encoder sees", image[0]), Panel("wanted", batch["clean"][case, 0])]]
        rows[0].append(Panel("restored, no skips", self.head(stages[-1])[0]))
        coarse = [0, len(stages) // 2]
        middles = [Panel(f"from scale {i + 1} of {len(stages)}", self.middle(stages, i, 1)[0]) for i in coarse]
        rows.append([*middles, Panel("a small view", batch["local"][case, 0])])
        return rows


def comparison(p_a: Tensor, p_b: Tensor, z_a: Tensor, z_b: Tensor) -> Tensor:
    """Minus the mean of cos(p_a, z_b) and cos(p_b, z_a), (B, channels) → (B,); no gradient reaches z."""
    first = (normalize(p_a, dim=1) * normalize(z_b.detach(), dim=1)).sum(1)
    second = (normalize(p_b, dim=1) * normalize(z_a.detach(), dim=1)).sum(1)
    return -0.5 * (first + second)


def fading(step: Step) -> float:
    """Weight of the middle scale: half a cosine from 1 to 0 over the run."""
    return 0.5 * (1 + math.cos(math.pi * step.progress))


def restoration_head(width: int, spec: PCRLSpec) -> nn.Sequential:
    """A map to an image: 3³ convolution, instance norm, leaky ReLU, 1³ convolution."""
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if len(spec.patch) == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    return nn.Sequential(
        conv(width, width, 3, padding=1), norm(width, affine=True), nn.LeakyReLU(), conv(width, spec.channels, 1)
    )
