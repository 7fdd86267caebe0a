"""How long a command line keeps its user waiting before anything is done: whole processes, interpreter and imports included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measuring import Agreement, Duel, Scale

_AUTOSEG = (sys.executable, "-m", "autoseg")
_COMMANDS = {Scale.small: "plan_and_preprocess", Scale.full: "train"}
"""nnU-Net's first takes half as long to start as its second."""


@contextmanager
def help(scale: Scale) -> Iterator[Duel]:
    """The help of a command."""
    command = _COMMANDS[scale]
    with TemporaryDirectory() as folder:
        yield Duel(_run(folder, _nnunet(command), "-h"), _run(folder, *_AUTOSEG, command, "-h"), _both_show_usage)


@contextmanager
def wrong_argument(scale: Scale) -> Iterator[Duel]:
    """A command for a data set that does not exist."""
    command = _COMMANDS[scale]
    arguments = ["999", "3d_fullres", "0"] if command == "train" else ["-d", "999"]
    with TemporaryDirectory() as folder:
        yield Duel(
            _run(folder, _nnunet(command), *arguments), _run(folder, *_AUTOSEG, command, "-d", "999"), _both_fail
        )


def _nnunet(command: str) -> str:
    return str(Path(sys.executable).with_name(f"nnUNetv2_{command}"))


def _run(folder: str, *arguments: str) -> Callable[[], subprocess.CompletedProcess]:
    """A call that runs a command with all data in `folder` and returns the finished process."""
    variables = ("AUTOSEG_ROOT", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    environment = {**os.environ, **dict.fromkeys(variables, folder)}

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)

    return run


def _both_show_usage(reference: subprocess.CompletedProcess, ours: subprocess.CompletedProcess) -> Agreement:
    usage = all("usage:" in process.stdout.lower() for process in (reference, ours))
    return Agreement(f"exit {reference.returncode} and {ours.returncode}", usage and not ours.returncode)


def _both_fail(reference: subprocess.CompletedProcess, ours: subprocess.CompletedProcess) -> Agreement:
    told = "No dataset 999" in ours.stderr and "Traceback" not in ours.stderr
    return Agreement(
        f"exit {reference.returncode} and {ours.returncode}",
        reference.returncode != 0 and ours.returncode == 2 and told,
    )
