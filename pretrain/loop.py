"""The one training loop of all pretraining methods, on Lightning Fabric: a CPU, a GPU, or several through torchrun or srun.

The method is not wrapped: an own backward pass would break the reducer of torch's DistributedDataParallel. Gradients are
averaged over the processes once a step instead.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import nn

from planners.dataset import Dataset, load_dataset
from planners.device import choose_device
from planners.errors import AutosegError, PlanError, PretrainedMismatch
from planners.interruption import stop_signal
from planners.paths import resolve_dataset
from planners.plans import choose_plan, default_configuration, load_plan, resolved
from planners.run_names import check_run_name
from pretrain import distributed, runs
from pretrain.batches import HELD_OUT, LEARNING, Batches, load, step_seed
from pretrain.catalog import entry, load_method
from pretrain.checkpoint import encoder_folder, find_encoders, load_encoder, save_encoder
from pretrain.encoders import build_segmentation_network, encoder_info, encoder_of
from pretrain.method import Batch, PretrainMethod, Stage, Step, Target
from pretrain.optimise import (
    Phase,
    build_optimizer,
    phases,
    prepare_stage,
    rate_factor,
    set_rates,
    set_training_mode,
    update_averages,
)
from pretrain.record import Record
from pretrain.settings import configure
from pretrain.transfer import transfer
from pretrain.volumes import Pool, build_pool

logger = logging.getLogger("autoseg")

_HELD_OUT_SHARE = 0.1
_HELD_OUT_BATCHES = 8
_EVALUATIONS = 10
_ROWS = 100
_SECONDS_BETWEEN_SAVES = 20.0
_SAVING_SHARE = 0.02  # of the time, at most
_OWN_LICENCE = "that of the scans it was learned from"


def pretrain(
    dataset: int | str,
    *,
    method: str,
    plan: str | None = None,
    configuration: str | None = None,
    preset: str | None = None,
    steps: int | None = None,
    run: str | None = None,
    init: str | Path | None = None,
    images: str | Path | None = None,
    more_datasets: Sequence[int | str] = (),
    exclude_fold: int | None = None,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    workers: int | None = None,
    seed: int = 0,
    stages: str | Sequence[str] | None = None,
) -> Path:
    """Learn an encoder from scans without their labels; an interrupted run continues.

    Args:
        method: a name of `pretrain.catalog.METHODS`.
        plan: name of a plan; None: autosegPlans, or autosegPlans_cpu without a GPU.
        preset: `cpu` or `default` settings of the method; None: by device and plan.
        steps: optimiser steps, instead of the preset's.
        run: a name, to keep several runs of a method.
        init: an encoder to start from: a path, or the name of one of this dataset's.
        images: a folder of more scans.
        more_datasets: whose scans are used too, preprocessed by this dataset's plan.
        exclude_fold: whose validation cases are left out.
        settings: of the method, `{"voco.grid": "1,3,3"}`.
        workers: processes that make batches; 0: everything is done in this one.
        stages: names or numbers of the stages to run; None: all.

    Returns the folder of the encoder. Raises SettingsError when a run with other options is there; SystemExit (130, 143) after
    saving, when stopped by SIGINT or SIGTERM.
    """
    name = resolve_dataset(dataset)
    method_class, needs = load_method(method), entry(method)
    torch_device = choose_device(device)
    plan_content = load_plan(name, choose_plan(name, plan, torch_device.type))
    configuration = configuration or default_configuration(plan_content)
    resolved(plan_content, configuration)  # a PlanError now if there is no such configuration
    home = load_dataset(name)
    target = Target(plan_content, configuration, encoder_info(plan_content, configuration, home.json))
    _check_needs(method, needs.dims, needs.networks, target)

    folder = encoder_folder(
        name, plan_content["plans_name"], configuration, method, None if run is None else check_run_name(run)
    )
    fabric = _fabric(torch_device)
    if overwrite and fabric.is_global_zero:
        runs.clear(folder)
    fabric.barrier()
    small = torch_device.type == "cpu" or plan_content.get("autoseg", {}).get("budget") == "cpu"
    options = runs.resolve_options(
        folder,
        method_class,
        method,
        (plan_content, configuration),
        {
            "preset": preset,
            "seed": seed,
            "stages": runs.chosen_stages(stages),
            "init": None if init is None else str(init),
            "images": None if images is None else str(Path(images).resolve()),
            "more_datasets": [resolve_dataset(other) for other in more_datasets] or None,
            "exclude_fold": exclude_fold,
        },
        {**_own_settings(method, settings or {}), **({} if steps is None else {"steps": steps})},
        default_preset="cpu" if small else "default",
    )
    if runs.is_finished(folder):
        logger.info("Finished already: %s (--overwrite starts again)", folder)
        return folder

    with fabric.rank_zero_first():
        pool = build_pool(
            home,
            plan_content,
            configuration,
            images=None if options.images is None else Path(options.images),
            more_datasets=options.more_datasets,
            exclude_fold=options.exclude_fold,
            workers=0 if workers == 0 else None,
        )
    learn, held_out = pool.split(_HELD_OUT_SHARE, options.seed)
    config: Any = configure(method_class.Config, method, options.config)
    spec = method_class.plan(target, learn.cases, config)

    torch.manual_seed(options.seed)
    network = build_segmentation_network(plan_content, configuration, home.json)
    licence = _initialise(network, home, options) if options.init is not None else _OWN_LICENCE
    model = method_class(network, spec, config)  # type: ignore[call-arg]
    model.gather = distributed.gather
    for pair in model.momentum_pairs():
        pair.average.requires_grad_(False)
    fabric.to_device(model)
    distributed.equal_start(model)

    active = _Run(
        fabric=fabric,
        folder=folder,
        options=options,
        home=home,
        target=target,
        method=model,
        spec=spec,
        learn=learn,
        held_out=held_out,
        phases=phases(model.stages(), config.steps, options.stages),
        workers=_workers(torch_device) if workers is None else workers,
        licence=licence,
    )
    if fabric.is_global_zero:
        _trial_export(active)
        runs.start(folder, options, learn, held_out)
    fabric.barrier()
    _train(active)
    logger.info("Encoder: %s", folder)
    return folder


@dataclass
class _Run:
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


def _train(run: _Run) -> None:
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
    fixed = _held_out_batches(run)
    with stop_signal() as stopped:
        for phase in run.phases:
            if run.step < phase.first_step + phase.steps:
                resumed = state if state is not None and run.step > phase.first_step else None
                _train_phase(run, phase, resumed, learnable, record, fixed, stopped)
    if record is not None:
        record.close()


def _train_phase(
    run: _Run,
    phase: Phase,
    state: Mapping[str, Any] | None,
    learnable: Sequence[nn.Parameter],
    record: Record | None,
    fixed: Sequence[Batch],
    stopped: Any,
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
            norm = fabric.clip_gradients(method, optimizer, max_norm=stage.clip_norm, error_if_nonfinite=False)
            if norm is not None and not _scales(fabric):  # else a gradient that overflowed in half precision is skipped
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

    def __init__(self, run: _Run, optimizer: Any, record: Record | None) -> None:
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
            save_encoder(run.folder, run.method.export().module, _card(run))
        self._last = time.monotonic()
        self._wait = max(_SECONDS_BETWEEN_SAVES, (self._last - began) / _SAVING_SHARE)


@torch.no_grad()
def _evaluate(
    run: _Run,
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
    sums: dict[str, list[float]] = {}
    with run.fabric.autocast():
        for number, batch in enumerate(fixed):
            torch.manual_seed(number)
            terms = run.method.loss(run.fabric.to_device(batch), step)
            for name, value in terms.items():
                if value.ndim == 0:
                    sums.setdefault(name, []).append(float(value))
        figure = None
        if record is not None and (run.step in (0, run.steps) or record.wants_picture):
            figure = run.method.picture(run.fabric.to_device(fixed[0]))
    run.metrics = distributed.mean({k: sum(v) / len(v) for k, v in sums.items()}, run.fabric.device)
    set_training_mode(run.method, phase.stage)
    if record is not None:
        if figure is not None:
            record.draw(figure)
        record.pause(time.monotonic() - began)
        rate = phase.stage.learning_rate * rate_factor(phase.stage, step) if rate is None else rate
        record.write(run.step, phase.stage.name, rate, None if norm is None else float(norm), run.metrics)


def _held_out_batches(run: _Run) -> list[Batch]:
    """The same few batches of held-out cases for the whole run, made here: a mistake in `sample` shows at once."""
    stage = run.phases[0].stage.name
    batches = Batches(
        type(run.method),
        run.spec,
        run.held_out,
        seed=run.options.seed,
        stream=HELD_OUT,
        rank=run.fabric.global_rank,
        stage=stage,
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


def _scales(fabric: Fabric) -> bool:
    return getattr(fabric.strategy.precision, "scaler", None) is not None


def _refuse_nan(value: torch.Tensor, step: Step, what: str = "loss") -> None:
    if not torch.isfinite(value):
        raise AutosegError(
            f"The {what} is {float(value)} at step {step.global_index + 1}",
            remedy="a lower learning rate (autoseg methods lists the setting); the state before is kept. If it is the first "
            "step, autoseg verify looks for scans that hold NaN",
        )


def _trial_export(run: _Run) -> None:
    """Save the encoder as at the end, load it into a new network of the plan, and compare features: before step 1, because a
    run whose result does not fit is lost."""
    export = run.method.export()
    fresh = build_segmentation_network(dict(run.target.plan), run.options.configuration, run.home.json)
    with tempfile.TemporaryDirectory() as place:
        save_encoder(Path(place), export.module, _card(run))
        tensors, _ = load_encoder(Path(place))
    whole = export.scope == "encoder+decoder"
    transfer(tensors, fresh if whole else encoder_of(fresh))
    info = run.target.encoder
    image = torch.randn(1, info.channels, *(2 * s for s in info.total_stride), device=run.fabric.device)
    loaded = encoder_of(fresh).to(run.fabric.device).eval()
    trained = (encoder_of(export.module) if whole else export.module).eval()
    with torch.no_grad():
        equal = all(torch.equal(a, b) for a, b in zip(loaded(image), trained(image), strict=True))
    if not equal:
        raise PretrainedMismatch(
            "An encoder that was saved and loaded again gives other features; nothing was trained",
            where=type(run.method).__name__,
            remedy="this is an error in the method's export()",
        )


def _card(run: _Run) -> Any:
    return runs.describe_encoder(
        run.options,
        run.home,
        run.target,
        run.method,
        run.learn,
        run.held_out,
        steps_done=run.step,
        metrics=run.metrics,
        licence=run.licence,
    )


def _initialise(network: nn.Module, home: Dataset, options: runs.Options) -> str:
    """Fill the network from an encoder; returns the licence of its weights."""
    source = Path(str(options.init))
    if not source.exists():
        hits = find_encoders(home.name, str(options.init), options.plan_name, options.configuration)
        source = hits[0] if hits else source
    tensors, card = load_encoder(source)
    report = transfer(tensors, network if card.scope == "encoder+decoder" else encoder_of(network))
    logger.info("Starting from %s: %s", source, report.summary())
    return card.licence


def _own_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`voco.grid` → `grid`; a name without the method's is passed on as it is, so that the error names it."""
    return {name.removeprefix(f"{method}."): value for name, value in settings.items()}


def _check_needs(method: str, dims: Sequence[int], networks: Sequence[str], target: Target) -> None:
    found = target.encoder.spatial_dims
    if found not in dims:
        raise PlanError(
            f"{method} does not work on {found}D configurations",
            found=target.configuration,
            expected=" or ".join(f"{d}D" for d in dims),
            remedy="choose another configuration with -c",
        )
    network = target.settings["architecture"]["network_class_name"].rpartition(".")[2]
    if network not in networks:
        raise PlanError(
            f"{method} cannot pretrain this network",
            found=network,
            expected=" or ".join(networks),
            remedy="choose another configuration with -c",
        )


def _fabric(device: torch.device) -> Fabric:
    """A Fabric for this process: alone, or one of those that torchrun or srun started."""
    local, nodes = 1, 1
    if TorchElasticEnvironment.detect():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
    elif SLURMEnvironment.detect():
        nodes = int(os.environ["SLURM_NNODES"])
        local = int(os.environ["SLURM_NTASKS"]) // nodes
    precision = "32-true"
    if device.type == "cuda":
        precision = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    devices: Any = [device.index] if local == 1 and device.index is not None else local
    fabric = Fabric(
        accelerator=device.type,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if local * nodes > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    if not fabric.is_global_zero:
        logger.setLevel(logging.ERROR)
    return fabric


def _workers(device: torch.device) -> int:
    """Processes that make batches. A CPU needs its cores for the network, and a batch takes it a fiftieth of a step."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores - 1)) if device.type == "cuda" else min(2, cores // 4)
