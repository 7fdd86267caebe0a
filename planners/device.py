"""The device a command runs on."""

from __future__ import annotations

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
