"""The device a command runs on."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from planners.errors import SettingsError


def choose_device(name: str | None = None) -> torch.device:
    """The device named (`cpu`, `cuda`, `cuda:1`, `mps`), else the best there is."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError("No such device", found=name, expected="cpu, cuda, cuda:1 or mps") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise SettingsError("This machine has no such device", found=name, remedy="leave --device out, or --device cpu")
    return device


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 (AVX512-BF16 or AMX), without which it is slower than float32.

    Only Linux tells; elsewhere the answer is no.
    """
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(words)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which `torch.compile` needs on a CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))
