"""Does the soft tokenizer learn, and do its guards guard? `pytest -m slow`.

96 synthetic volumes of ellipsoids in 32³ voxels; steps of 6, in turn at DA 0 and, four slices averaged, at DA 2; DA 1 is never
trained. Measured on the training volumes: at this size (a token for 16³ voxels) nothing carries over to others.

Measured, one seed, about 44 CPU seconds a run (November 2026): variance explained at DA 0, 1 and 2, codes used of 64, exp E H
- as tested                       0.79  0.82  0.87    64    3.5
- prior weighted .03 and 1        0.06  0.06  0.06     3    1.0
- slices summed                   0.03  0.47  0.83    64    3.3

The constant rate and the size of the ellipsoids (18 % of the voxels) were chosen after trials that failed. With a cosine to
zero tokens stay undecided (exp E H 30 and 43 on two similar sets), probably because the rate is low by the time sharpness is
asked for. With the cosine and radii of 3 to 9 the output stays constant (variance explained -0.05).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from pretrain.method import ParameterGroup, Stage, Step
from pretrain.methods.pumit.losses import code_counts, reconstruction, sharpness_weight, usage
from pretrain.methods.pumit.tokenizer import Tokenizer
from pretrain.networks.sac import Spacing
from pretrain.optimise import build_optimizer, set_rates

VOLUMES, STEPS, BATCH, CODES = 96, 1000, 6, 64


def ellipsoids(seed: int) -> Tensor:
    """Volumes (96, 1, 32, 32, 32) in [-1, 1]: one to four bright ellipsoids in the dark."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    grid = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij"), -1)
    volumes = torch.zeros(VOLUMES, 1, 32, 32, 32)
    for volume in volumes[:, 0]:
        for _ in range(int(torch.randint(1, 5, (1,), generator=generator))):
            distance = (((grid - uniform(6, 26, 3)) / uniform(5, 13, 3)) ** 2).sum(-1)
            volume[distance < 1] = uniform(0.3, 1, 1)
    return 2 * volumes - 1


def at_degree(volumes: Tensor, degree: int) -> Tensor:
    """The volumes with slices 2^degree as thick."""
    return nn.functional.avg_pool3d(volumes, (2**degree, 1, 1))


@dataclass(frozen=True)
class Outcome:
    explained: tuple[float, float, float]
    """Share of the variance at DA 0, 1, 2."""
    used: int
    """Codes that are the likeliest somewhere at DA 0 or 2."""
    choices: float
    """exp E H of the same tokens."""
    cpu_seconds: float


def learn(
    diversity: float = 0.1, sharpness: float | None = None, transposed_pool: Literal["sum", "mean"] = "mean"
) -> Outcome:
    """Train and measure."""
    began = time.process_time()
    outcome = measure(trained(diversity, sharpness, transposed_pool), ellipsoids(0), began)
    print(outcome)
    return outcome


@cache
def trained(diversity: float, sharpness: float | None, transposed_pool: Literal["sum", "mean"]) -> Tokenizer:
    """`sharpness`: a constant weight instead of the schedule to 0.05."""
    torch.manual_seed(0)
    model = Tokenizer(1, (16, 32, 64), CODES, transposed_pool=transposed_pool)
    volumes, order = ellipsoids(0), torch.Generator().manual_seed(1)
    stage = Stage("tokenizer", learning_rate=1e-3, weight_decay=0.0, schedule="constant")
    groups = [ParameterGroup(list(model.parameters()))]
    optimizer = build_optimizer(stage, groups)
    for index in range(STEPS):
        step, degree = Step("tokenizer", index, STEPS, index), 2 * (index % 2)
        set_rates(optimizer, stage, groups, step)
        image = at_degree(volumes[torch.randperm(VOLUMES, generator=order)[:BATCH]], degree)
        tokens, output = model(image, Spacing(degree))
        weight = sharpness_weight(step.progress, 0.05) if sharpness is None else sharpness
        prior = usage(tokens, lambda tensor: tensor).prior(diversity, weight)
        (sum(reconstruction(output, image).values()) + prior).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def measure(model: Tokenizer, volumes: Tensor, began: float) -> Outcome:
    explained, listed = [], []
    for degree in range(3):
        image = at_degree(volumes, degree)
        tokens, output = model(image, Spacing(degree))
        explained.append(1 - float(((output - image) ** 2).mean() / image.var()))
        if degree != 1:
            listed.append(tokens.flatten(0, -2))
    tokens = torch.cat(listed)
    used, choices = int((code_counts(tokens) > 0).sum()), float(usage(tokens, lambda tensor: tensor).choices)
    return Outcome((explained[0], explained[1], explained[2]), used, choices, time.process_time() - began)


@pytest.mark.slow
def test_volumes_come_back_at_every_thickness_and_the_codebook_is_used() -> None:
    outcome = learn()
    assert min(outcome.explained) > 0.5
    assert outcome.used >= CODES / 2
    assert outcome.choices < CODES / 8


@torch.no_grad()
def disagreement(model: Tokenizer, partner: int) -> float:
    """Mean KL between the tokens of each volume at DA 0 and those of the `partner`-th volume after it at DA 1."""
    volumes = ellipsoids(0)
    thin = model.soft_tokens(volumes, Spacing(0)).double().clamp_min(1e-12)
    thick = model.soft_tokens(at_degree(volumes, 1), Spacing(1)).double().clamp_min(1e-12).roll(-partner, 0)
    return float((thin * (thin / thick).log()).sum(-1).mean())


@pytest.mark.slow
def test_tokens_are_those_of_the_volume_whatever_its_slices() -> None:
    """DA 1 was never trained. The control are other volumes; measured 0.001 against 5.7 nats."""
    model = trained(0.1, None, "mean")
    own, other = disagreement(model, 0), disagreement(model, 1)
    print("KL to the volume with averaged slices", own, "to another", other)
    assert own < 0.5 * other


@pytest.mark.slow
def test_the_published_weights_of_the_prior_leave_the_codebook_unused() -> None:
    """.03 and 1 from the start belong to half a million steps with a perceptual loss. Else `used` would tell nothing."""
    assert learn(diversity=0.03, sharpness=1.0).used < CODES / 2


@pytest.mark.slow
def test_summed_slices_spoil_thin_ones() -> None:
    """Else it would not matter how a decoder makes thick slices."""
    assert learn(transposed_pool="sum").explained[0] < 0.5
