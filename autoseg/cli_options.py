"""Options that several commands share, and what is made of their texts."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from planners.errors import SettingsError

Root = Annotated[Path | None, typer.Option("--root", help="Data folder; else AUTOSEG_ROOT, else ./autoseg_data.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DatasetOption = Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name: 17 or Dataset017_BTCV.")]
Workers = Annotated[int | None, typer.Option("--workers", help="Processes; default: by cores and free memory.")]
Plan = Annotated[str | None, typer.Option("-p", "--plan", help="Plan; default autosegPlans, without a GPU its _cpu.")]
Configuration = Annotated[
    str | None, typer.Option("-c", "--configuration", help="Configuration of the plan; default 3d_fullres, else 2d.")
]
ModelFolder = Annotated[Path | None, typer.Option("-m", "--model", help="A model folder instead, stock nnU-Net's too.")]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cpu or mps; default: what the machine has.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again instead of continuing or keeping.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="One more setting, KEY=VALUE; may be repeated.")]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print every setting, its value and who decided it, and stop.")
]


def begin(root: Path | None) -> None:
    """Choose and print the data root, and let the packages' messages through to the screen."""
    from planners import paths

    logger = logging.getLogger("autoseg")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    print(f"Data: {paths.configure(root)}")


def numbers(text: str | None, option: str, kind: type) -> list[Any] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} takes numbers separated by commas", found=text, expected="1 or 3,1,1") from None


def folds(text: str) -> tuple[int | str, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "all" or part.isdigit() for part in parts):
        raise SettingsError("-f takes folds", found=text, expected="0, or 0,1,2, or all")
    return tuple(part if part == "all" else int(part) for part in parts)


def settings_given(texts: list[str] | None, prefix: str = "") -> dict[str, str]:
    settings: dict[str, str] = {}
    for text in texts or []:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise SettingsError("--set takes KEY=VALUE", found=text)
        if prefix and not key.startswith(prefix):
            raise SettingsError("Not a setting of this command", found=key, expected=f"{prefix}NAME=VALUE")
        settings[key.removeprefix(prefix)] = value
    return settings
