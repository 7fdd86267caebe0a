"""The results for people and programs: results.csv, summary.json, comparison.md, two plots, a table on the terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoseg.comparison.board import percent
from autoseg.comparison.design import Design
from autoseg.comparison.outcomes import Outcome, write_csv
from autoseg.comparison.plots import draw_dice_over_labels, draw_learning_curves
from autoseg.comparison.statistics import COVERAGE, LEAST_CASES, ROUNDS, Estimate, Line, median_epochs
from planners.files import replacing, write_json
from planners.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

HEADINGS = (
    "labels", "arm", "Dice", "to scratch", "95 % interval", "finding", "epochs to 90 %", "pretraining", "training",
)  # fmt: skip
_TEXT_COLUMNS = (0, 1, 5)
_WIDE = 120


def write_report(design: Design, outcomes: list[Outcome], lines: Sequence[Line], failures: Mapping[str, str]) -> None:
    """Write all files of a comparison into its folder."""
    folder = design.folder
    write_csv(outcomes, folder / "results.csv")
    for name, figure in (
        ("dice_over_labels.png", draw_dice_over_labels(lines)),
        ("learning_curves.png", draw_learning_curves(outcomes, design.arms)),
    ):
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, dpi=130)
    notes = what_to_know(design, outcomes, lines)
    write_json(folder / "summary.json", _summary(design, lines, failures, notes))
    with replacing(folder / "comparison.md") as temporary:
        temporary.write_text(_markdown(design, lines, failures, notes), encoding="utf-8")


def print_comparison(folder: Path, lines: Sequence[Line], failures: Mapping[str, str], console: Console) -> None:
    """The table, what failed, and where everything lies."""
    from rich.markup import escape
    from rich.table import Table

    # The times are left to comparison.md where a terminal is narrow.
    columns = range(1, len(HEADINGS) if console.width >= _WIDE else len(HEADINGS) - 2)
    for fraction in dict.fromkeys(line.fraction for line in lines):
        some = [row(line) for line in lines if line.fraction == fraction]
        table = Table(title=f"Mean Dice of held-out cases, labels of {some[0][0]}", title_justify="left")
        for index in columns:
            table.add_column(
                HEADINGS[index],
                justify="left" if index in _TEXT_COLUMNS else "right",
                no_wrap=index in (2, 3, 4),
                overflow="fold",
            )
        for cells in some:
            table.add_row(*(escape(cells[index]) for index in columns))
        console.print(table)
    if lines:
        console.print(f"What the numbers mean, and what they do not: {folder / 'comparison.md'}", soft_wrap=True)
    for what, why in failures.items():
        console.print(f"[red]failed[/] {escape(what)}: {escape(why)}", highlight=False, soft_wrap=True)
    if failures:
        console.print("The same command tries again what failed and keeps the rest.")


def row(line: Line) -> list[str]:
    """The cells of a line, under `HEADINGS`."""
    few, most = line.training_cases
    cases = f"{few}" if few == most else f"{few} to {most}"
    difference, interval = "", ""
    if line.difference is not None:
        difference, interval = f"{line.difference.mean:+.3f}", _interval(line.difference)
    return [
        f"{percent(line.fraction)} ({cases} case{'' if most == 1 else 's'})",
        line.arm,
        f"{line.dice.mean:.3f}",
        difference,
        interval,
        line.verdict,
        _epochs(line),
        duration(line.pretraining_seconds) if line.pretraining_seconds else "",
        duration(line.training_seconds),
    ]


def what_to_know(design: Design, outcomes: Sequence[Outcome], lines: Sequence[Line]) -> list[str]:
    """What limits the conclusions of this comparison, each in a sentence or two."""
    notes = []
    differences = [line for line in lines if line.difference is not None]
    seeds = min((line.pair_seeds for line in differences), default=0)
    cases = min((line.pairs for line in differences), default=0)
    if seeds == 1:
        notes.append(
            "One seed: the intervals say how the difference varies over cases. How another training of the same arm would "
            "have ended is not in them; two trainings from scratch differ too. Several --seeds show it."
        )
    elif seeds in COVERAGE:
        notes.append(
            f"{seeds} seeds: where the chance of training is larger than what differs between cases, an interval from so few "
            f"holds the truth in about {COVERAGE[seeds]} of 100 comparisons, not in 95."
        )
    if 0 < cases < LEAST_CASES:
        notes.append(
            f"{cases} validation cases: below {LEAST_CASES} nothing is called better or worse, because all differences "
            "have the same sign too often by chance. More --folds give more cases."
        )
    if len(differences) > 1:
        notes.append(
            f"{len(differences)} differences are listed, each with its own 95 % interval: about one in twenty would "
            "leave 0 out even if no pretraining did anything, and all share the luck of one scratch."
        )
    if len(design.folds) > 1:
        notes.append(
            "Trainings of different folds share training cases, so cases of different folds are not quite independent."
        )
    if any(not arm.is_scratch for arm in design.arms):
        notes.append(
            "One encoder per arm and fold: the chance of pretraining is not in the intervals. Its time is extra: scratch "
            "was not trained longer in return."
        )
    missing = _missing(design, outcomes)
    if missing:
        notes.append(f"Not finished: {missing}. Differences are of the pairs that both exist.")
    for configuration, settings in design.train.items():
        if settings.epochs < 2:
            notes.append(f"One epoch ({configuration}): learning curves are single points.")
    return notes


def _missing(design: Design, outcomes: Sequence[Outcome]) -> str:
    asked = sum(len(design.trainings(fold)) for fold in design.folds)
    return f"{asked - len(outcomes)} of {asked} trainings" if len(outcomes) < asked else ""


def _markdown(design: Design, lines: Sequence[Line], failures: Mapping[str, str], notes: Sequence[str]) -> str:
    text = [f"# Comparison of pretraining on {design.dataset_name}", "", "## What was done", ""]
    text += [f"- {key}: {value}" for key, value in _facts(design).items()]
    text += ["", "## Result", "", *_table(lines), "", "![Dice over labels](dice_over_labels.png)", "",
             "![Learning curves](learning_curves.png)", "", "## How to read it", ""]  # fmt: skip
    text += [
        "- Dice: mean over validation cases (and seeds) of the mean over a case's structures. A missed or an invented "
        "structure counts 0; one that is in neither mask does not count.",
        "- To scratch: difference, arm minus scratch of the same configuration, paired: same fold, seed, training cases "
        "and validation case.",
        f"- 95 % interval: percentile bootstrap, {ROUNDS:,} rounds with a fixed seed; in each, seeds and cases are drawn "
        "with replacement, independently of each other, and the differences of the drawn seeds × cases are averaged.",
        '- "No difference shown": the interval holds 0. That is not proof that there is none.',
        "- Epochs to 90 %: first epoch whose Dice of validation patches is at least 90 % of what scratch ends with at the "
        'same fold, seed and labels; median ("never" where half or more did not), and how many trainings got there.',
        "- Pretraining and training: mean time of one run as it was, other work on the machine included.",
        *(f"- {note}" for note in notes),
    ]
    if failures:
        text += ["", "## Failed", "", *(f"- {what}: {' '.join(why.split())}" for what, why in failures.items())]
    return "\n".join(text) + "\n"


def _facts(design: Design) -> dict[str, str]:
    # What stands in an arm's brackets goes before the options of all.
    shared = {f"{design.steps} steps": design.steps, f"preset {design.preset}": design.preset}
    options = [text for text, given in shared.items() if given]
    unless = any(name in ("steps", "preset") for arm in design.arms for name, _ in arm.options)
    facts = {
        "plan": f"{design.plan_name}, {', '.join(design.plans)}",
        "arms": ", ".join(arm.name for arm in design.arms),
        "folds": ", ".join(f"{fold} ({len(design.splits[fold]['train'])} training, {len(design.splits[fold]['val'])} "
                           "validation cases)" for fold in design.folds),
        "seeds": ", ".join(map(str, design.seeds)),
        "labels": ", ".join(map(percent, design.fractions)) + "; smaller sets are parts of larger ones, by seed",
        "pretraining": "once per arm and fold, on all scans but the fold's validation cases, without labels"
        + "".join(f", {text}" for text in options) + (" unless the arm says otherwise" if options and unless else ""),
    }  # fmt: skip
    for name, settings in design.train.items():
        facts[f"training of every arm in {name}"] = (
            f"{settings.epochs} epochs of {settings.iterations} iterations, {settings.optimizer} at {settings.lr:g}, "
            f"{settings.schedule}, weight decay {settings.weight_decay:g}, warm-up {settings.warm_up:g}, "
            f"{settings.frozen_epochs} epochs with the encoder frozen"
        )
    return facts


def _table(lines: Sequence[Line]) -> list[str]:
    rows = [[cell.replace("|", "\\|") for cell in row(line)] for line in lines]
    align = [":--" if index in _TEXT_COLUMNS else "--:" for index in range(len(HEADINGS))]
    return [f"| {' | '.join(cells)} |" for cells in (list(HEADINGS), align, *rows)]


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None or estimate.high is None else f"{estimate.low:+.3f} to {estimate.high:+.3f}"


def _epochs(line: Line) -> str:
    if not line.epochs:
        return ""
    reached = sum(epoch is not None for epoch in line.epochs)
    middle = median_epochs(line.epochs)
    return f"{'never' if middle is None else f'{middle:g}'} ({reached} of {len(line.epochs)})"


def _summary(
    design: Design, lines: Sequence[Line], failures: Mapping[str, str], notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "autoseg": version("autoseg"),
        "dataset": design.dataset_name,
        "run": design.run,
        **design.kept(),
        "folds": list(design.folds),
        "seeds": list(design.seeds),
        "arms": [arm.name for arm in design.arms],
        "lines": [_json({**dataclasses.asdict(line), "epochs_median": median_epochs(line.epochs)}) for line in lines],
        "failures": dict(failures),
        "notes": list(notes),
    }


def _json(value: Any) -> Any:
    """JSON has no NaN and no tuples."""
    if isinstance(value, dict):
        return {key: _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
