"""Seconds a step and memory of PUMIT's pretraining, without data: `python -m benchmarks.pumit_step [--size s] [--device cuda]`.

One crop of 64 × 128 × 128 voxels at DA 0 is 4 × 8 × 8 tokens; forward, backward and AdamW, in bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from types import SimpleNamespace

import torch
from torch import nn

from planners.sac import SIZES
from pretrain.method import Batch, Step
from pretrain.methods.pumit.masking import visible_count
from pretrain.methods.pumit.method import PUMITPretraining
from pretrain.methods.pumit.settings import PUMITConfig
from pretrain.networks.pumit import PUMITEncoder
from pretrain.optimise import build_optimizer, prepare_stage

TOKENS = (4, 8, 8)
VOXELS = (64, 128, 128)


def method_of(size: str) -> PUMITPretraining:
    """The method with a transformer and a tokenizer of `size`, one channel."""
    network = nn.Module()
    network.encoder = PUMITEncoder(1, 0, **SIZES[size])
    return PUMITPretraining(network, SimpleNamespace(), PUMITConfig(size=size))  # type: ignore[arg-type]


def batch_of(number: int, masked: float, device: torch.device) -> Batch:
    """Noise in place of crops."""
    tokens = TOKENS[0] * TOKENS[1] * TOKENS[2]
    visible = torch.stack(
        [torch.randperm(tokens)[: visible_count(tokens, masked)].sort().values for _ in range(number)]
    )
    return {
        "image": torch.rand(number, 1, *VOXELS, device=device),
        "low": torch.full((number,), -2.0, device=device),
        "high": torch.full((number,), 2.0, device=device),
        "degree": 0,
        "inside": torch.ones(number, tokens, dtype=torch.bool, device=device),
        "valid": torch.ones(number, dtype=torch.bool, device=device),
        "visible": visible.to(device),
    }


def measure(size: str, number: int, steps: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Stage to (seconds a step, peak GB): of the GPU's allocations, or of the process, whose peak never falls. On a CPU the
    seconds are of all its cores together."""
    torch.manual_seed(0)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    method = method_of(size).to(device)
    learnable = list(method.parameters())
    found = {}
    for stage in method.stages():
        prepare_stage(method, stage, learnable)
        optimizer = build_optimizer(stage, method.parameter_groups(stage))
        batch = batch_of(number, method.config.masked, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for index in range(steps + 1):
            if index == 1:  # the first is a warm-up
                _wait(device)
                started = clock()
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = method.loss(batch, Step(stage.name, index, steps + 1, index))["loss"]
            loss.backward()
            optimizer.step()
        _wait(device)
        seconds = (clock() - started) / steps
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        found[stage.name] = (seconds, peak)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="s", choices=sorted(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(
        f"size {given.size}, batch {given.batch} of {'×'.join(map(str, VOXELS))} voxels, {machine}, torch {torch.__version__}"
    )
    for stage, (seconds, peak) in measure(given.size, given.batch, given.steps, device).items():
        print(f"{stage:10} {seconds:8.3f} {'s' if gpu else 'CPU s'} a step   {peak:6.2f} GB")


if __name__ == "__main__":
    main()
