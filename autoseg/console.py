"""Tables for people: problems of a dataset, plans with their reasons, methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from planners.planner import PlannedPair
    from planners.verify import Problem

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
