"""One writer at a time: locks that end with the process that holds them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from planners.errors import SettingsError

logger = logging.getLogger("autoseg")


@contextlib.contextmanager
def waiting_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; wait for another process that holds it, saying so."""
    lock = _lock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        logger.info("Another process is %s; waiting for it", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def sole_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`; SettingsError when another process holds it."""
    lock = _lock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingsError(
            f"Another process is {what}",
            where=path.parent,
            remedy="wait for it, end it, or give this run a name of its own with --run",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
