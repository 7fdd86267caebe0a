"""What MedDINOv3's learning checks share: slices of phantoms in memory, all stages of a run on them, and probes of what tokens
know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, interpolate, normalize, one_hot

from autoseg.anatomy import draw_phantom
from planners.configurations import with_configuration
from pretrain.encoders import encoder_info
from pretrain.method import Batch, PretrainMethod, Step, Target
from pretrain.methods.meddinov3.losses import resized_tokens
from pretrain.methods.meddinov3.method import MedDINOv3Pretraining
from pretrain.networks.dino import MedDINOv3
from pretrain.networks.dino_vit import TOKEN, DinoViT
from pretrain.optimise import build_optimizer, phases, prepare_stage, set_rates, update_averages
from tests.geometries import batch_of, build
from tests.tiny import Array, dataset_json, tiny_plan

LEARNED, HELD_OUT = range(24), range(24, 32)
ORGANS = 14
_COARSE, _FINE = (96, 128), (288, 368)
"""Pixels (y, x) of slices whose class tokens and patch tokens are looked at: about as many as they have, and three times."""
_PLACED, _SLICES = range(1, 33), range(3, 32, 4)
"""The slices whose class tokens, and those whose patch tokens are looked at."""


@cache
def phantom(seed: int) -> tuple[Array, np.ndarray]:
    """A scan, normalised, and its organs (z, y, x)."""
    drawn = draw_phantom(np.random.default_rng(seed))
    image = np.clip(drawn.hu, -200, 300).astype(np.float32)
    return Array(((image - image.mean()) / image.std())[None], f"v{seed}", spacing=drawn.spacing_mm), drawn.labels


def small_network() -> Target:
    """What a plan for a CPU has: a transformer of 4 blocks and 96 features."""
    plan = with_configuration(
        tiny_plan(dims=2) | {"autoseg": {"budget": "cpu", "gpu_memory_gb": 8, "labels": 14}}, "2d_vit"
    )
    return Target(plan, "2d_vit", encoder_info(plan, "2d_vit", dataset_json()))


def new_method(seed: int = 0, **settings: Any) -> PretrainMethod:
    """The method with its settings for a CPU, for the scans that are learned from."""
    usual = {key: MedDINOv3Pretraining.presets["cpu"][key] for key in ("batch", "large", "small")}
    return build("meddinov3", small_network(), [phantom(i)[0].info for i in LEARNED], **{**usual, **settings})


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


@dataclass(frozen=True)
class Known:
    """What a transformer says of some slices of each scan."""

    places: Tensor
    """Class tokens (n, D) of slices about as large as crops."""
    heights: Tensor
    """Tenth of the scan's height (n,)."""
    patches: Tensor
    """Patch tokens (m, D) of enlarged slices, where one organ fills most of a patch; of what is no organ a few."""
    organs: Tensor
    """(m,)."""


@torch.no_grad()
def described(backbone: DinoViT, seeds: Sequence[int]) -> Known:
    """Of held-out scans or others; the same patches each time."""
    backbone.eval()
    found = []
    chance = torch.Generator().manual_seed(0)
    for seed in seeds:
        scan, labels = phantom(seed)
        planes = torch.from_numpy(scan.voxels).movedim(0, 1)
        places, _ = backbone.tokens(interpolate(planes[list(_PLACED)], _COARSE, mode="bicubic"))
        _, patches = backbone.tokens(interpolate(planes[list(_SLICES)], _FINE, mode="bicubic"))
        shown = torch.from_numpy(labels[list(_SLICES)].astype(np.int64))
        shares = nn.functional.one_hot(shown, ORGANS).movedim(-1, 1).float()
        share, organs = nn.functional.adaptive_avg_pool2d(shares, [n // TOKEN for n in _FINE]).flatten(2).max(1)
        kept = (share > 0.6) & ((organs > 0) | (torch.rand(organs.shape, generator=chance) < 0.03))
        heights = torch.tensor([10 * z // len(labels) for z in _PLACED])
        found.append((places, heights, patches[kept], organs[kept]))
    return Known(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def nearest_share(known: Known, asked: Known, neighbours: int = 10) -> float:
    """Share of slices whose height most of their nearest by class tokens have."""
    order = (normalize(asked.places, dim=1) @ normalize(known.places, dim=1).T).topk(neighbours, 1).indices
    return float((known.heights[order].mode(1).values == asked.heights).float().mean())


def probed(known: Known, asked: Known) -> float:
    """Mean intersection over union, over organs of some size, of a linear classifier of frozen patch tokens."""
    common = torch.tensor([organ for organ in known.organs.unique().tolist() if (known.organs == organ).sum() >= 40])
    mean, spread = known.patches.mean(0), known.patches.std(0) + 1e-6
    (x, y), (asked_x, truth) = (
        (((one.patches - mean) / spread)[torch.isin(one.organs, common)], one.organs[torch.isin(one.organs, common)])
        for one in (known, asked)
    )
    probe = LogisticRegression(max_iter=200, C=0.1, class_weight="balanced").fit(x.numpy(), y.numpy())
    return float(jaccard_score(truth.numpy(), probe.predict(asked_x.numpy()), average="macro"))


def knows(backbone: DinoViT) -> dict[str, float]:
    """How well held-out slices are placed by class tokens, and organs by patch tokens."""
    known, asked = described(backbone, list(LEARNED)), described(backbone, list(HELD_OUT))
    return {"place": nearest_share(known, asked), "organs": probed(known, asked)}


@torch.no_grad()
def held_out(method: Any, stage: str, change: Callable[[Batch], None] = lambda batch: None) -> dict[str, float]:
    """Mean terms on held-out slices."""
    method.eval()
    scans = {phantom(i)[0].info.id: phantom(i)[0] for i in HELD_OUT}
    rows = []
    for number in range(8):
        step = Step(stage, 99, 100, 99)
        batch = batch_of(method, scans, step, seed=number)
        change(batch)
        rows.append({name: float(v) for name, v in method.loss(batch, step).items() if v.ndim == 0})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@torch.no_grad()
def same_at_twice_the_size(backbone: DinoViT) -> float:
    """Mean correlation, as a cosine, of each patch's similarities to all others at the size of a crop and at twice that."""
    backbone.eval()
    found = []
    for seed in HELD_OUT:
        planes = torch.from_numpy(phantom(seed)[0].voxels[:, [10, 17, 24]]).movedim(0, 1)
        maps = []
        for factor in (1, 2):
            _, tokens = backbone.tokens(interpolate(planes, [factor * n for n in _COARSE], mode="bicubic"))
            grid = [factor * n // TOKEN for n in _COARSE]
            tokens = resized_tokens(tokens, grid, [n // TOKEN for n in _COARSE])
            tokens = normalize(tokens, dim=-1)
            maps.append(tokens @ tokens.mT)
        found.append(float(cosine_similarity(*maps, dim=-1).mean()))
    return float(np.mean(found))


def segmented(seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Slices of scans (n, 1, y, x) and their organs (n, y, x), about as large as crops."""
    images, organs = [], []
    for seed in seeds:
        scan, labels = phantom(seed)
        images.append(interpolate(torch.from_numpy(scan.voxels).movedim(0, 1), _COARSE, mode="bicubic"))
        organs.append(interpolate(torch.from_numpy(labels.astype(np.float32))[:, None], _COARSE)[:, 0].long())
    return torch.cat(images), torch.cat(organs)


def dice_with_rested(backbone: DinoViT, steps: int, learned: Sequence[int]) -> tuple[float, float]:
    """Mean Dice of 13 organs in held-out slices after a decoder alone was trained on slices of few scans, and the most that
    one organ everywhere would reach."""
    torch.manual_seed(0)
    sizes = {
        "embed_dim": backbone.embed_dim,
        "depth": len(backbone.blocks),
        "num_heads": backbone.blocks[0].attn.num_heads,
    }
    network = MedDINOv3(1, ORGANS, **sizes)
    network.encoder.load_state_dict(backbone.state_dict())
    network.encoder.requires_grad_(False)
    images, organs = segmented(learned)
    weights = torch.bincount(organs.flatten(), minlength=ORGANS).float().clamp_min(1).rsqrt()
    optimizer = torch.optim.AdamW(network.decoder.parameters(), 3e-3, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps) ** 0.9
        drawn = torch.randint(len(images), (16,))
        scores = network(images[drawn])
        shares, truth = scores.softmax(1), one_hot(organs[drawn], ORGANS).movedim(-1, 1).float()
        overlap, mass = (shares * truth).sum((0, 2, 3)), (shares + truth).sum((0, 2, 3))
        there = truth.sum((0, 2, 3)) > 0
        dice = ((2 * overlap + 1) / (mass + 1))[1:][there[1:]].mean()
        (cross_entropy(scores, organs[drawn], weight=weights / weights.mean()) + 1 - dice).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    asked, truth = segmented(HELD_OUT[:4])
    with torch.no_grad():
        found = torch.cat([network(part).argmax(1) for part in asked.split(32)])
    counts = torch.bincount(truth.flatten(), minlength=ORGANS)[1:]
    both = [2 * ((found == k) & (truth == k)).sum() / ((found == k).sum() + counts[k - 1]) for k in range(1, ORGANS)]
    everywhere = (2 * counts / (truth.numel() + counts)).max() / len(counts)
    return float(torch.stack(both).mean()), float(everywhere)
