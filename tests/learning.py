"""What learning checks share: scans with anatomy in memory, and a short run on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from pretrain.encoders import build_segmentation_network
from pretrain.method import Batch, PretrainMethod, Step
from pretrain.optimise import build_optimizer, set_rates
from tests.tiny import Array, dataset_json, tiny_plan

SHAPE = (34, 38, 36)


def anatomy(seed: int, blobs: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (blobs, 3) in shares of the scan, radii (blobs,) and intensities (blobs,)."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 0.9, (blobs, 3)), rng.uniform(0.08, 0.3, blobs), rng.uniform(-1, 1, blobs)


def scan(body: tuple[np.ndarray, np.ndarray, np.ndarray], rng: np.random.Generator, name: str) -> Array:
    """One body whose parts have moved by 2 % of the scan, in noise."""
    grid = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n for n in SHAPE], indexing="ij"), -1)
    voxels = rng.normal(0, 0.1, SHAPE)
    for centre, radius, level in zip(*body, strict=True):
        offset = grid - centre - rng.normal(0, 0.02, 3)
        voxels += level * np.exp(-(offset**2).sum(-1) / (2 * radius**2))
    return Array(voxels[None], name)


def noise_scan(rng: np.random.Generator, name: str) -> Array:
    """No anatomy: the same noise in all directions."""
    return Array(rng.normal(size=(1, *SHAPE)), name)


def network() -> nn.Module:
    """The specification's: three stages of 8, 16 and 32 features, stride 4 on all axes."""
    plan = tiny_plan()
    arguments = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "n_blocks_per_stage": [1, 1, 1],
    }
    return build_segmentation_network(plan, "3d_fullres", dataset_json())


def batch_of(method: PretrainMethod, scans: Sequence[Array], rng: np.random.Generator) -> Batch:
    named = {one.info.id: one for one in scans}
    drawn = method.draw(method.spec, [one.info for one in scans], rng, Step("main", 0, 1, 0))
    return method.collate([method.sample(method.spec, named[case], how, rng) for case, how in drawn])  # type: ignore[arg-type]


def learn(
    method: PretrainMethod,
    scans: Sequence[Array],
    steps: int,
    seed: int,
    change: Callable[[Batch, np.random.Generator], None] = lambda batch, rng: None,
) -> list[dict[str, float]]:
    """Train; the scalar terms of each step. `change` alters a batch, to shuffle what is to be learned."""
    stage, rng = method.stages()[0], np.random.default_rng([seed, 1])
    groups = method.parameter_groups(stage)
    optimizer = build_optimizer(stage, groups)
    torch.manual_seed(seed)
    method.train()
    rows = []
    for index in range(steps):
        step = Step("main", index, steps, index)
        batch = batch_of(method, scans, rng)
        change(batch, rng)
        set_rates(optimizer, stage, groups, step)
        terms = method.loss(batch, step)
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(batch, terms, step)
        rows.append({name: float(value.detach()) for name, value in terms.items() if value.ndim == 0})
    return rows


def mean(rows: Sequence[dict[str, float]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


@torch.no_grad()
def measure(method: PretrainMethod, scans: Sequence[Array], batches: int = 20) -> dict[str, float]:
    """Mean terms on held-out scans, always the same batches."""
    method.eval()
    rng = np.random.default_rng(99)
    rows = []
    for _ in range(batches):
        terms = method.loss(batch_of(method, scans, rng), Step("main", 0, 1, 0))
        rows.append({name: float(value) for name, value in terms.items() if value.ndim == 0})
    return {name: mean(rows, name) for name in rows[0]}
