"""One pretraining run on disk: its options, its state for continuing, and the encoder with its description."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from planners.anisotropy import degree_of_anisotropy
from planners.dataset import Dataset
from planners.errors import SettingsError
from planners.files import read_json, replacing, write_json
from planners.plans import plan_hash
from pretrain.checkpoint import CARD_NAME, EncoderCard
from pretrain.method import PretrainMethod, Target
from pretrain.safe_load import load_torch
from pretrain.settings import configure
from pretrain.volumes import Pool

_NOT_GIVEN: dict[str, Any] = {"more_datasets": [], "seed": 0}  # others: None
SETTINGS_NAME = "settings.json"
STATE_NAME = "state.pt"


@dataclasses.dataclass(frozen=True)
class Options:
    """What makes a run what it is. All of it is in `settings.json`; a run is continued with the same or not at all."""

    method: str
    preset: str
    config: dict[str, Any]
    """Every setting of the method."""
    plan_name: str
    plan_hash: str
    configuration: str
    seed: int
    stages: list[str] | None
    init: str | None
    images: str | None
    more_datasets: list[str]
    exclude_fold: int | None


def resolve_options(
    folder: Path,
    method: type[PretrainMethod],
    name: str,
    target: tuple[Mapping[str, Any], str],
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    default_preset: str,
) -> Options:
    """The options of a new run, or those of the run in `folder` if what is given does not contradict them.

    Args:
        target: plan and configuration.
        given: preset, seed, stages, init, images, more_datasets, exclude_fold; None: not given.
        settings: of the method, by name; texts or values.

    Raises SettingsError naming what differs from the run that is there.
    """
    plan, configuration = target
    stored = read_json(folder / SETTINGS_NAME) if (folder / SETTINGS_NAME).is_file() else None
    preset = given["preset"] or (stored["preset"] if stored else default_preset)
    if preset not in method.presets:
        raise SettingsError("No such preset", found=preset, expected=", ".join(method.presets))
    layers = [stored["config"]] if stored else [method.presets[preset]]
    options = Options(
        method=name,
        preset=preset,
        config=_plain(dataclasses.asdict(configure(method.Config, name, *layers, settings))),
        plan_name=plan["plans_name"],
        plan_hash=plan_hash(dict(plan), configuration),
        configuration=configuration,
        **{  # type: ignore[arg-type]
            key: (stored[key] if stored else _NOT_GIVEN.get(key)) if value is None else value
            for key, value in given.items()
            if key != "preset"
        },
    )
    if stored is not None:
        _refuse_changes(folder, stored, dataclasses.asdict(options), name)
    return options


def option_rows(
    options: Options, preset: Mapping[str, Any], given: Mapping[str, Any], settings: Mapping[str, Any], *, begun: bool
) -> list[tuple[str, str, str]]:
    """(setting, value, who decided it: flag, run, preset or default) for `--show-config`.

    Args:
        preset: what the chosen preset changes; given, settings: as for `resolve_options`; begun: the run is there already.
    """
    rows = []
    for key, value in dataclasses.asdict(options).items():
        if key == "config":
            for name, setting in value.items():
                origin = "flag" if name in settings else "run" if begun else "preset" if name in preset else "default"
                rows.append((f"{options.method}.{name}", str(setting), origin))
        elif key not in ("method", "plan_hash"):
            origin = "flag" if given.get(key) is not None else "run" if begun else "default"
            rows.append((key, str(value), origin))
    return rows


def _refuse_changes(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], method: str) -> None:
    flat = [_flat(options, method) for options in (stored, wanted)]
    changed = [f"{key} {value} (was {flat[0].get(key)})" for key, value in flat[1].items() if flat[0].get(key) != value]
    if changed:
        raise SettingsError(
            "A run with other options is there already",
            where=folder,
            found=", ".join(changed),
            remedy="keep both with --run NAME, or start this one again with --overwrite",
        )


def _flat(options: Mapping[str, Any], method: str) -> dict[str, Any]:
    flat = {key: value for key, value in options.items() if key != "config"}
    return flat | {f"{method}.{key}": value for key, value in options["config"].items()}


def start(folder: Path, options: Options, learn: Pool, held_out: Pool) -> None:
    """Write the options and the cases of a new run, or check that a run goes on with the same cases."""
    cases = {"cases": [c.id for c in learn.cases], "held_out": [c.id for c in held_out.cases]}
    path = folder / SETTINGS_NAME
    if not path.is_file():
        write_json(path, {**dataclasses.asdict(options), **cases, "version": version("autoseg")})
        return
    stored = read_json(path)
    if {key: stored[key] for key in cases} != cases:
        before, now = ({*one["cases"], *one["held_out"]} for one in (stored, cases))
        raise SettingsError(
            "The scans have changed since this run began",
            where=folder,
            found=f"{len(now - before)} new, {len(before - now)} gone",
            remedy="start again with --overwrite, or keep both with --run NAME",
        )


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has made all its steps."""
    return (folder / CARD_NAME).is_file() and EncoderCard.from_json(read_json(folder / CARD_NAME)).finished


def clear(folder: Path) -> None:
    """Remove a run, to start it again."""
    if folder.is_dir():
        shutil.rmtree(folder)


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what continuing needs, whole or not at all. Tensors, numbers, texts, lists and dicts only."""
    with replacing(folder / STATE_NAME) as temporary:
        torch.save(dict(state), temporary)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The state of an interrupted run, on the CPU, or None where there is none."""
    path = folder / STATE_NAME
    if not path.is_file():
        return None
    return load_torch(path, what="state of this run", remedy="start again with --overwrite")


def describe_encoder(
    options: Options,
    dataset: Dataset,
    target: Target,
    method: PretrainMethod,
    spec: Any,
    learn: Pool,
    held_out: Pool,
    *,
    steps_done: int,
    metrics: Mapping[str, float],
    licence: str,
    trained: bool,
) -> EncoderCard:
    """The card of an encoder."""
    spacing, settings = target.spacing, target.settings
    intensity = target.plan.get("autoseg", {}).get("intensity", settings["normalization_schemes"])
    chance = method.chance()
    return EncoderCard(
        method=options.method,
        version=version("autoseg"),
        dataset=dataset.name,
        plan_name=options.plan_name,
        plan_hash=options.plan_hash,
        configuration=options.configuration,
        architecture=settings["architecture"],
        scope=method.export().scope,
        spacing=list(spacing),
        patch_size=list(target.patch_size),
        DA=degree_of_anisotropy(spacing) if len(spacing) == 3 else None,
        channels=list(dataset.channel_names),
        intensity=list(intensity),
        steps_done=steps_done,
        steps_asked=options.config["steps"],
        metrics={
            name: {"value": value if math.isfinite(value) else None, "chance": chance.get(name)}
            for name, value in metrics.items()
        },
        cases=[case.id for case in learn.cases],
        held_out=[case.id for case in held_out.cases],
        excluded_fold=options.exclude_fold,
        licence=licence,
        citation=method.citation,
        trained=trained,
        task={"views": to_jsonable_python(spec, fallback=_numpy_to_plain), "chance": dict(chance)},
    )


def _numpy_to_plain(value: Any) -> Any:
    """Of numbers and arrays; anything else ends the run before its first step."""
    return value.tolist()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def chosen_stages(stages: str | Sequence[str] | None) -> list[str] | None:
    """`1,2` or a list, as a list."""
    return (
        [part.strip() for part in stages.split(",")]
        if isinstance(stages, str)
        else None
        if stages is None
        else list(stages)
    )
