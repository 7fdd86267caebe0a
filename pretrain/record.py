"""The record of a run: a line for the user now and then, `progress.csv`, TensorBoard and `views.png`."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from planners.files import replacing
from planners.progress import duration

logger = logging.getLogger("autoseg")

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_PICTURES = 30.0
_RECENT_ROWS = 5


class Record:
    """Writes into one run's folder. After a resume it continues where the state was, whatever had been written since."""

    def __init__(self, folder: Path, steps: int, first_step: int, chance: Mapping[str, float], seconds: float) -> None:
        self._folder, self._steps, self._chance = folder, steps, dict(chance)
        self._rows = [row for row in _read_rows(folder / "progress.csv") if int(row["step"]) <= first_step]
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._terms: list[dict[str, Tensor]] = []
        self._recent: deque[dict[str, float]] = deque(maxlen=_RECENT_ROWS)
        self._started, self._before = time.monotonic(), seconds
        self._since, self._since_step, self._waited = time.monotonic(), first_step, 0.0
        self._last_line = self._drawn = -math.inf
        self._said: set[str] = set()
        self.rate = 0.0
        """Steps a second, lately."""

    @property
    def seconds(self) -> float:
        """Time the run has taken, with what it took before it was interrupted."""
        return self._before + time.monotonic() - self._started

    @property
    def recent(self) -> dict[str, float]:
        """Terms averaged over those of the last rows that have them: not every batch has every term."""
        found = {name: [row[name] for row in self._recent if name in row] for name in (self._recent or [{}])[-1]}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def add(self, terms: Mapping[str, Tensor], waited: float) -> None:
        """Note the scalars of one batch, and how long it was waited for (seconds)."""
        self._terms.append(scalars(terms))
        self._waited += waited

    def pause(self, seconds: float) -> None:
        """Time that was spent on something else than steps since the last row."""
        self._since += seconds

    def write(
        self, step: int, stage: str, rate: float, gradient_norm: float | None, held_out: Mapping[str, float] | None
    ) -> None:
        """Close a row after `step` steps: the means since the last row, and held-out metrics if there are new ones."""
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        row: dict[str, Any] = {"step": step, "stage": stage, "seconds": round(self.seconds, 1)}
        if self._terms:
            self.rate = (step - self._since_step) / elapsed
            row |= {"learning_rate": rate, "steps_per_second": self.rate, "waiting_share": self._waited / elapsed}
            if gradient_norm is not None:
                row["gradient_norm"] = gradient_norm
            means = mean_terms(self._terms)
            self._recent.append(means)
            row |= means
        row |= {f"held_out_{name}": value for name, value in (held_out or {}).items()}
        row |= {f"chance_{name}": value for name, value in self._chance.items()}
        self._rows.append(row)
        self._terms, self._waited, self._since, self._since_step = [], 0.0, now, step
        _write_rows(self._folder / "progress.csv", self._rows)
        for name, value in row.items():
            if name not in ("step", "stage"):
                self._tensorboard.add_scalar(name.replace("held_out_", "held_out/"), value, step)
        if held_out or step == self._steps or now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            logger.info(self._line(row, held_out))

    def say_once(self, message: str | None) -> None:
        """Warn, the first time."""
        if message is not None and message[:40] not in self._said:
            self._said.add(message[:40])
            logger.warning(message)

    @property
    def wants_picture(self) -> bool:
        """Whether the last one is old; each takes most of a second."""
        return time.monotonic() - self._drawn > _SECONDS_BETWEEN_PICTURES

    def draw(self, figure: Any) -> None:
        """Replace `views.png`."""
        self._drawn = time.monotonic()
        with replacing(self._folder / "views.png") as temporary:
            figure.savefig(temporary, dpi=110)

    def close(self) -> None:
        self._tensorboard.close()

    def _line(self, row: Mapping[str, Any], held_out: Mapping[str, float] | None) -> str:
        parts = [f"step {row['step']} of {self._steps} ({row['stage']})"]
        if "loss" in row:
            parts.append(self._shown(row))
        if held_out:
            parts.append(f"held out: {self._shown(held_out)}")
        if self.rate and row["step"] < self._steps:
            left = (self._steps - row["step"]) / self.rate
            parts.append(f"{self.rate:.2g} steps/s, about {duration(left)} left")
        return "; ".join(parts)

    def _shown(self, values: Mapping[str, float]) -> str:
        """The loss, and what can be compared with chance."""
        if "loss" not in values:
            return "nothing to measure"
        shown = [f"loss {values['loss']:.3f}"]
        shown += [f"{n} {values[n]:.3f} (chance {chance:.3f})" for n, chance in self._chance.items() if n in values]
        return ", ".join(shown)


def scalars(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is logged of a batch's terms."""
    return {name: value.detach() for name, value in terms.items() if value.ndim == 0}


def mean_terms(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The mean of each term over the batches that have it; a batch of which nothing counts says no more than that."""
    values: dict[str, list[float]] = {}
    for terms in batches:
        empty = "shown" in terms and float(terms["shown"]) == 0
        for name in ["shown"] if empty else terms:
            values.setdefault(name, []).append(float(terms[name]))
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
