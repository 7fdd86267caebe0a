"""The steps of a run: phases, optimiser steps, held-out metrics, saving; what `pretrain.loop` has put together."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from planners.dataset import Dataset
from planners.errors import AutosegError
from planners.interruption import stop_signal
from pretrain import distributed, runs
from pretrain.batches import HELD_OUT, LEARNING, Batches, load, step_seed
from pretrain.checkpoint import EncoderCard, save_encoder
from pretrain.method import Batch, PretrainMethod, Stage, Step, Target
from pretrain.optimise import (
    Phase,
    build_optimizer,
    prepare_stage,
    rate_factor,
    set_rates,
    set_training_mode,
    update_averages,
)
from pretrain.record import Record, mean_terms, scalars
from pretrain.volumes import Pool

logger = logging.getLogger("autoseg")

_HELD_OUT_BATCHES = 8
_EVALUATIONS = 10
_ROWS = 100
_SECONDS_BETWEEN_SAVES = 20.0
_SAVING_SHARE = 0.02  # of the time, at most


@dataclass
class Run:
    """Everything a run works with, and where it is."""

    fabric: Fabric
    folder: Path
    options: runs.Options
    home: Dataset
    target: Target
    method: PretrainMethod
    spec: Any
    learn: Pool
    held_out: Pool
    phases: list[Phase]
    workers: int
    licence: str
    step: int = 0
    """Optimiser steps done."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out, the newest."""

    @property
    def steps(self) -> int:
        return self.options.config["steps"]


def train(run: Run) -> None:
    """Make the steps that are left, from the saved state if there is one."""
    state = runs.load_state(run.folder)
    if state is not None:
        run.method.load_state_dict(state["method"])
        run.step, run.metrics = state["step"], state["metrics"]
        logger.info("Continuing after step %d of %d", run.step, run.steps)
    seconds = state["seconds"] if state is not None else 0.0
    learnable = [p for p in run.method.parameters() if p.requires_grad]
    record = (
        Record(run.folder, run.steps, run.step, run.method.chance(), seconds) if run.fabric.is_global_zero else None
    )
    with stop_signal() as stopped:
        for phase in run.phases:
            if run.step < phase.first_step + phase.steps:
                resumed = state if state is not None and run.step > phase.first_step else None
                _train_phase(run, phase, resumed, learnable, record, stopped)
    if record is not None:
        record.close()


def _train_phase(
    run: Run,
    phase: Phase,
    state: Mapping[str, Any] | None,
    learnable: Sequence[nn.Parameter],
    record: Record | None,
    stopped: Callable[[], int],
) -> None:
    fabric, method, stage = run.fabric, run.method, phase.stage
    prepare_stage(method, stage, learnable)
    groups = method.parameter_groups(stage)
    optimizer: Any = fabric.setup_optimizers(build_optimizer(stage, groups))
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        fabric.strategy.precision.load_state_dict(state["precision"])
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    # New heads would first pull a pretrained encoder away from what it knows.
    shielded = []
    if run.options.init is not None and phase is run.phases[0]:
        learning_ids = {id(p) for p in learning}
        shielded = [p for p in method.export().module.parameters() if id(p) in learning_ids]
    batches = Batches(
        type(method),
        run.spec,
        run.learn,
        seed=run.options.seed,
        stream=LEARNING,
        rank=fabric.global_rank,
        stage=stage.name,
        first_step=phase.first_step,
        steps=phase.steps,
        accumulate=stage.accumulate,
    )
    first = run.step - phase.first_step
    queue = load(batches, first * stage.accumulate, workers=run.workers, pin=fabric.device.type == "cuda")
    fixed = _held_out_batches(run, phase)
    saver = _Saver(run, optimizer, record)
    evaluate_every, write_every = max(1, run.steps // _EVALUATIONS), max(1, run.steps // _ROWS)
    if run.step == 0:
        _evaluate(run, phase, record, fixed)

    for index in range(first, phase.steps):
        step = Step(stage.name, index, phase.steps, phase.first_step + index)
        rate = set_rates(optimizer, stage, groups, step)
        warming_up = index < round(stage.warm_up * phase.steps)
        for parameter in shielded:
            parameter.requires_grad_(not warming_up)
        done: list[tuple[Batch, dict]] = []
        for part in range(stage.accumulate):
            asked = time.monotonic()
            batch = fabric.to_device(next(queue))
            waited = time.monotonic() - asked
            torch.manual_seed(step_seed(run.options.seed, fabric.global_rank, step, part))
            with fabric.autocast():
                terms = method.backward(batch, step, _propagate(fabric, stage, step))
            if record is not None:
                record.add(terms, waited)
            done.append((batch, terms))
        distributed.average_gradients(learning)
        norm = None
        if stage.clip_norm is not None:
            norm = _clip(fabric, method, optimizer, learning, stage)
            if not _scales(fabric):  # else a gradient that overflowed in half precision is skipped
                _refuse_nan(norm, step, "norm of the gradient")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_averages(method.momentum_pairs(), step)
        with torch.no_grad():
            for batch, terms in done:
                method.after_step(batch, terms, step)
        run.step = step.global_index + 1

        ending = run.step == phase.first_step + phase.steps
        if run.step % evaluate_every == 0 or run.step == run.steps:
            _evaluate(run, phase, record, fixed, rate, norm)
        elif record is not None and (run.step % write_every == 0 or ending):
            record.write(run.step, stage.name, rate, None if norm is None else float(norm), None)
        if record is not None and record.recent:
            record.say_once(method.diagnose(record.recent, step))
        signal_number = distributed.largest(stopped(), fabric.device)
        if signal_number or run.step == run.steps or saver.is_time():
            saver.save()
        if signal_number and run.step < run.steps:
            logger.info("Stopped after step %d of %d; the same command continues", run.step, run.steps)
            raise SystemExit(128 + signal_number)


class _Saver:
    """Writes state and encoder, not so often that it would cost more than a fiftieth of the time."""

    def __init__(self, run: Run, optimizer: Any, record: Record | None) -> None:
        self._run, self._optimizer, self._record = run, optimizer, record
        self._last, self._wait = time.monotonic(), _SECONDS_BETWEEN_SAVES

    def is_time(self) -> bool:
        return time.monotonic() - self._last > self._wait

    def save(self) -> None:
        run, record = self._run, self._record
        began = time.monotonic()
        if record is not None:
            state = {
                "step": run.step,
                "metrics": run.metrics,
                "seconds": record.seconds,
                "method": run.method.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "precision": run.fabric.strategy.precision.state_dict(),
            }
            runs.save_state(run.folder, state)
            export = run.method.export()
            save_encoder(run.folder, export.module, card_of(run), export.extras)
        self._last = time.monotonic()
        self._wait = max(_SECONDS_BETWEEN_SAVES, (self._last - began) / _SAVING_SHARE)


@torch.no_grad()
def _evaluate(
    run: Run,
    phase: Phase,
    record: Record | None,
    fixed: Sequence[Batch],
    rate: float | None = None,
    norm: torch.Tensor | None = None,
) -> None:
    """Terms on the fixed held-out batches, in eval mode and without side effects; a row and a picture."""
    began = time.monotonic()
    index = min(run.step - phase.first_step, phase.steps - 1)
    step = Step(phase.stage.name, index, phase.steps, phase.first_step + index)
    run.method.eval()
    measured = []
    with run.fabric.autocast():
        for number, batch in enumerate(fixed):
            torch.manual_seed(number)
            measured.append(scalars(run.method.loss(run.fabric.to_device(batch), step)))
        figure = None
        if record is not None and (run.step in (0, run.steps) or record.wants_picture):
            figure = run.method.picture(run.fabric.to_device(fixed[0]))
    run.metrics = distributed.mean(mean_terms(measured), run.fabric.device)
    set_training_mode(run.method, phase.stage)
    if record is not None:
        if figure is not None:
            record.draw(figure)
        record.pause(time.monotonic() - began)
        rate = phase.stage.learning_rate * rate_factor(phase.stage, step) if rate is None else rate
        record.write(run.step, phase.stage.name, rate, None if norm is None else float(norm), run.metrics)


def _held_out_batches(run: Run, phase: Phase) -> list[Batch]:
    """The same few batches of held-out cases for a whole stage, made in this process: a mistake in `sample` shows at once."""
    batches = Batches(
        type(run.method),
        run.spec,
        run.held_out,
        seed=run.options.seed,
        stream=HELD_OUT,
        rank=run.fabric.global_rank,
        stage=phase.stage.name,
        first_step=0,
        steps=_HELD_OUT_BATCHES,
        accumulate=1,
    )
    return [batches[number] for number in range(len(batches))]


def _propagate(fabric: Fabric, stage: Stage, step: Step) -> Callable[[torch.Tensor], None]:
    def run(loss: torch.Tensor) -> None:
        _refuse_nan(loss, step)
        fabric.backward(loss / stage.accumulate)

    return run


def _clip(
    fabric: Fabric, method: PretrainMethod, optimizer: Any, learning: Sequence[nn.Parameter], stage: Stage
) -> torch.Tensor:
    """Limit the gradients, of all parameters together or of each part by itself; the largest norm there was."""
    fabric.strategy.precision.unscale_gradients(optimizer.optimizer)
    parts = [list(method.get_submodule(name).parameters()) for name in stage.clip_apart] or [list(learning)]
    return torch.stack([nn.utils.clip_grad_norm_(part, float(stage.clip_norm or 0)) for part in parts]).max()


def _scales(fabric: Fabric) -> bool:
    return getattr(fabric.strategy.precision, "scaler", None) is not None


def _refuse_nan(value: torch.Tensor, step: Step, what: str = "loss") -> None:
    if not torch.isfinite(value):
        raise AutosegError(
            f"The {what} is {float(value)} at step {step.global_index + 1}",
            remedy="a lower learning rate (autoseg methods lists the setting); the state before is kept. If it is the first "
            "step, autoseg verify looks for scans that hold NaN",
        )


def trains_encoder(run: Run) -> bool:
    """Whether a stage of the run changes what is exported, itself or as a moving average of what it changes."""
    groups = [group for phase in run.phases for group in run.method.parameter_groups(phase.stage)]
    changed = {id(parameter) for group in groups for parameter in group.parameters}
    for pair in run.method.momentum_pairs():
        both = zip(pair.online.parameters(), pair.average.parameters(), strict=True)
        changed |= {id(average) for online, average in both if id(online) in changed}
    return any(id(parameter) in changed for parameter in run.method.export().module.parameters())


def card_of(run: Run) -> EncoderCard:
    """The description of the encoder as it is now."""
    return runs.describe_encoder(
        run.options,
        run.home,
        run.target,
        run.method,
        run.spec,
        run.learn,
        run.held_out,
        steps_done=run.step,
        metrics=run.metrics,
        licence=run.licence,
        trained=run.options.init is not None or trains_encoder(run),
    )
