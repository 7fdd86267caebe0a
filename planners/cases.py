"""Run one function per case, so that a failing or killed case is named and takes no other with it.

Small jobs run in this process: a spawned worker pays seconds of imports, so parallelism only pays for large cases. Larger
jobs get worker processes, each with a pipe of its own, so that a death (mostly the system's out-of-memory killer) is known
to belong to one case. `WorkerPool` is a `concurrent.futures.Executor`; another executor can stand in its place.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from planners.errors import AutosegError
from planners.progress import track

logger = logging.getLogger("autoseg")

# A worker that has imported numpy, torch and nnU-Net, resident.
_WORKER_BYTES = 700 * 2**20
# Below this many bytes of work in all, starting workers costs more than it saves.
_SMALL_JOB_BYTES = 2 * 2**30


class WorkerLost(AutosegError):
    """The process that worked on a case died, mostly because memory ran out."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case: its value, or the error that ended it."""

    name: str
    value: Any = None
    error: BaseException | None = None


def run_cases(
    function: Callable[..., Any],
    arguments: Mapping[str, tuple],
    *,
    description: str,
    bytes_per_case: int = 0,
    workers: int | None = None,
    executor: Executor | None = None,
) -> dict[str, Outcome]:
    """Call `function(*arguments[name])` for every name; errors become outcomes instead of ending the run.

    Args:
        function: importable at module level (it is sent to workers by name).
        bytes_per_case: peak memory of one call; decides how many run side by side.
        workers: processes; 0 means in this process; None decides from cores, free memory and the size of the job.
        executor: runs the calls instead of a pool made here (an existing cluster).
    """
    if workers is None:
        workers = worker_count(len(arguments), bytes_per_case)
    outcomes: dict[str, Outcome] = {}
    if executor is None and workers == 0:
        for name in track(list(arguments), description):
            outcomes[name] = _attempt(name, function, arguments[name])
        return {name: outcomes[name] for name in arguments}

    pool = executor or WorkerPool(workers)
    try:
        futures = {pool.submit(function, *arguments[name]): name for name in arguments}
        for future in track(as_completed(futures), description, total=len(futures)):
            outcomes[futures[future]] = _outcome(futures[future], future)
    finally:
        if executor is None:
            pool.shutdown(cancel_futures=True)
    lost = [name for name in arguments if isinstance(outcomes[name].error, WorkerLost)]
    if lost and executor is None:
        logger.info("%s: %d worker(s) died; trying those cases again, one at a time", description, len(lost))
        with WorkerPool(1) as alone:
            for name in track(lost, f"{description} (again)"):
                outcomes[name] = _outcome(name, alone.submit(function, *arguments[name]))
    return {name: outcomes[name] for name in arguments}


def worker_count(cases: int, bytes_per_case: int) -> int:
    """Processes for a job: 0 (this process) when it is small, else as many as cores and free memory allow."""
    if cases < 2 or cases * bytes_per_case < _SMALL_JOB_BYTES:
        return 0
    by_memory = int(0.8 * free_memory_bytes() // (bytes_per_case + _WORKER_BYTES))
    # One worker is no faster than this process, but a case that dies of memory then ends the worker, not the command.
    return max(1, min(cases, available_cores(), by_memory))


def available_cores() -> int:
    """Cores this process may use (affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def free_memory_bytes() -> int:
    """Memory that can be taken without swapping, bounded by the control group a container or batch job runs in."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text != "max":
            free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def _attempt(name: str, function: Callable[..., Any], arguments: tuple) -> Outcome:
    try:
        return Outcome(name, value=function(*arguments))
    except Exception as error:
        return Outcome(name, error=error)


def _outcome(name: str, future: Future) -> Outcome:
    error = future.exception()
    return Outcome(name, error=error) if error else Outcome(name, value=future.result())


class WorkerPool(Executor):
    """Worker processes with one pipe each; a dead worker fails only the call it was working on and is replaced."""

    def __init__(self, workers: int) -> None:
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        self._stopping = False
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Queue one call; the future carries its value, its error, or WorkerLost."""
        if self._stopping:
            raise RuntimeError("The pool is shut down")
        future: Future = Future()
        self._tasks.put((future, function, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Stop after the queued calls, or after the running ones with `cancel_futures`."""
        self._stopping = True
        if cancel_futures:
            while True:
                try:
                    item = self._tasks.get_nowait()
                except queue.Empty:
                    break
                if item is not None:
                    item[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _serve(self) -> None:
        """One thread feeds one process, and starts another when it has died."""
        process: multiprocessing.process.BaseProcess | None = None
        pipe: Connection | None = None
        while (task := self._tasks.get()) is not None:
            future, function, args, kwargs = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if process is None or pipe is None:
                    process, pipe = _start_worker()
                pipe.send((function, args, kwargs))
                succeeded, result = pipe.recv()
            except (EOFError, ConnectionError):
                exit_code = None
                if process is not None:
                    process.join()
                    exit_code = process.exitcode
                future.set_exception(_death(exit_code))
                process = None
            except Exception as error:  # no worker can start, or an argument cannot be pickled: this call fails alone
                future.set_exception(error)
            else:
                if succeeded:
                    future.set_result(result)
                else:
                    future.set_exception(result)
        if process is not None and pipe is not None:
            pipe.close()
            process.join()


def _start_worker() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(pipe: Connection) -> None:
    """A worker's life: receive a call, send back its value or its error, until the pipe closes."""
    try:
        while True:
            function, args, kwargs = pipe.recv()
            try:
                message = (True, function(*args, **kwargs))
            except Exception as error:
                message = (False, error)
            try:
                pipe.send(message)
            except Exception as error:  # the value or error cannot be pickled
                pipe.send((False, RuntimeError(f"{type(error).__name__} while returning {message[1]!r}: {error}")))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return


def _death(exit_code: int | None) -> WorkerLost:
    cause = "killed, mostly because memory ran out" if exit_code == -9 else f"exit code {exit_code}"
    return WorkerLost(
        "The process working on this case died",
        found=cause,
        remedy="free memory, use fewer --workers, or leave this case out",
    )
