"""Pretrain one encoder: plan, scans, network and method are put together here, `pretrain.training` makes the steps.

On Lightning Fabric: a CPU, a GPU, or several through torchrun or srun. The method is not wrapped: an own backward pass would
break the reducer of torch's DistributedDataParallel. Gradients are averaged over the processes once a step instead.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import nn

from planners.configurations import ensure_configuration
from planners.dataset import Dataset, load_dataset
from planners.device import choose_device
from planners.errors import PlanError, PretrainedMismatch, SettingsError
from planners.files import write_json
from planners.locks import sole_lock
from planners.paths import resolve_dataset
from planners.plans import choose_plan, default_configuration, load_plan, plan_path, resolved
from planners.run_names import check_run_name
from pretrain import distributed, runs
from pretrain.catalog import entry, load_method
from pretrain.checkpoint import (
    encoder_folder,
    find_encoders,
    load_encoder,
    load_extras,
    refuse_unfinished,
    save_encoder,
)
from pretrain.encoders import build_segmentation_network, encoder_info, encoder_of
from pretrain.fit import IMPORTED_SHARE, differences, fit, transfer_weights
from pretrain.method import PretrainMethod, Stage, Target
from pretrain.optimise import Phase, phases
from pretrain.pools import build_pool
from pretrain.settings import configure
from pretrain.training import Run, card_of, train, trains_encoder
from pretrain.transfer import transfer

logger = logging.getLogger("autoseg")

_HELD_OUT_SHARE = 0.1
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
    allow_partial: bool = False,
    show_config: bool = False,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    workers: int | None = None,
    seed: int | None = None,
    stages: str | Sequence[str] | None = None,
) -> Path:
    """Learn an encoder from scans without their labels; an interrupted run continues.

    Args:
        method: a name of `pretrain.catalog.METHODS`.
        plan: name of a plan; None: autosegPlans, or autosegPlans_cpu without a GPU.
        preset: `cpu` or `default` settings of the method; None: by device and plan.
        steps: optimiser steps, instead of the preset's.
        run: a name, to keep several runs of a method.
        init: weights to start from: a path (`pretrain.importers`), or the name of an encoder of this dataset. Without
            `configuration` they decide it.
        images: a folder of more scans.
        more_datasets: whose scans are used too, preprocessed by this dataset's plan, or on their own grid if the method takes
            any spacing.
        exclude_fold: whose validation cases are left out.
        allow_partial: accept an `init` whose pretraining is not finished.
        show_config: only say every option, its value and who decided it.
        settings: of the method, `{"voco.grid": "1,3,3"}`.
        workers: processes that make batches; 0: everything is done in this one.
        seed: decides views and new weights; None: 0, or the run's.
        stages: names or numbers of the stages to run; None: all.

    Returns the folder of the encoder. Raises SettingsError when a run with other options is there; SystemExit (130, 143) after
    saving, when stopped by SIGINT or SIGTERM.
    """
    name = resolve_dataset(dataset)
    method_class, needs = load_method(method), entry(method)
    torch_device = choose_device(device)
    plan_name = choose_plan(name, plan, torch_device.type)
    plan_content = load_plan(name, plan_name)
    chosen = {"plan_name": plan, "configuration": configuration}
    home = load_dataset(name)
    if configuration is None and init is not None:
        plan_content, configuration = _plan_for(home, str(init), plan_name, write=not show_config)
    else:
        own_choice = method_class.configuration(_own_settings(method, settings or {}))
        configuration = configuration or own_choice or default_configuration(plan_content)
        plan_content = ensure_configuration(name, plan_name, configuration, write=not show_config)
    target = Target(
        plan_content, configuration, encoder_info(plan_content, configuration, home.json), initialised=init is not None
    )
    check_needs(method, needs.dims, needs.networks, target)

    folder = encoder_folder(
        name, plan_content["plans_name"], configuration, method, None if run is None else check_run_name(run)
    )
    fabric = build_fabric(torch_device)
    given = {
        "preset": preset,
        "seed": seed,
        "stages": runs.chosen_stages(stages),
        "init": None if init is None else str(init),
        "images": None if images is None else str(Path(images).resolve()),
        "more_datasets": [resolve_dataset(other) for other in more_datasets] or None,
        "exclude_fold": exclude_fold,
    }
    own_settings = {**_own_settings(method, settings or {}), **({} if steps is None else {"steps": steps})}
    small = torch_device.type == "cpu" or plan_content.get("autoseg", {}).get("budget") == "cpu"
    alone = sole_lock(folder.with_name(f".{folder.name}.lock"), "pretraining this encoder")
    with alone if fabric.is_global_zero else nullcontext():
        if overwrite and not show_config and fabric.is_global_zero:
            runs.clear(folder)
        fabric.barrier()
        options = runs.resolve_options(
            folder,
            method_class,
            method,
            (plan_content, configuration),
            given,
            own_settings,
            default_preset="cpu" if small else "default",
        )
        if show_config:
            begun = (folder / runs.SETTINGS_NAME).is_file()
            for row in runs.option_rows(
                options, method_class.presets[options.preset], {**given, **chosen}, own_settings, begun=begun
            ):
                logger.info("%-24s %-24s %s", *row)
            return folder
        if runs.is_finished(folder):
            logger.info("Finished already: %s (--overwrite starts again)", folder)
            return folder
        batch_workers = _workers(torch_device) if workers is None else workers
        active = _assemble(
            fabric, folder, options, home, target, method_class, workers=batch_workers, allow_partial=allow_partial
        )
        if fabric.is_global_zero:
            _trial_export(active)
            runs.start(folder, options, active.learn, active.held_out)
        fabric.barrier()
        train(active)
        if not trains_encoder(active):
            logger.warning(
                "Stage %s does not train the encoder, which is as it began: go on with --init %s and the stages that do",
                ", ".join(phase.stage.name for phase in active.phases),
                folder.name,
            )
    logger.info("Encoder: %s", folder)
    return folder


def _assemble(
    fabric: Fabric,
    folder: Path,
    options: runs.Options,
    home: Dataset,
    target: Target,
    method_class: type[PretrainMethod],
    *,
    workers: int,
    allow_partial: bool,
) -> Run:
    """Scans, network, method and phases of a run, on the device and equal on all processes."""
    plan = dict(target.plan)
    with fabric.rank_zero_first():
        pool = build_pool(
            home,
            plan,
            method_class.data_configuration(target),
            images=None if options.images is None else Path(options.images),
            more_datasets=options.more_datasets,
            exclude_fold=options.exclude_fold,
            own_grid=method_class.own_grid,
        )
    learn, held_out = pool.split(_HELD_OUT_SHARE, options.seed)
    config: Any = configure(method_class.Config, options.method, options.config)
    spec = method_class.plan(target, learn.cases, config)

    torch.manual_seed(options.seed)
    network = build_segmentation_network(plan, target.configuration, home.json)
    licence = _OWN_LICENCE
    if options.init is not None:
        licence = _initialise(network, home, target, options, allow_partial)
    model = method_class(network, spec, config)  # type: ignore[call-arg]
    model.gather = distributed.gather
    chosen = phases(model.stages(), config.steps, options.stages)
    _refuse_new_weights(chosen[0].stage, options)
    _fill_extras(model, chosen, home, options)
    for pair in model.momentum_pairs():
        pair.average.requires_grad_(False)
    fabric.to_device(model)
    distributed.equal_start(model)
    return Run(
        fabric=fabric,
        folder=folder,
        options=options,
        home=home,
        target=target,
        method=model,
        spec=spec,
        learn=learn,
        held_out=held_out,
        phases=chosen,
        workers=workers,
        licence=licence,
    )


def _trial_export(run: Run) -> None:
    """Save the encoder as at the end, load it into a new network of the plan, and compare features: before step 1, because a
    run whose result does not fit is lost."""
    export = run.method.export()
    fresh = build_segmentation_network(dict(run.target.plan), run.options.configuration, run.home.json)
    with tempfile.TemporaryDirectory() as place:
        save_encoder(Path(place), export.module, card_of(run), export.extras)
        tensors, _ = load_encoder(Path(place))
    whole = export.scope == "encoder+decoder"
    transfer(tensors, fresh if whole else encoder_of(fresh))
    info = run.target.encoder
    image = torch.randn(1, info.channels, *(2 * s for s in info.total_stride))
    # On the CPU, where equal weights give equal bits.
    kept = copy.deepcopy(encoder_of(export.module) if whole else export.module).cpu().eval()
    with torch.no_grad():
        equal = all(torch.equal(a, b) for a, b in zip(encoder_of(fresh).eval()(image), kept(image), strict=True))
    if not equal:
        raise PretrainedMismatch(
            "An encoder that was saved and loaded again gives other features; nothing was trained",
            where=type(run.method).__name__,
            remedy="this is an error in the method's export()",
        )


def _initialise(network: nn.Module, home: Dataset, target: Target, options: runs.Options, allow_partial: bool) -> str:
    """Fill the network from weights; returns their licence."""
    from pretrain.importers.reading import read_weights  # brings timm, which most runs do without

    weights = read_weights(_init_source(home.name, str(options.init), options.plan_name, options.configuration))
    if weights.card is not None and not allow_partial:
        refuse_unfinished(weights.card, Path(str(options.init)))
    normalizations = resolved(dict(target.plan), target.configuration)["normalization_schemes"]
    share = 1.0 if weights.card is not None else IMPORTED_SHARE
    report = transfer_weights(weights, network, share, normalizations)
    logger.info("Starting from %s (%s): %s", weights.name, weights.kind, report.summary())
    licence = weights.licence or "that of the weights it started from, which is not known"
    logger.info("Licence of %s: %s", weights.name, licence)
    notes = [*weights.warnings, differences(dict(target.plan), target.configuration, weights)]
    for note in filter(None, notes):
        logger.warning("%s: %s", weights.name, note)
    return licence


def _plan_for(home: Dataset, init: str, plan_name: str, *, write: bool) -> tuple[dict, str]:
    """The plan and the configuration whose network the weights of `--init` fill, on the plan's own data."""
    from pretrain.importers.reading import read_weights

    weights = read_weights(_init_source(home.name, init, plan_name, None))
    card = weights.card
    if card is not None and (card.dataset, card.plan_name) == (home.name, plan_name):
        return ensure_configuration(home.name, plan_name, card.configuration, write=write), card.configuration
    share = 1.0 if card is not None else IMPORTED_SHARE
    fitted = fit(home, weights, plan_name=plan_name, keep_data=True, minimum_share=share)
    for plan in fitted.unwritten if write else ():
        write_json(plan_path(home.name, plan["plans_name"]), plan)
        logger.info("Added the configuration %s to %s", fitted.configuration, plan["plans_name"])
    return fitted.plan, fitted.configuration


def _init_source(dataset_name: str, init: str, plan_name: str | None, configuration: str | None) -> Path:
    """What `--init` means: a path, or the name of one of the dataset's encoders."""
    source = Path(init)
    if not source.exists():
        hits = find_encoders(dataset_name, init, plan_name, configuration)
        source = hits[0] if hits else source
    return source


def _refuse_new_weights(first: Stage, options: runs.Options) -> None:
    if first.goes_on and options.init is None:
        raise SettingsError(
            f"Stage {first.name} goes on with weights that were trained before",
            found=f"--stages {','.join(options.stages or [])}, no --init",
            remedy="run the stages before it too, or give --init an encoder of this method or a file of weights",
        )


def _fill_extras(method: PretrainMethod, chosen: Sequence[Phase], home: Dataset, options: runs.Options) -> None:
    """Modules that are kept beside the encoder, from beside the weights of `--init`. Without their stage they must be there."""
    extras = method.export().extras
    filled: list[str] = []
    if options.init is not None and extras:
        source = _init_source(home.name, options.init, options.plan_name, options.configuration)
        filled = load_extras(source if source.is_dir() else source.parent, extras)
        logger.info("Also from there: %s", ", ".join(filled) or "nothing")
        for pair in method.momentum_pairs():
            pair.online.load_state_dict(pair.average.state_dict())
    # What no stage trains, the method has from elsewhere.
    trained = [name for name in extras if any(name not in stage.frozen for stage in method.stages())]
    untrained = [name for name in chosen[0].stage.frozen if name in trained and name not in filled]
    if untrained:
        raise SettingsError(
            f"Stage {chosen[0].stage.name} needs a trained {untrained[0]}",
            found=f"--stages {','.join(phase.stage.name for phase in chosen)}, no {untrained[0]}.safetensors",
            remedy="run all stages, or give --init a folder of an earlier run of this method",
        )


def _own_settings(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`voco.grid` → `grid`; a name without the method's is passed on as it is, so that the error names it."""
    return {name.removeprefix(f"{method}."): value for name, value in settings.items()}


def check_needs(method: str, dims: Sequence[int], networks: Sequence[str], target: Target) -> None:
    """PlanError when a method cannot work on the target's dimensions or network."""
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


def build_fabric(device: torch.device) -> Fabric:
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
