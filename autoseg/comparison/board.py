"""Where a comparison is: a live table on a terminal, a line for each finished piece of work in a log.

The runs' own messages go to `log.txt` in the comparison's folder; warnings are shown too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from autoseg.comparison.design import Design, Pretraining, Training
from planners.progress import duration, without_bars

logger = logging.getLogger("autoseg")
_own = logging.getLogger("autoseg.comparison")

Work = Pretraining | Training


class Board:
    """Shows the work of `design`; use as a context."""

    def __init__(self, design: Design) -> None:
        self.design = design
        self._work: list[Work] = []
        for fold in design.folds:
            self._work += [*design.pretrainings(fold), *design.trainings(fold)]
        self._results: dict[Work, str] = {}
        self._dice: dict[Work, float] = {}
        self._seconds: dict[str, list[float]] = {}
        self._now: Work | None = None
        self._message = ""

    @contextlib.contextmanager
    def shown(self, log_file: Path) -> Iterator[Board]:
        """Show the table, or lines, while the block runs, and send the runs' messages to `log_file`."""
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        console = Console()
        live = Live(get_renderable=self._table, console=console, refresh_per_second=2) if console.is_terminal else None
        screen = list(logger.handlers)

        def passes(record: logging.LogRecord) -> bool:
            self._message = record.getMessage().strip().partition("\n")[0]
            shown = record.name == _own.name or record.levelno >= logging.WARNING
            if shown and live is not None:
                console.print(Text(record.getMessage()))
            return shown and live is None

        for handler in screen:
            handler.addFilter(passes)
        logger.addHandler(file)
        try:
            with without_bars(), live or contextlib.nullcontext():
                yield self
        finally:
            for handler in screen:
                handler.removeFilter(passes)
            logger.removeHandler(file)
            file.close()

    def begin(self, work: Work) -> None:
        self._now, self._message = work, ""

    def end(self, work: Work, result: str, *, seconds: float, dice: float | None = None, kept: bool = False) -> None:
        """Note how a piece of work ended: `done`, or what went wrong."""
        self._now = None
        self._results[work] = result
        if dice is not None:
            self._dice[work] = dice
        if not kept and result == "done":
            self._seconds.setdefault(type(work).__name__, []).append(seconds)
        found = "" if dice is None else f", Dice {dice:.3f}"
        ended = ("there already" if kept else f"done in {duration(seconds)}") if result == "done" else result
        _own.info("[%d/%d] %s: %s%s%s", len(self._results), len(self._work), describe(work), ended, found, self._left())

    def _left(self) -> str:
        """The time the rest takes, from the mean of what was done in this session."""
        rest = [type(work).__name__ for work in self._work if work not in self._results]
        if not rest or any(kind not in self._seconds for kind in rest):
            return ""
        means = {kind: sum(all_of) / len(all_of) for kind, all_of in self._seconds.items()}
        return f"; about {duration(sum(means[kind] for kind in rest))} left"

    def _table(self) -> Table:
        """Arms down, pretraining and shares of the labels across: how many of the trainings are done, and their mean Dice."""
        now = Text(f"{describe(self._now)}: {self._message}" if self._now else "", overflow="ellipsis", no_wrap=True)
        left = self._left().removeprefix("; ")
        title = f"{len(self._results)} of {len(self._work)} done" + (f", {left}" if left else "")
        table = Table(title=title, caption=now, title_justify="left", caption_justify="left")
        table.add_column("arm", overflow="fold")
        table.add_column("encoders", justify="right")
        for fraction in self.design.fractions:
            table.add_column(f"Dice at {percent(fraction)}", justify="right")
        for arm in self.design.arms:
            cells = [self._cell([w for w in self._work if isinstance(w, Pretraining) and w.arm == arm])]
            for fraction in self.design.fractions:
                cells.append(
                    self._cell([w for w in self._work if isinstance(w, Training) and (w.arm, w.fraction) == (arm, fraction)])
                )  # fmt: skip
            table.add_row(Text(arm.name), *cells)
        return table

    def _cell(self, works: list[Work]) -> Text:
        if not works:
            return Text("-")
        done = [work for work in works if self._results.get(work) == "done"]
        failed = sum(work in self._results for work in works) - len(done)
        known = [self._dice[work] for work in done if work in self._dice]
        mean = f"{sum(known) / len(known):.3f} " if known else ""
        text = Text(f"{mean}({len(done)}/{len(works)})")
        if failed:
            text.append(f" {failed} failed", "red")
        if self._now in works:
            text.append(" now", "cyan")
        return text


def percent(fraction: float) -> str:
    """0.1 → `10 %`."""
    return f"{100 * fraction:.3g} %"


def describe(work: Work) -> str:
    """`pretraining voco without fold 0`, or `voco, fold 0, 10 % of the labels, seed 1`."""
    if isinstance(work, Pretraining):
        return f"pretraining {work.arm.name} without fold {work.fold}"
    return f"{work.arm.name}, fold {work.fold}, {percent(work.fraction)} of the labels, seed {work.seed}"
