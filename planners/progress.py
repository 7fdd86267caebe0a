"""Progress that people can read: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
logger = logging.getLogger("autoseg")
_SECONDS_BETWEEN_LINES = 15.0
_bars_allowed = True


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items` while showing how far they are and how long the rest will take."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    bar = _bars_allowed and sys.stderr.isatty()
    return (_bar if bar else _lines)(items, description, total)


@contextmanager
def without_bars() -> Iterator[None]:
    """Lines instead of bars within the block, where something else is drawn on the terminal."""
    global _bars_allowed
    before, _bars_allowed = _bars_allowed, False
    try:
        yield
    finally:
        _bars_allowed = before


def _bar(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            rest = f", about {duration((now - start) / done * (total - done))} left" if total else ""
            logger.info("%s: %d%s%s", description, done, f" of {total}" if total else "", rest)


def duration(seconds: float) -> str:
    """`42 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
