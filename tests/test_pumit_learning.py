"""Does masked prediction learn what the picture shows, and is a token the same whatever the slices? `pytest -m slow`.

256 synthetic images of 64² pixels (DA 5) with ellipses, 64 others held out; 16 tokens an image, of which 7 are seen.

Measured held out, one seed, 28 November 2026, two shared cores, about three minutes: variance explained 0.86, exp E H 5.3 of 64
codes, kl_share 0.55, from the visible tokens of other images 0.71: the rest of what is gained over the mean of all tokens is
places, which the tokenizer knows from the borders that its 3³ kernels see.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from planners.configurations import with_configuration
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.method import Batch, Step, Target
from pretrain.methods.pumit.method import PUMITPretraining
from pretrain.methods.pumit.sampler import Crops
from pretrain.methods.pumit.settings import PUMITConfig
from pretrain.optimise import build_optimizer, prepare_stage, set_rates
from tests.tiny import Array, dataset_json, tiny_plan

IMAGES, HELD_OUT, BATCH = 256, 64, 16
STEPS = {"tokenizer": 300, "mim": 500}
CONFIGURATION = "3d_fullres_sac"


def ellipses(seed: int) -> np.ndarray:
    """An image (1, 1, 64, 64) of one to three bright ellipses in the dark, of 10 to 28 pixels."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(64.0), np.arange(64.0), indexing="ij"), -1)
    image = np.zeros((64, 64))
    for _ in range(rng.integers(1, 4)):
        distance = (((grid - rng.uniform(8, 56, 2)) / rng.uniform(10, 28, 2)) ** 2).sum(-1)
        image[distance < 1] = rng.uniform(0.3, 1)
    return image[None, None]


def new_method() -> PUMITPretraining:
    plan = tiny_plan() | {"autoseg": {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}}
    plan = with_configuration(plan, CONFIGURATION)
    config = PUMITConfig(**PUMITPretraining.presets["cpu"])
    target = Target(plan, CONFIGURATION, encoder_info(plan, CONFIGURATION, dataset_json(1)))
    spec = PUMITPretraining.plan(target, [Array(ellipses(0)).info], config)
    crops = Crops((1, 4, 4), BATCH, zoom=0.0)
    spec = replace(spec, crops={"tokenizer": crops, "mim": crops}, rotate=0.0, intensity=0.0)
    torch.manual_seed(0)
    return PUMITPretraining(build_segmentation_network(plan, CONFIGURATION, dataset_json(1)), spec, config)


def batch_of(method: PUMITPretraining, pool: dict[str, Array], step: Step, seed: int) -> Batch:
    drawn = method.draw(method.spec, [image.info for image in pool.values()], np.random.default_rng(seed), step)
    rngs = (np.random.default_rng([seed, number]) for number in range(len(drawn)))
    return method.collate(
        [method.sample(method.spec, pool[case], view, rng) for (case, view), rng in zip(drawn, rngs, strict=True)]  # type: ignore[arg-type]
    )


def learn(method: PUMITPretraining, stage_name: str, pool: dict[str, Array]) -> None:
    (stage,) = (stage for stage in method.stages() if stage.name == stage_name)
    prepare_stage(method, stage, list(method.parameters()))
    groups = method.parameter_groups(stage)
    optimizer = build_optimizer(stage, groups)
    for index in range(STEPS[stage_name]):
        step = Step(stage_name, index, STEPS[stage_name], index)
        set_rates(optimizer, stage, groups, step)
        method.loss(batch_of(method, pool, step, index), step)["loss"].backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group.parameters], stage.clip_norm or 1e9)
        optimizer.step()
        optimizer.zero_grad()
    method.eval()


@torch.no_grad()
def measure(method: PUMITPretraining, stage: str, pool: dict[str, Array], others: bool = False) -> dict[str, float]:
    """Means over eight held-out batches; `others`: the transformer sees other images than the tokenizer."""
    step = Step(stage, STEPS[stage] - 1, STEPS[stage], 0)
    found: dict[str, list[float]] = {}
    for seed in range(8):
        batch = batch_of(method, pool, step, 10_000 + seed)
        if others:
            answers = method.answers({**batch, "image": batch["image"].roll(1, 0)})
            method.answers = lambda _, answers=answers: answers  # type: ignore[method-assign]
        for name, value in method.loss(batch, step).items():
            found.setdefault(name, []).append(float(value))
        if others:
            del method.answers
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.fixture(scope="module")
def trained() -> tuple[PUMITPretraining, dict[str, Array]]:
    made = {f"v{n}": Array(ellipses(n), f"v{n}") for n in range(IMAGES + HELD_OUT)}
    pool = dict(list(made.items())[:IMAGES])
    held_out = dict(list(made.items())[IMAGES:])
    method = new_method()
    for stage in STEPS:
        learn(method, stage, pool)
        print(stage, {k: round(v, 3) for k, v in measure(method, stage, held_out).items()})
    return method, held_out


@pytest.mark.slow
def test_masked_tokens_are_predicted_from_what_is_seen(trained: tuple[PUMITPretraining, dict[str, Array]]) -> None:
    """The control: with the visible tokens of another image only places are left to answer from, which say something too."""
    method, held_out = trained
    own, others = (measure(method, "mim", held_out, others)["kl_share"] for others in (False, True))
    print("kl_share", own, "from other images", others)
    assert own < 0.65
    assert own < others - 0.1


@pytest.mark.slow
def test_tokens_carry_the_picture(trained: tuple[PUMITPretraining, dict[str, Array]]) -> None:
    """Else there was nothing to predict: codes may also name places."""
    method, held_out = trained
    assert measure(method, "tokenizer", held_out)["explained"] > 0.5
