"""Steps of VoCo beside its authors' code and nnssl's, on one encoder and one batch of crops:
`python -m benchmarks.voco_peers --voco CHECKOUT --nnssl CHECKOUT [--rounds N]`.

Checkouts of Luffy03/VoCo and MIC-DKFZ/nnssl; their heads and losses run from there and nothing of them is copied. A step is
forward, backward, AdamW and moving averages, on the CPU: a residual encoder of five stages, two volumes with 16 + 4 crops of
32 x 32 x 32 voxels, projectors 2048 wide. Our `v1` is the authors' algorithm: from equal weights both give the same loss.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from monai.data import MetaTensor
from torch import Tensor, nn

from benchmarks.measuring import measure
from benchmarks.table import machine_text, this_machine, write_page
from pretrain.heads import pooled_stages
from pretrain.method import Batch, Step
from pretrain.methods.voco import VoCo, VoCoConfig, VoCoSpec
from pretrain.methods.voco_geometry import Layout, overlap_labels
from pretrain.optimise import update_averages

VOLUMES, RANDOM, WIDTH = 2, 4, 2048
LAYOUT = Layout((32, 32, 32), (1, 4, 4), whole=False, upsampling=1.0)
_STEP = Step("voco", 0, 1, 0)

Stepper = Callable[[], float]
"""Does a step and returns its loss."""


class Describer(nn.Module):
    """Images to projections, as every side has it."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(pooled_stages(self.encoder, images))


def encoder() -> ResidualEncoder:
    """32 voxels become 2 in five stages."""
    return ResidualEncoder(
        1, 5, (16, 32, 64, 128, 160), nn.Conv3d, 3, (1, 2, 2, 2, 2), (1, 1, 2, 2, 2), conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, return_skips=True,
    )  # fmt: skip


def crops() -> Batch:
    """Smooth noise, in which crops that overlap look alike, cut as VoCo cuts it."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    coarse = torch.rand(VOLUMES, 1, *[n // 4 for n in LAYOUT.region])
    volumes = nn.functional.interpolate(coarse, size=LAYOUT.region, mode="trilinear")
    limits = [r - c for r, c in zip(LAYOUT.region, LAYOUT.crop, strict=True)]
    offsets = rng.integers(0, np.add(limits, 1), (VOLUMES, RANDOM, 3))
    corners = [np.multiply(cell, LAYOUT.crop) for cell in np.ndindex(*LAYOUT.grid)]
    labels = [[overlap_labels(o, LAYOUT.crop, LAYOUT.grid).ravel() for o in of_one] for of_one in offsets]
    return {
        "random": torch.stack([_cut(volume, chosen) for volume, chosen in zip(volumes, offsets, strict=True)]),
        "base": torch.stack([_cut(volume, corners) for volume in volumes]),
        "labels": torch.from_numpy(np.array(labels, np.float32)),
        "crops_valid": torch.ones(VOLUMES, RANDOM, dtype=torch.bool),
        "bases_valid": torch.ones(VOLUMES, LAYOUT.bases, dtype=torch.bool),
    }


def ours(variant: Any, shared: nn.Module, batch: Batch) -> tuple[Stepper, VoCo]:
    """Our method, and what does its steps."""
    spec = VoCoSpec(LAYOUT, (1.0, 1.0, 1.0), VOLUMES, RANDOM, mirror=0, turn=0, shift=0)
    network: Any = SimpleNamespace(encoder=copy.deepcopy(shared))
    method = VoCo(network, spec, VoCoConfig(variant=variant, hidden=WIDTH))
    after = lambda: update_averages(method.momentum_pairs(), _STEP)  # noqa: E731
    return _stepper(method, lambda: method.loss(batch, _STEP)["loss"], after), method


def authors(checkout: Path, shared: nn.Module, batch: Batch, like: VoCo) -> Stepper:
    """The authors' head on our encoder, with the weights of `like`."""
    source = _module(checkout / "models" / "voco_head.py")
    head = source.VoCoHead.__new__(source.VoCoHead)  # its own constructor would build two large transformers
    nn.Module.__init__(head)
    projection = source.projection_head(sum(shared.output_channels), WIDTH, WIDTH)
    for theirs, our in zip(projection.parameters(), like.student.parameters(), strict=True):
        theirs.data.copy_(our)
    head.student = Describer(copy.deepcopy(shared), projection)
    head.teacher = copy.deepcopy(head.student).requires_grad_(False)
    random, base = (MetaTensor(batch[key].flatten(0, 1)) for key in ("random", "base"))

    def loss() -> Tensor:
        with contextlib.redirect_stdout(None):  # it prints at every step
            return sum(head(random, base, batch["labels"]))

    return _stepper(head, loss)


def nnssl(checkout: Path, shared: nn.Module, batch: Batch) -> Stepper:
    """nnssl's architecture and loss on our encoder."""
    sys.path.insert(0, str(checkout / "src"))
    plan: Any = types.ModuleType("nnssl.experiment_planning.experiment_planners.plan")
    plan.ConfigurationPlan = object  # the type of an argument, whose module needs much that is not installed here
    sys.modules[plan.__name__] = plan
    build = importlib.import_module("nnssl.architectures.voco_architecture").VoCoArchitecture
    network = build(copy.deepcopy(shared), shared.output_channels)
    criterion = importlib.import_module("nnssl.training.loss.voco_loss").VoCoLoss()
    every = torch.cat([batch["base"].flatten(0, 1), batch["random"].flatten(0, 1)])

    def loss() -> Tensor:
        base, random = network(every).split([VOLUMES * LAYOUT.bases, VOLUMES * RANDOM])
        return criterion(base.unflatten(0, (VOLUMES, -1)), random.unflatten(0, (VOLUMES, -1)), batch["labels"])

    return _stepper(network, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voco", type=Path, required=True, help="a checkout of Luffy03/VoCo")
    parser.add_argument("--nnssl", type=Path, required=True, help="a checkout of MIC-DKFZ/nnssl")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    batch = crops()
    shared = encoder()
    first, method = ours("v1", shared, batch)
    steppers = {
        "autoseg, v1": first,
        "Luffy03/VoCo": authors(given.voco, shared, batch, method),
        "autoseg, v2 (default)": ours("v2", shared, batch)[0],
        "MIC-DKFZ/nnssl": nnssl(given.nnssl, shared, batch),
    }
    losses = {name: step() for name, step in steppers.items()}  # also a warm-up
    print({name: round(loss, 6) for name, loss in losses.items()})
    costs: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(given.rounds):
        for name, step in steppers.items():
            costs[name].append(measure(step)[1].cpu_s)
    checkouts = {"Luffy03/VoCo": _commit(given.voco), "MIC-DKFZ/nnssl": _commit(given.nnssl)}
    print(f"Wrote {write_page('voco_peers', _page(costs, losses, checkouts, given.rounds))}")


def _page(costs: dict[str, list[float]], losses: dict[str, float], checkouts: dict[str, str], rounds: int) -> str:
    usual = {name: float(np.median(values)) for name, values in costs.items()}
    lines = [
        f"# VoCo's step beside its authors' and nnssl's\n\n{__doc__.partition(chr(10) * 2)[2]}",
        "```bash",
        f"python -m benchmarks.voco_peers --voco VoCo --nnssl nnssl --rounds {rounds}",
        "```\n",
        f"On {machine_text(this_machine())}; other work ran on it. Checkouts: "
        + ", ".join(f"{name} {commit}" for name, commit in checkouts.items())
        + ".\n",
        "| | CPU s a step (rounds) | steps a CPU second | as many as VoCo's authors | loss of the first step |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, values in costs.items():
        lines.append(
            f"| {name} | {usual[name]:.2f} ({min(values):.2f} to {max(values):.2f}) | {1 / usual[name]:.2f} "
            f"| {usual['Luffy03/VoCo'] / usual[name]:.2f} | {losses[name]:.5f} |"
        )
    return "\n".join(lines) + "\n"


def _stepper(module: nn.Module, loss: Callable[[], Tensor], after: Callable[[], None] = lambda: None) -> Stepper:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-4)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        after()
        return value.item()

    return step


def _cut(volume: Tensor, offsets: Any) -> Tensor:
    boxes = [tuple(slice(o, o + c) for o, c in zip(offset, LAYOUT.crop, strict=True)) for offset in offsets]
    return torch.stack([volume[(slice(None), *box)] for box in boxes])


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _commit(checkout: Path) -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return found.stdout.strip() or "of unknown commit"


if __name__ == "__main__":
    main()
