"""Seconds a case of prediction with a full-size network, nnU-Net's predictor and ours in turn:
`python -m benchmarks.prediction_step [--voxels 280] [--classes 14] [--no-mirroring] [--device cuda]`.

A folder of copies of one made-up CT at 1.2 mm, a residual U-Net with random weights at 1.5 mm, half precision on a GPU. Scans
are read from files and masks written: nnU-Net with three processes to read and three to write, which it starts each time, ours
with threads. Network seconds are those of the forward passes alone, by the GPU's own clock; on a CPU they are wall seconds.
"""

from __future__ import annotations

# nnU-Net's processes import this file, because it is the program: all that is heavy is imported in functions.
import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from benchmarks.measuring import Cost
    from benchmarks.prediction import Model

_SCAN_MM, _NETWORK_MM = 1.2, 1.5
_ORGANS = 8


class Prediction(NamedTuple):
    """What one folder cost one side."""

    cost: Cost
    network_s: float


def compare(model: Model, root: Path, *, voxels: int, count: int, rounds: int) -> None:
    """Predict `count` cases of `voxels` along each axis by both sides in turn; print every round, and ratios of medians."""
    import numpy as np

    from benchmarks.devices import Stopwatch, measure_on
    from benchmarks.prediction import by_autoseg, by_nnunet, read_mask, write_cases
    from benchmarks.scans import made_up

    cases = write_cases(made_up((voxels,) * 3, _ORGANS, (_SCAN_MM,) * 3), count, root)
    watch = Stopwatch(model.network, model.device)
    sides = {
        "nnU-Net": by_nnunet(model, cases, root / "nnunet"),
        "autoseg": by_autoseg(model, cases, root / "autoseg"),
    }
    found: dict[str, list[Prediction]] = {side: [] for side in sides}
    masks = {}
    print("| round | side | s a case | network, s | CPU s a case | peak GB |\n|--:|---|--:|--:|--:|--:|")
    for number in range(1, rounds + 1):
        for side, predict in sides.items():
            masks[side], cost = measure_on(model.device, predict)
            made = Prediction(cost, watch.taken())
            found[side].append(made)
            print(
                f"| {number} | {side} | {cost.wall_s / count:.2f} | {made.network_s / count:.2f} "
                f"| {cost.cpu_s / count:.2f} | {cost.peak_bytes / 1e9:.2f} |",
                flush=True,
            )
    print(f"\nnnU-Net over autoseg, medians: {ratios(*found.values())}.")
    apart = [np.mean(read_mask(a) != read_mask(b)) for a, b in zip(*masks.values(), strict=True)]
    print(f"{np.mean(apart):.1e} of voxels differ.")


def ratios(theirs: list[Prediction], ours: list[Prediction]) -> str:
    """Each cost of theirs over that of ours, of the medians."""
    values = {
        "wall": lambda p: p.cost.wall_s,
        "wall without the network": lambda p: p.cost.wall_s - p.network_s,
        "network": lambda p: p.network_s,
        "CPU": lambda p: p.cost.cpu_s,
        "memory": lambda p: p.cost.peak_bytes,
    }
    medians = {name: [statistics.median(map(value, side)) for side in (theirs, ours)] for name, value in values.items()}
    return ", ".join(
        f"{name} {a / b:.2f}" for name, (a, b) in medians.items() if b > 0
    )  # not every system tells the memory


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=int, default=280, help="of the CT, along each axis")
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--mirroring", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--patch", type=int, default=128, help="a multiple of 32, at least 64")
    parser.add_argument("--features", type=int, default=32, help="of the first stage")
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: the best there is")
    given = parser.parse_args(arguments)
    if given.patch < 64 or given.patch % 32:
        parser.error(f"--patch is a multiple of 32, and at least 64, not {given.patch}")
    run(given, parser)


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What the command does after its arguments are read."""
    import torch

    from benchmarks.devices import device_text
    from benchmarks.prediction import Model
    from benchmarks.toy_model import SmoothlyAnswering, toy_plan
    from benchmarks.training_step import network
    from planners.device import choose_device
    from planners.errors import AutosegError

    try:
        device = choose_device(given.device)
    except AutosegError as error:
        parser.error(str(error))
    print(
        f"{device_text(device)}; {given.cases} cases of {given.voxels}³ voxels, {given.classes} classes, patch "
        f"{given.patch}³, {'with' if given.mirroring else 'without'} mirroring\n",
        flush=True,
    )
    torch.manual_seed(0)
    unet = SmoothlyAnswering(network(given.classes, given.features), given.classes).to(device).eval()
    with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
        unet(torch.zeros(1, 1, *(given.patch,) * 3, device=device))  # what starts with the first pass is not measured
    model = Model(toy_plan(_NETWORK_MM, (given.patch,) * 3), unet, given.classes, device, given.mirroring)
    with TemporaryDirectory() as name:
        compare(model, Path(name), voxels=given.voxels, count=given.cases, rounds=given.rounds)


if __name__ == "__main__":
    main()
