"""How long a command line keeps its user waiting before anything is done: whole processes, interpreter and imports included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.commands import AUTOSEG, write_hippocampus
from benchmarks.made_up_dataset import write_raw
from benchmarks.measuring import Agreement, Duel, Scale

_COMMANDS = {Scale.small: "plan_and_preprocess", Scale.full: "train"}
"""nnU-Net's first takes half as long to start as its second."""


@contextmanager
def help(scale: Scale) -> Iterator[Duel]:
    """The help of a command."""
    command = _COMMANDS[scale]
    with TemporaryDirectory() as folder:
        yield Duel(_run(folder, _nnunet(command), "-h"), _run(folder, *AUTOSEG, command, "-h"), _both_show_usage)


@contextmanager
def wrong_argument(scale: Scale) -> Iterator[Duel]:
    """A command for a data set that does not exist."""
    command = _COMMANDS[scale]
    arguments = ["999", "3d_fullres", "0"] if command == "train" else ["-d", "999"]
    with TemporaryDirectory() as folder:
        yield Duel(_run(folder, _nnunet(command), *arguments), _run(folder, *AUTOSEG, command, "-d", "999"), _both_fail)


@contextmanager
def first_step(scale: Scale) -> Iterator[Duel]:
    """Training from the command to where its first batch enters the network, with the same plan and data, on the CPU.

    nnU-Net's processes that make batches are not counted; where a CPU trains, autoseg makes them in the same process.
    """
    with TemporaryDirectory() as folder:
        if scale is Scale.full:
            write_hippocampus(folder, 170)
        else:
            write_raw(Path(folder) / "raw" / "Dataset004_MadeUp", 6, 2, (40, 36, 44))
        plan = [*AUTOSEG, "plan_and_preprocess", "-d", "4", "--root", folder]
        subprocess.run(plan, check=True, capture_output=True)
        until = (sys.executable, "-m", "benchmarks.first_step")
        nnunet = ("nnunet", "4", "3d_fullres", "0", "-p", "autosegPlans_cpu", "-device", "cpu")
        ours = ("autoseg", "train", "-d", "4", "--device", "cpu", "--overwrite", "--root", folder)
        yield Duel(_run(folder, *until, *nnunet), _run(folder, *until, *ours), _same_first_batch)


def _nnunet(command: str) -> str:
    return str(Path(sys.executable).with_name(f"nnUNetv2_{command}"))


def _run(folder: str, *arguments: str) -> Callable[[], subprocess.CompletedProcess]:
    """A call that runs a command with all data in `folder` and returns the finished process."""
    places = {f"nnUNet_{name}": f"{folder}/{name}" for name in ("raw", "preprocessed", "results")}
    environment = {**os.environ, "AUTOSEG_ROOT": folder, **places}

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


def _same_first_batch(reference: subprocess.CompletedProcess, ours: subprocess.CompletedProcess) -> Agreement:
    last = [process.stdout.strip().rpartition("\n")[2] for process in (reference, ours)]
    return Agreement(last[1], last[0] == last[1] and last[1].startswith("first step"))
