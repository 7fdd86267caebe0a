"""What a call costs on a device: a GPU works on after Python goes on, and its memory is not that of the process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import Cost, measure
from benchmarks.table import machine_text, this_machine


def device_text(device: torch.device) -> str:
    """The GPU, if it is one, and the machine around it, as a phrase."""
    machine = f"{machine_text(this_machine())}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name(device)}, {machine}" if device.type == "cuda" else machine


def measure_on(device: torch.device, function: Callable[[], Any]) -> tuple[Any, Cost]:
    """What a call returns, and what it cost until the device had done its part.

    The peak is that of all a GPU had allocated, weights included; on a CPU it is the growth of the process, as everywhere here.
    """
    if device.type != "cuda":
        return measure(function)

    def until_done() -> Any:
        output = function()
        torch.cuda.synchronize(device)
        return output

    gc.collect()  # what an earlier call left behind is none of this one's memory
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    output, cost = measure(until_done)
    return output, replace(cost, peak_bytes=float(torch.cuda.max_memory_allocated(device)))


class Stopwatch:
    """Sums the time of a network's forward passes."""

    def __init__(self, watched: nn.Module, device: torch.device) -> None:
        self._device = device
        self._began = self._now()
        self._passes: list[tuple[Any, Any]] = []
        watched.register_forward_pre_hook(lambda *_: self._begin())
        watched.register_forward_hook(lambda *_: self._passes.append((self._began, self._now())))

    def taken(self) -> float:
        """Seconds since it was last asked."""
        passes, self._passes = self._passes, []
        if self._device.type != "cuda":
            return sum(end - begin for begin, end in passes)
        torch.cuda.synchronize(self._device)
        return sum(begin.elapsed_time(end) for begin, end in passes) / 1000

    def _begin(self) -> None:
        self._began = self._now()

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
