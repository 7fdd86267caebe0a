"""Seconds a step, samples a second and memory of each pretraining method, and how many cores make its batches:
`python -m benchmarks.pretrain_step METHOD|all [--preset default|cpu] [--size SIZE] [--batch N] [--steps N] [--device cuda]`.

Scans of a made-up body are planned and preprocessed, batches cut and a network built as `autoseg pretrain` does it; --preset is
its, and takes the plan that goes with it: the default one for a GPU, whatever the device here. A step is what the loop does for
one update: batches to the device, forward, backward, clipping, optimiser, moving averages, what the method does after it; its
log, its search for losses that are not finite, saving and held-out scans are left out. Precision is that of pretraining:
bfloat16 on a GPU that has it, float32 on a CPU.

Making samples is measured in one process, in CPU seconds. A step takes seconds of a GPU, or CPU seconds of all threads of a
CPU. The quotient of both is the number of loading cores that keep the device busy. On a CPU the memory is what the process
grew by while it made steps. Stage high of meddinov3 draws the sizes of its crops, so few steps of it differ much.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from benchmarks.devices import device_text, measure_on
from benchmarks.made_up_dataset import as_many, make_dataset
from benchmarks.measuring import Cost, measure
from planners.configurations import ensure_configuration
from planners.dataset import Dataset
from planners.device import choose_device
from planners.errors import AutosegError
from planners.plans import CPU_SUFFIX, FULL_PLAN, default_configuration, load_plan
from pretrain.batches import LEARNING, Batches
from pretrain.catalog import METHODS, load_method
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.loop import build_fabric
from pretrain.method import Batch, PretrainMethod, Stage, Step, Target
from pretrain.optimise import build_optimizer, prepare_stage, update_averages
from pretrain.pools import build_pool
from pretrain.settings import configure
from pretrain.volumes import Pool

_CASES = 100
_DIFFERENT = 8
"""Steps whose batches are made, and then used in turn."""
_BATCH = ("batch", "volumes", "crops", "tokenizer_batch", "mim_batch")
"""What methods call the size of a batch."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a stage of a method costs."""

    method: str
    stage: str
    samples: float
    """Of an update, which may be several batches."""
    making_s: float
    """CPU seconds to make them."""
    step_s: float
    """Seconds of a GPU or CPU seconds."""
    peak_bytes: float

    def __str__(self) -> str:
        cores = self.making_s / self.step_s
        return (
            f"| {self.method} | {self.stage} | {self.samples:.3g} | {self.making_s:.3g} | {self.step_s:.3g} "
            f"| {self.samples / self.step_s:.3g} | {cores:.2g} | {self.peak_bytes / 1e9:.2f} |"
        )


_HEAD = (
    "| method | stage | samples a step | to make them, CPU s | step, {unit} | samples/{unit} | loading cores | peak GB |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|"
)


def settings_of(name: str, size: str | None, batch: int | None) -> dict[str, Any]:
    """The method's settings for what was asked for. Raises SettingsError for a size or batch that it does not have."""
    config = load_method(name).Config
    sized = [field.name for field in dataclasses.fields(config) if field.name in _BATCH]
    settings = ({} if batch is None else dict.fromkeys(sized, batch)) | ({} if size is None else {"size": size})
    configure(config, name, settings)
    return settings


def method_of(
    name: str, dataset: Dataset, preset: str, settings: Mapping[str, Any]
) -> tuple[PretrainMethod, Any, Pool]:
    """A method with new weights, what it cuts from the scans, and the scans, as `pretrain.loop` puts them together."""
    kind = load_method(name)
    config = configure(kind.Config, name, kind.presets[preset], settings)
    plan_name = FULL_PLAN + (CPU_SUFFIX if preset == "cpu" else "")
    configuration = kind.configuration(settings) or default_configuration(load_plan(dataset.name, plan_name))
    plan = ensure_configuration(dataset.name, plan_name, configuration)
    target = Target(plan, configuration, encoder_info(plan, configuration, dataset.json))
    scans = build_pool(dataset, plan, kind.data_configuration(target), own_grid=kind.own_grid)
    pool = as_many(scans, _CASES)
    spec = kind.plan(target, pool.cases, config)
    torch.manual_seed(0)
    method = kind(build_segmentation_network(plan, configuration, dataset.json), spec, config)  # type: ignore[call-arg]
    for pair in method.momentum_pairs():
        pair.average.requires_grad_(False)
    return method, spec, pool


def measured(
    name: str, method: PretrainMethod, spec: Any, pool: Pool, steps: int, device: torch.device
) -> Iterator[Row]:
    """The stages of a method, one after the other: `steps` steps each, after a few that are not counted."""
    fabric = build_fabric(device)
    fabric.to_device(method)
    learnable = [p for p in method.parameters() if p.requires_grad]
    different = min(steps, _DIFFERENT)
    for stage in method.stages():
        batches, making_s = _make(method, spec, pool, stage, different)
        prepare_stage(method, stage, learnable)
        cost = _cost_of_steps(stepper(fabric, method, stage, batches, different + steps), different, steps, device)
        yield Row(
            name,
            stage.name,
            samples=sum(map(_samples, batches)) / different,
            making_s=making_s / different,
            step_s=(cost.wall_s if device.type == "cuda" else cost.cpu_s) / steps,
            peak_bytes=cost.peak_bytes,
        )


def _cost_of_steps(step: Callable[[int], None], uncounted: int, steps: int, device: torch.device) -> Cost:
    for number in range(uncounted):
        step(number)

    def counted() -> None:
        for number in range(uncounted, uncounted + steps):
            step(number)

    return measure_on(device, counted)[1]


def _make(method: PretrainMethod, spec: Any, pool: Pool, stage: Stage, steps: int) -> tuple[list[Batch], float]:
    """The batches of some steps, and the CPU seconds of making them, with one thread as a loading process has it."""
    accumulate, threads = stage.accumulate, torch.get_num_threads()
    batches = Batches(
        type(method), spec, pool, seed=0, stream=LEARNING, rank=0, stage=stage.name, first_step=0, steps=steps,
        accumulate=accumulate,
    )  # fmt: skip
    torch.set_num_threads(1)
    batches[0]  # opens files and imports what is needed
    made, cost = measure(lambda: [batches[number] for number in range(len(batches))])
    torch.set_num_threads(threads)
    return made, cost.cpu_s


def stepper(
    fabric: Fabric, method: PretrainMethod, stage: Stage, batches: list[Batch], total: int
) -> Callable[[int], None]:
    """A function that makes one of `total` steps of a stage, with the batches in turn."""
    optimizer: Any = fabric.setup_optimizers(build_optimizer(stage, method.parameter_groups(stage)))
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    parts = [list(method.get_submodule(part).parameters()) for part in stage.clip_apart] or [learning]
    if fabric.device.type == "cuda":
        batches = [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in each.items()} for each in batches]

    def one(number: int) -> None:
        step, done = Step(stage.name, number, total, number), []
        for part in range(stage.accumulate):
            batch = fabric.to_device(batches[(number * stage.accumulate + part) % len(batches)])
            with fabric.autocast():
                terms = method.backward(batch, step, lambda loss: fabric.backward(loss / stage.accumulate))
            done.append((batch, terms))
        if stage.clip_norm is not None:
            for parameters in parts:
                nn.utils.clip_grad_norm_(parameters, stage.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_averages(method.momentum_pairs(), step)
        with torch.no_grad():
            for batch, terms in done:
                method.after_step(batch, terms, step)

    return one


def _samples(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[*METHODS, "all"], metavar="METHOD", help=f"{', '.join(METHODS)}, or all")
    parser.add_argument("--preset", choices=["default", "cpu"], default="default")
    parser.add_argument("--size", help="of the transformer: pumit s, b, l, official; meddinov3 tiny, small, base")
    parser.add_argument("--batch", type=int, help="samples of a batch; default: the method's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: the best there is")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error("--steps needs at least 1")
    logging.getLogger("autoseg").setLevel(logging.ERROR)  # advice about the scans, which are made up
    names = METHODS if given.method == "all" else [given.method]
    try:
        device = choose_device(given.device)
        settings = {name: settings_of(name, given.size, given.batch) for name in names}
        print(f"{device_text(device)}; preset {given.preset}\n", flush=True)
        print(_HEAD.format(unit="s" if device.type == "cuda" else "CPU s"))
        with TemporaryDirectory() as root:
            dataset = make_dataset(Path(root))
            for name in names:
                made = method_of(name, dataset, given.preset, settings[name])
                for row in measured(name, *made, given.steps, device):
                    print(row, flush=True)
    except AutosegError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
