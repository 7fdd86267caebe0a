"""Every test starts without nnU-Net's or autoseg's variables and leaves the environment and the log as it found them."""

from __future__ import annotations

import logging
import os

# Tests run side by side, and tiny networks are slower with several threads. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest

_NAMES = (
    "AUTOSEG_ROOT",
    "nnUNet_raw",
    "nnUNet_preprocessed",
    "nnUNet_results",
    "nnUNet_extTrainer",
    "nnUNet_n_proc_DA",
)


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    before = dict(os.environ)
    for name in _NAMES:
        os.environ.pop(name, None)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def clean_log() -> Iterator[None]:
    """A command puts a handler on autoseg's logger that writes to the stream of its own test."""
    logger = logging.getLogger("autoseg")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
    logger.propagate = propagate
