"""One thing done in two ways, and what each costs.

Reference and ours run in alternation in one process, and what counts is the ratio of their CPU time (user and system, all
threads, children included): on a machine that others use too, wall times differ by a factor of three from one minute to the
next, and CPU times of different minutes by a fifth.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

_LEAST_MEMORY = 2**20  # bytes; a smaller growth is the allocator's, not the benchmark's


class Scale(Enum):
    """How large the data of a benchmark are."""

    small = "small"
    """Seconds, on data that the benchmark makes itself: for CI."""
    full = "full"
    """The sizes of the published figures, on real scans (`benchmarks.scans`)."""


@dataclass(frozen=True)
class Agreement:
    """How close two outputs are."""

    text: str
    """For the table: "max 3.1e-06 sd", "0.9999994 of voxels"."""
    holds: bool
    """Whether they are as close as is asked for."""


@dataclass(frozen=True)
class Duel:
    """One thing done in two ways. What both import and read should be there before: calls are measured from the first on."""

    reference: Callable[[], Any]
    """nnU-Net's own function, or another project's."""
    ours: Callable[[], Any]
    agreement: Callable[[Any, Any], Agreement]
    """Of the reference's output and ours, in this order."""


Made = Duel | AbstractContextManager[Duel]


@dataclass(frozen=True)
class Cost:
    """Of one call, or medians over several."""

    cpu_s: float
    wall_s: float
    peak_bytes: float
    """Growth of the process's resident memory above its state before the call, without its children's; 0 where the system
    does not tell."""


@dataclass(frozen=True)
class Outcome:
    """What a duel gave."""

    reference: Cost
    ours: Cost
    ratios: tuple[float, ...]
    """CPU time of the reference over ours, one a round."""
    agreement: Agreement

    @property
    def ratio(self) -> float:
        """Of the medians of CPU time: 10 means that ours takes a tenth."""
        return self.reference.cpu_s / self.ours.cpu_s

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory of ours over the reference's; None where either needs next to none, as where other processes work, or
        nobody could tell."""
        if min(self.reference.peak_bytes, self.ours.peak_bytes) < _LEAST_MEMORY:
            return None
        return self.ours.peak_bytes / self.reference.peak_bytes


def compare(duel: Duel, rounds: int) -> Outcome:
    """Run both sides in alternation, `rounds` times each; the outputs of the last round are compared."""
    costs: list[tuple[Cost, Cost]] = []
    for number in range(rounds):
        reference_output, reference = measure(duel.reference)
        ours_output, ours = measure(duel.ours)
        costs.append((reference, ours))
        if number < rounds - 1:
            del reference_output, ours_output
    reference_costs, our_costs = zip(*costs, strict=True)
    return Outcome(
        reference=_median(reference_costs),
        ours=_median(our_costs),
        ratios=tuple(reference.cpu_s / ours.cpu_s for reference, ours in costs),
        agreement=duel.agreement(reference_output, ours_output),
    )


def measure(function: Callable[[], Any]) -> tuple[Any, Cost]:
    """What a call returns, and what it cost."""
    gc.collect()
    _return_free_memory()
    before = _forget_peak()
    cpu, wall = _cpu_seconds(), time.perf_counter()
    output = function()
    wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    peak = 0.0 if before is None else max(0.0, _resident("VmHWM") - before)
    return output, Cost(cpu, wall, peak)


@contextmanager
def opened(made: Made) -> Iterator[Duel]:
    """The duel that a benchmark's function made, either itself or as a context that removes its files afterwards."""
    if isinstance(made, Duel):
        yield made
    else:
        with made as duel:
            yield duel


def _median(costs: tuple[Cost, ...]) -> Cost:
    return Cost(*(statistics.median(getattr(c, name) for c in costs) for name in ("cpu_s", "wall_s", "peak_bytes")))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _return_free_memory() -> None:
    # What an earlier call freed would hide the growth of the next.
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        return


def _forget_peak() -> float | None:
    """Reset the kernel's record of the largest resident memory; returns the present one in bytes, None if it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(field))
