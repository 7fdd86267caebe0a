"""Tables for people: problems of a dataset, plans with their reasons, methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from autoseg.comparison.budget import Forecast
    from autoseg.comparison.run import Comparison
    from planners.intensity import IntensityScheme
    from planners.planner import PlannedPair
    from planners.verify import Problem
    from pretrain.fit import Fit
    from pretrain.importers.weights import Weights
    from pretrain.transfer import TransferReport

_STYLE = {"error": "bold red", "warning": "yellow"}


def wide_console() -> Console:
    """A console that never cuts tables off where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def print_problems(dataset: int | str, problems: Sequence[Problem]) -> None:
    """One row a problem, errors first."""
    console = wide_console()
    errors = sum(problem.severity == "error" for problem in problems)
    if not problems:
        console.print(f"Dataset {dataset}: no problems")
        return
    table = Table("", "problem", "case", "file", "found", "expected", "to fix", title_justify="left")
    for problem in sorted(problems, key=lambda p: (p.severity != "error", p.kind, p.case or "")):
        table.add_row(
            f"[{_STYLE[problem.severity]}]{problem.severity}[/]",
            problem.kind,
            problem.case or "",
            str(problem.file or ""),
            str(problem.found or ""),
            str(problem.expected or ""),
            problem.remedy or "",
        )
    console.print(table)
    console.print(f"Dataset {dataset}: {errors} error(s), {len(problems) - errors} warning(s)")


def print_plans(pair: PlannedPair) -> None:
    """Both plans: every decision of the main configuration as value — because — how to change it, the others in a line."""
    from planners.decisions import times
    from planners.plans import default_configuration, plan_path, resolved

    console = wide_console()
    for plan, purpose in ((pair.full, "for a GPU"), (pair.cpu, "for a CPU, on the same preprocessed data")):
        main = default_configuration(plan)
        table = Table(
            "decision", "value", "because", "to change", title=f"{plan['plans_name']} ({purpose}): {main}",
            title_justify="left",
        )  # fmt: skip
        for row in plan["configurations"][main]["autoseg"]["decisions"]:
            table.add_row(row["name"], row["value"], row["because"], row["change"])
        console.print(table)
        for name, configuration in plan["configurations"].items():
            if name != main and "patch_size" in configuration:
                console.print(
                    f"  also {name}: patch {times(configuration['patch_size'])}, "
                    f"spacing {times(resolved(plan, name)['spacing'])} mm, batch {configuration['batch_size']}"
                )
        console.print(f"  written to {plan_path(plan['dataset_name'], plan['plans_name'])}", soft_wrap=True)
    if not pair.written:
        console.print("Both plans were there already and are unchanged.")


def print_weights(weights: Weights) -> None:
    """What a file of weights is: one fact a line, then its warnings."""
    from planners.decisions import times

    console = wide_console()
    unknown = "not stated in the file"
    spacing, patch = weights.spacing, weights.patch_size
    facts = {
        "recognised as": weights.kind,
        "method": weights.method,
        "network": _network_text(weights),
        "tensors": f"{len(weights.tensors)} ({weights.parameters / 1e6:.1f} M numbers), {weights.scope}"
        + (f", its {', '.join(weights.part)} only" if weights.part else "")
        + (f"; {len(weights.dropped)} of the file not used" if weights.dropped else ""),
        "input channels": str(weights.channels),
        "spacing, mm": unknown if spacing is None else times([float(s) for s in spacing]),
        "patch, voxels": unknown if patch is None else times(patch),
        "intensities": "; ".join(_scheme_text(s) for s in weights.intensity) if weights.intensity else unknown,
        "modality": weights.modality or unknown,
        "trained on": weights.trained_on or unknown,
        "licence": weights.licence or unknown,
        "cite": weights.citation or unknown,
        "SHA-256": weights.sha256,
    }
    table = Table("", "", title=weights.name, title_justify="left", show_header=False)
    for fact, value in facts.items():
        table.add_row(fact, escape(value))
    console.print(table)
    for reason, names in _by_reason(weights.dropped).items():
        console.print(f"  not used: {len(names)} tensors ({_some(names)}): {reason}", markup=False)
    for warning in weights.warnings:
        console.print(f"[yellow]note[/] {escape(warning)}")


def print_fit(fitted: Fit, *, every_tensor: bool = True) -> None:
    """How weights and plan were brought together, and what becomes of the tensors."""
    console = wide_console()
    table = Table("decision", "value", "because", "to change", title_justify="left",
                  title=f"Into {fitted.plan_name}, {fitted.configuration}")  # fmt: skip
    for row in fitted.decisions:
        table.add_row(row.name, escape(row.value), escape(row.because), escape(row.change))
    console.print(table)
    print_transfer(fitted.report, every_tensor=every_tensor)
    if fitted.unwritten:
        console.print(f"  training would write {', '.join(plan['plans_name'] for plan in fitted.unwritten)}")


def print_transfer(report: TransferReport, *, every_tensor: bool = True) -> None:
    """What becomes of the tensors, those not simply loaded first; then the sum. Without `every_tensor` those that are
    loaded as they are are left out, and neighbours that share a fate are one row."""
    console = wide_console()
    rows = report.rows() if every_tensor else _neighbours([row for row in report.rows() if row[1] != "loaded"])
    if rows:
        table = Table("tensor", "", "why")
        for name, status, why in rows:
            table.add_row(name, status, escape(why))
        console.print(table)
    console.print(report.summary())


def print_comparison(found: Comparison) -> None:
    """The table of a comparison, what failed, and where everything lies."""
    from autoseg.comparison.report import print_comparison as show

    show(found.folder, found.lines, found.failures, wide_console())


def print_forecast(found: Forecast) -> None:
    """Hours and disk."""
    from autoseg.comparison.budget import print_forecast as show

    show(found, wide_console())


def print_methods(name: str | None) -> None:
    """All methods, or the settings of one with both presets."""
    from pretrain.catalog import METHODS

    console = wide_console()
    if name is None:
        table = Table("method", "what it learns from", "dimensions", "paper")
        for key, method in METHODS.items():
            table.add_row(key, method.idea, ", ".join(f"{d}D" for d in method.dims), method.paper)
        console.print(table)
        console.print("Settings of one: autoseg methods NAME")
        return
    from pretrain.catalog import settings_table

    table = Table("setting (--set)", "default", "cpu", "meaning")
    for row in settings_table(name):
        table.add_row(*row)
    console.print(table)


def _network_text(weights: Weights) -> str:
    arguments = weights.architecture["arch_kwargs"]
    name = weights.architecture["network_class_name"].rpartition(".")[2]
    sizes = {
        "feature_size": "feature size",
        "features_per_stage": "features",
        "n_blocks_per_stage": "blocks",
        "embed_dim": "width",
        "eva_depth": "depth",
    }
    told = [f"{text} {_dashed(arguments[key])}" for key, text in sizes.items() if key in arguments]
    return ", ".join([name, f"{weights.spatial_dims}D", *told])


def _neighbours(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Rows (tensor, status, why) with those of one module, status and reason put together: `stages.5… (48)`."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, status, why in rows:
        groups.setdefault((".".join(name.split(".")[:2]), status, why), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{module}… ({len(names)} tensors)", status, why)
        for (module, status, why), names in groups.items()
    ]


def _dashed(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _scheme_text(scheme: IntensityScheme) -> str:
    return (
        scheme.name if scheme.window is None else f"{scheme.name} [{scheme.window[0]:g}, {scheme.window[1]:g}] → [0, 1]"
    )


def _by_reason(dropped: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in dropped:
        reasons.setdefault(reason, []).append(name)
    return reasons


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
