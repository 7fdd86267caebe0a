"""Does VoCo learn? The specification's learning check: minutes, so `pytest -m slow`.

Twenty-four synthetic volumes of the same twelve textured blobs, slightly moved, to learn from and eight to measure on. Expected
after 60 steps: held-out intra from about 0.6 to 0.5 or less, top-1 place 0.33 or more (uniform 0.11, always the centre 0.25).
With labels shuffled between crops nothing can be learned. Measured (16 CPU seconds each): seed 0 intra 0.585 to 0.408, place
0.29 to 0.48; seed 1 0.634 to 0.459, 0.30 to 0.38; shuffled labels place 0.29 to 0.23.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.encoders import build_segmentation_network
from pretrain.method import Batch, Step
from pretrain.methods.voco import VoCo, VoCoConfig, VoCoSpec
from pretrain.methods.voco_geometry import Layout
from pretrain.optimise import build_optimizer, rate_factor, update_averages
from tests.tiny import Array, dataset_json, tiny_plan

SHAPE = (16, 48, 48)
STEPS = 60


def volumes(count: int, seed: int) -> list[Array]:
    """Blobs with a texture each at places that all volumes share, moved by 2 % of the size, in noise.

    They are wide, so that textures mix: a network that has learned nothing must not find a crop by its contrast alone.
    """
    anatomy = np.random.default_rng(7)
    centres = anatomy.uniform(0.1, 0.9, (12, 3))
    directions = anatomy.normal(size=(12, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    waves = directions * anatomy.uniform(20, 60, (12, 1))
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n for n in SHAPE], indexing="ij"), -1)
    made = []
    for number in range(count):
        voxels = rng.normal(0, 0.1, SHAPE)
        for centre, wave in zip(centres, waves, strict=True):
            offset = grid - centre - rng.normal(0, 0.02, 3)
            voxels += np.exp(-(offset**2).sum(-1) / (2 * 0.3**2)) * np.sin(offset @ wave)
        made.append(Array(voxels[None], f"v{number}"))
    return made


def model(seed: int) -> VoCo:
    plan = tiny_plan()
    arguments = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {
        "features_per_stage": [16, 32, 64],
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "n_blocks_per_stage": [1, 1, 1],
    }
    torch.manual_seed(seed)
    network = build_segmentation_network(plan, "3d_fullres", dataset_json())
    layout = Layout((16, 16, 16), (1, 3, 3), False, 1.0)
    spec = VoCoSpec(layout, (1.0, 1.0, 1.0), volumes=4, random_crops=2, mirror=0.2, turn=0, shift=0)
    return VoCo(network, spec, VoCoConfig(hidden=256, learning_rate=1e-3))


def batch_of(voco: VoCo, chosen: list[Array], rng: np.random.Generator) -> Batch:
    return voco.collate([voco.sample(voco.spec, case, None, rng) for case in chosen])  # type: ignore[arg-type]


def learn(voco: VoCo, seed: int, *, shuffled: bool = False) -> dict[str, float]:
    """Train for 60 steps; held-out metrics before (`…_before`) and after."""
    learned, held_out = volumes(24, 1), volumes(8, 2)
    fixed = np.random.default_rng(99)
    plain = [batch_of(voco, held_out[4 * (i % 2) : 4 * (i % 2) + 4], fixed) for i in range(16)]

    @torch.no_grad()
    def measure() -> dict[str, float]:
        voco.eval()
        terms = [voco.loss(batch, Step("main", 0, STEPS, 0)) for batch in plain]
        voco.train()
        return {name: float(np.mean([float(t[name]) for t in terms])) for name in ("intra", "acc", "always_centre")}

    before = measure()
    stage = voco.stages()[0]
    optimizer = build_optimizer(stage, voco.parameter_groups(stage))
    rng = np.random.default_rng([seed, 1])
    for index in range(STEPS):
        step = Step("main", index, STEPS, index)
        batch = batch_of(voco, [learned[i] for i in rng.choice(24, 4, replace=False)], rng)
        if shuffled:
            order = torch.from_numpy(rng.permutation(8))
            batch["labels"] = batch["labels"].flatten(0, 1)[order].unflatten(0, (4, 2))
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * rate_factor(stage, step)
        voco.loss(batch, step)["loss"].backward()
        nn.utils.clip_grad_norm_(voco.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_averages(voco.momentum_pairs(), step)
    return {**measure(), **{f"{name}_before": value for name, value in before.items()}}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_places_of_held_out_crops_are_learned(seed: int) -> None:
    result = learn(model(seed), seed)
    print(result)
    assert result["intra"] <= 0.50
    assert result["acc"] >= 0.33


@pytest.mark.slow
def test_nothing_is_learned_from_shuffled_labels() -> None:
    result = learn(model(0), 0, shuffled=True)
    print(result)
    assert result["acc"] < 0.36
    assert result["acc"] < result["acc_before"] + 0.1


def centre_probe(voco: VoCo) -> float:
    """R² on held-out volumes of a ridge regression from the deepest features of a crop to its place.

    The fine stages of a random network tell as much: textures differ between places in these volumes.
    """
    rng = np.random.default_rng(5)
    parts = []
    for cases in (volumes(24, 1), volumes(8, 2)):
        batch = batch_of(voco, [case for case in cases for _ in range(8)], rng)
        with torch.no_grad():
            features = voco.encoder(batch["random"].flatten(0, 1))[-1].flatten(2).mean(2)
        parts.append((features.double(), batch["offsets"].flatten(0, 1)[:, 1:].double()))
    (x, y), (x_new, y_new) = parts
    centre, scale, middle = x.mean(0), x.std(0), y.mean(0)
    x, x_new = (x - centre) / scale, (x_new - centre) / scale
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]), x.T @ (y - middle))
    return float(1 - ((x_new @ weights + middle - y_new) ** 2).sum() / ((y_new - middle) ** 2).sum())


@pytest.mark.slow
def test_features_tell_the_place_of_a_crop_better_than_random_ones() -> None:
    voco = model(0)
    random = centre_probe(voco)
    learn(voco, 0)
    learned = centre_probe(voco)
    print({"random": random, "learned": learned})
    assert learned > random + 0.03
