"""Stopping between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signal() -> Iterator[Callable[[], int]]:
    """Within the block the first SIGINT or SIGTERM is only noted; the function given returns its number, 0 until then.

    A second one acts at once. Outside the main thread signals cannot be caught, and nothing is noted.
    """
    received = 0
    handlers: dict[int, object] = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, note)
    try:
        yield lambda: received
    finally:
        restore()
