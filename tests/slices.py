"""What MedDINOv3's learning checks share: slices of phantoms in memory, all stages of a run on them, and probes of what tokens
know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from autoseg.anatomy import draw_phantom
from planners.configurations import with_configuration
from pretrain.encoders import encoder_info
from pretrain.method import Batch, PretrainMethod, Step, Target
from pretrain.networks.dino_vit import TOKEN, DinoViT
from pretrain.optimise import build_optimizer, phases, prepare_stage, set_rates, update_averages
from tests.geometries import batch_of, build
from tests.tiny import Array, dataset_json, tiny_plan

LEARNED, HELD_OUT = range(24), range(24, 32)
ORGANS = 14
_PROBED = (192, 240)
"""Pixels (y, x) of a slice whose tokens are probed: twice as many as it has, as for training."""
_SLICES = range(4, 32, 3)


@cache
def phantom(seed: int) -> tuple[Array, np.ndarray]:
    """A scan, normalised, and its organs (z, y, x)."""
    drawn = draw_phantom(np.random.default_rng(seed))
    image = np.clip(drawn.hu, -200, 300).astype(np.float32)
    return Array(((image - image.mean()) / image.std())[None], f"v{seed}", spacing=drawn.spacing_mm), drawn.labels


def small_network() -> Target:
    """A plan with a transformer of 4 blocks and 96 features, as in meddinov3.md 5 for a CPU."""
    plan = with_configuration(
        tiny_plan(dims=2) | {"autoseg": {"budget": "cpu", "gpu_memory_gb": 8, "labels": 14}}, "2d_vit"
    )
    plan["configurations"]["2d_vit"]["architecture"]["arch_kwargs"] |= {"embed_dim": 96, "depth": 4, "num_heads": 3}
    return Target(plan, "2d_vit", encoder_info(plan, "2d_vit", dataset_json()))


def new_method(seed: int = 0, **settings: Any) -> PretrainMethod:
    """The method with its settings for a CPU, for the scans that are learned from."""
    return build("meddinov3", small_network(), [phantom(i)[0].info for i in LEARNED], **settings)


def learn(
    method: Any,
    steps: int,
    stages: Sequence[str] | None = None,
    change: Callable[[Batch, np.random.Generator], None] = lambda batch, rng: None,
) -> dict[str, list[dict[str, float]]]:
    """Train as the loop does; the scalar terms of each step, by stage."""
    scans = {phantom(i)[0].info.id: phantom(i)[0] for i in LEARNED}
    learnable = [p for p in method.parameters() if p.requires_grad]
    rows: dict[str, list[dict[str, float]]] = {}
    for phase in phases(method.stages(), steps, stages):
        prepare_stage(method, phase.stage, learnable)
        groups = method.parameter_groups(phase.stage)
        optimizer = build_optimizer(phase.stage, groups)
        for index in range(phase.steps):
            step = Step(phase.stage.name, index, phase.steps, phase.first_step + index)
            set_rates(optimizer, phase.stage, groups, step)
            torch.manual_seed(step.global_index)
            batch = batch_of(method, scans, step, seed=step.global_index)
            change(batch, np.random.default_rng(index))
            terms = method.loss(batch, step)
            terms["loss"].backward()
            for part in phase.stage.clip_apart:
                nn.utils.clip_grad_norm_(method.get_submodule(part).parameters(), phase.stage.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            update_averages(method.momentum_pairs(), step)
            with torch.no_grad():
                method.after_step(batch, terms, step)
            row = {name: float(value.detach()) for name, value in terms.items() if value.ndim == 0}
            rows.setdefault(step.stage, []).append(row)
    return rows


@torch.no_grad()
def described(backbone: DinoViT, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some slices of each scan: class tokens (n, D), tenth of the scan's height (n,), patches (n · L, D), organ that most of
    a patch shows (n · L,)."""
    backbone.eval()
    class_tokens, patches, places, organs = [], [], [], []
    for seed in seeds:
        scan, labels = phantom(seed)
        planes = torch.from_numpy(scan.voxels[:, list(_SLICES)]).movedim(0, 1)
        known, found = backbone.tokens(interpolate(planes, _PROBED, mode="bicubic"))
        class_tokens.append(known)
        patches.append(found.flatten(0, 1))
        places.append(torch.tensor([10 * z // len(labels) for z in _SLICES]))
        shown = torch.from_numpy(labels[list(_SLICES)].astype(np.int64))
        shares = nn.functional.one_hot(shown, ORGANS).movedim(-1, 1).float()
        grid = [n // TOKEN for n in _PROBED]
        organs.append(nn.functional.adaptive_avg_pool2d(shares, grid).argmax(1).flatten())
    return tuple(torch.cat(parts) for parts in (class_tokens, places, patches, organs))  # type: ignore[return-value]


def nearest_share(known: Tensor, answers: Tensor, asked: Tensor, truth: Tensor, neighbours: int = 10) -> float:
    """Share of `asked` (n, D) whose answer most of their nearest among `known` have, by cosine."""
    order = (normalize(asked, dim=1) @ normalize(known, dim=1).T).topk(neighbours, 1).indices
    return float((answers[order].mode(1).values == truth).float().mean())


def probed(known: Tensor, answers: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Mean intersection over union, over the organs there are, of a linear classifier of frozen tokens."""
    mean, spread = known.mean(0), known.std(0) + 1e-6
    torch.manual_seed(0)
    layer = nn.Linear(known.shape[1], ORGANS)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(layer((known - mean) / spread), answers).backward()
        optimizer.step()
    with torch.no_grad():
        found = layer((asked - mean) / spread).argmax(1)
    shares = [
        float(((found == c) & (truth == c)).sum() / ((found == c) | (truth == c)).sum())
        for c in truth.unique().tolist()
    ]
    return float(np.mean(shares))


def knows(backbone: DinoViT) -> dict[str, float]:
    """How well held-out slices are placed by class tokens, and organs by patch tokens."""
    known, asked = described(backbone, list(LEARNED)), described(backbone, list(HELD_OUT))
    return {
        "place": nearest_share(known[0], known[1], asked[0], asked[1]),
        "organs": probed(known[2], known[3], asked[2], asked[3]),
    }
