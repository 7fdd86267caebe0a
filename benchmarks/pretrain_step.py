"""Seconds a step and memory of pretraining a transformer, with noise for data:
`python -m benchmarks.pretrain_step pumit|meddinov3 [--size SIZE] [--batch N] [--device cuda]`.

Forward, backward, AdamW and moving averages, in bfloat16 on a GPU. PUMIT: crops of 64 × 128 × 128 voxels at DA 0, which is
4 × 8 × 8 tokens. MedDINOv3: two crops of 256² and eight of 112² pixels of a slice; in stage gram two of 512² for the anchor, in
stage high the first of its combinations.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from planners.sac import SIZES as PUMIT_SIZES
from planners.vit import SIZES as VIT_SIZES
from pretrain.method import Batch, PretrainMethod, Step
from pretrain.methods.meddinov3.masks import block_mask, masked_counts
from pretrain.methods.meddinov3.method import MedDINOv3Pretraining, MedDINOv3Spec
from pretrain.methods.meddinov3.schedules import DINO
from pretrain.methods.meddinov3.settings import MedDINOv3Config
from pretrain.methods.meddinov3.sizes import crop_sizes
from pretrain.methods.pumit.masking import visible_count
from pretrain.methods.pumit.method import PUMITPretraining
from pretrain.methods.pumit.settings import PUMITConfig
from pretrain.networks.dino_vit import TOKEN, DinoViT
from pretrain.networks.pumit import PUMITEncoder
from pretrain.optimise import build_optimizer, prepare_stage, update_averages

TOKENS = (4, 8, 8)
VOXELS = (64, 128, 128)
MANY_SLICES = 1_000_000
WIDE = 512  # pixels of a slice

Maker = Callable[[str], Batch]
"""From a stage to a batch."""


def pumit(size: str, number: int) -> tuple[PretrainMethod, Maker]:
    """The method with a transformer and a tokenizer of `size`, one channel."""
    network = nn.Module()
    network.encoder = PUMITEncoder(1, 0, **PUMIT_SIZES[size])
    method = PUMITPretraining(network, SimpleNamespace(), PUMITConfig(size=size))  # type: ignore[arg-type]
    tokens = TOKENS[0] * TOKENS[1] * TOKENS[2]
    seen = visible_count(tokens, method.config.masked)

    def make(stage: str) -> Batch:
        return {
            "image": torch.rand(number, 1, *VOXELS),
            "low": torch.full((number,), -2.0),
            "high": torch.full((number,), 2.0),
            "degree": 0,
            "inside": torch.ones(number, tokens, dtype=torch.bool),
            "valid": torch.ones(number, dtype=torch.bool),
            "visible": torch.stack([torch.randperm(tokens)[:seen].sort().values for _ in range(number)]),
        }

    return method, make


def meddinov3(size: str, number: int) -> tuple[PretrainMethod, Maker]:
    """The method with a transformer and heads of `size`, one channel, as on many large slices."""
    network: Any = nn.Module()
    network.encoder = DinoViT(1, **VIT_SIZES[size], drop_path=0.2)
    config = MedDINOv3Config(size=size, batch=number)  # type: ignore[arg-type]
    sizes = crop_sizes(config, WIDE)
    assert sizes is not None
    spec = MedDINOv3Spec(sizes, config.small_crops, (False,), config.mirror, config.distort, MANY_SLICES, False, True)
    rng = np.random.default_rng(0)

    def make(stage: str) -> Batch:
        chosen = sizes[stage][0]
        slices, grid = chosen.batch, (chosen.large // TOKEN,) * 2
        masks = [block_mask(grid, count, rng).ravel() for count in masked_counts(2 * slices, grid[0] ** 2, rng)]
        made = {
            "large": torch.randn(slices, 2, 1, chosen.large, chosen.large),
            "small": torch.randn(slices, config.small_crops, 1, chosen.small, chosen.small),
            "masked": torch.from_numpy(np.stack(masks)).unflatten(0, (slices, 2)),
            "valid": torch.ones(slices, dtype=torch.bool),
        }
        return made if stage == DINO else made | {"fine": torch.randn(slices, 2, 1, chosen.gram, chosen.gram)}

    return MedDINOv3Pretraining(network, spec, config), make


METHODS = {"pumit": (pumit, PUMIT_SIZES, "s", 8), "meddinov3": (meddinov3, VIT_SIZES, "small", 64)}
"""How a method is made, its sizes, and what is measured unless something else is asked for."""


def measure(
    method: PretrainMethod, make: Maker, steps: int, device: torch.device
) -> dict[str, tuple[int, float, float]]:
    """Stage to (samples a step, seconds a step, peak GB): of the GPU's allocations, or of the process, whose peak never falls.
    On a CPU the seconds are of all its cores together."""
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    for pair in method.momentum_pairs():
        pair.average.requires_grad_(False)
    method.to(device)
    learnable = [p for p in method.parameters() if p.requires_grad]
    found = {}
    for stage in method.stages():
        prepare_stage(method, stage, learnable)
        optimizer = build_optimizer(stage, method.parameter_groups(stage))
        batch = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in make(stage.name).items()}
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for index in range(steps + 1):
            if index == 1:  # the first is a warm-up
                _wait(device)
                started = clock()
            step = Step(stage.name, index, steps + 1, index)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                terms = method.loss(batch, step)
            terms["loss"].backward()
            optimizer.step()
            update_averages(method.momentum_pairs(), step)
            with torch.no_grad():
                method.after_step(batch, terms, step)
        _wait(device)
        seconds = (clock() - started) / steps
        peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[stage.name] = (len(batch["valid"]), seconds, peak / 1e9)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("--size")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    build, sizes, usual, number = METHODS[given.method]
    size, number = given.size or usual, given.batch or number
    if size not in sizes:
        parser.error(f"--size of {given.method} is one of {', '.join(sizes)}, not {size}")
    device = torch.device(given.device)
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{given.method}, size {size}, batch {number}, {machine}, torch {torch.__version__}")
    torch.manual_seed(0)
    for stage, (samples, seconds, peak) in measure(*build(size, number), given.steps, device).items():
        unit = "s" if gpu else "CPU s"
        print(f"{stage:10} {seconds:8.3f} {unit} a step   {samples / seconds:8.2f} samples/{unit}   {peak:6.2f} GB")


if __name__ == "__main__":
    main()
