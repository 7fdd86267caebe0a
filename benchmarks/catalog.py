"""Every benchmark and what is asked of it: a literal table. Modules are imported when a benchmark runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from benchmarks.measuring import Made, Scale


@dataclass(frozen=True)
class Benchmark:
    """One row of the table of results."""

    function: str
    """"benchmarks.export:labels_14", which makes from a Scale a Duel, or a context manager that gives one."""
    goal: float
    """CPU time of the reference over ours, at least."""
    what: str
    """What is done, for readers."""
    memory_goal: float | None = None
    """Peak memory of ours over the reference's, at most."""
    against: str = "nnunet"
    """Whose code the reference is."""
    small_goal: float | None = None
    """What is asked on small data where half the goal cannot be reached; the row says why."""

    def make(self, scale: Scale) -> Made:
        """What `benchmarks.measuring.opened` opens."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(scale)


CATALOG = {
    "help": Benchmark("benchmarks.startup:help", 20, "help of training"),
    "wrong_argument": Benchmark("benchmarks.startup:wrong_argument", 13, "training of a data set that is not there"),
    "crops_whole_volume": Benchmark(
        "benchmarks.pretraining_data:whole_volume", 10, "VoCo views of a CT, volume read for each", against="voco"
    ),
    "crops_cached": Benchmark(
        "benchmarks.pretraining_data:cached", 3, "VoCo views of a CT, volume cached on disk", against="voco"
    ),
}
