"""Training iterations a second, and for how much of the time the device waits for patches or augments them itself:
`python -m benchmarks.training_step [--labels 2 60] [--patch 128] [--workers 8] [--iterations 50] [--device cuda]`.

nnU-Net's loader, ours, and ours for `train.augment_on=device`, each in worker processes as the trainer has them, feed the
same residual U-Net in turn: forward, Dice and cross-entropy, backward, SGD; float16 on a GPU. Patches come from a made-up
body, which costs what a CT of its size costs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from torch import nn

from benchmarks.devices import device_text
from benchmarks.scans import made_up
from benchmarks.training_data import box_loader, loaders, save
from trainers.data import in_processes
from trainers.device_augmentation import DeviceAugmentation
from trainers.patches import BoxLoader

_STAGES, _WIDEST = 6, 320


def network(classes: int, features: int) -> nn.Module:
    """A residual encoder U-Net of six stages, as nnU-Net plans it for patches of 128³; one output."""
    return ResidualEncoderUNet(
        input_channels=1,
        n_stages=_STAGES,
        features_per_stage=[min(_WIDEST, features * 2**stage) for stage in range(_STAGES)],
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, 2, 2, 2, 2, 2],
        n_blocks_per_stage=[1, 3, 4, 6, 6, 6],
        num_classes=classes,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


class Awaited:
    """Batches, and for how many seconds they were waited for."""

    def __init__(self, batches: Iterator[dict]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __iter__(self) -> Awaited:
        return self

    def __next__(self) -> dict:
        asked = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - asked
        return batch


@dataclass(frozen=True)
class Speed:
    iterations_per_second: float
    waiting: float
    """Share of the time in which no batch had come from the loader."""
    augmenting: float
    """Share of the time in which the device finished batches."""


def train(batches: Iterator[dict], loaded: Awaited, model: nn.Module, iterations: int, device: torch.device) -> Speed:
    """Train on `batches`, which are made of those `loaded`; the first three are not counted."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.99, nesterov=True)
    loss_of = DC_and_CE_loss({"batch_dice": False, "smooth": 1e-5, "do_bg": False}, {})
    gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(enabled=gpu)
    handed, started = 0.0, time.perf_counter()
    for iteration in range(-3, iterations):
        if iteration == 0:
            loaded.seconds, handed, started = 0.0, 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch = next(batches)
        if gpu:
            torch.cuda.synchronize()
        handed += time.perf_counter() - asked
        image, target = batch["data"], batch["target"][0].clamp_(min=0)
        image, target = (tensor.to(device, non_blocking=True) for tensor in (image, target))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16, enabled=gpu):
            loss = loss_of(model(image), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if gpu:
            torch.cuda.synchronize()  # what is waited for afterwards are patches alone
    seconds = time.perf_counter() - started
    return Speed(iterations / seconds, loaded.seconds / seconds, (handed - loaded.seconds) / seconds)


def rivals(folder: str, patch: tuple[int, ...], labels: int) -> dict[str, nnUNetDataLoader]:
    """The loaders that are compared."""
    theirs, ours = loaders(folder, patch, labels)
    return {"nnU-Net": theirs, "autoseg": ours, "autoseg, on the device": box_loader(folder, patch, labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 60])
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--features", type=int, default=32, help="of the first stage")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--iterations", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    print(f"{device_text(device)}; {given.workers} workers, patch {given.patch}³, batch 2\n")
    print("| labels | round | loader | iterations/s | waiting for patches | augmenting |\n|--:|--:|---|--:|--:|--:|")
    for labels in given.labels:
        patch = (given.patch,) * 3
        with TemporaryDirectory() as folder:
            save(made_up([2 * n for n in patch], labels), patch, labels, folder)
            model = network(labels + 1, given.features).to(device)
            for number in range(1, given.rounds + 1):
                for side, loader in rivals(folder, patch, labels).items():
                    source = in_processes(loader, given.workers, ahead=max(6, given.workers // 2), pinned=True)
                    loaded = Awaited(source)
                    batches = DeviceAugmentation(loaded, loader, device) if type(loader) is BoxLoader else loaded
                    speed = train(batches, loaded, model, given.iterations, device)
                    shares = f"{speed.waiting:.0%} | {speed.augmenting:.0%}"
                    print(
                        f"| {labels} | {number} | {side} | {speed.iterations_per_second:.2f} | {shares} |", flush=True
                    )
                    if hasattr(source, "_finish"):
                        source._finish()


if __name__ == "__main__":
    main()
