"""One function per case: errors and deaths are named and stay alone."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from planners.cases import WorkerLost, run_cases, worker_count


def double(value: int) -> int:
    return 2 * value


def fail_on_three(value: int) -> int:
    if value == 3:
        raise ValueError("three is not supported")
    return value


def die_on_two(value: int) -> int:
    if value == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def die_once(path: str, value: int) -> int:
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def process_id(_: int) -> int:
    return os.getpid()


def arguments(count: int) -> dict[str, tuple]:
    return {f"case_{i}": (i,) for i in range(count)}


def test_results_come_in_the_order_of_the_cases():
    outcomes = run_cases(double, arguments(4), description="Doubling", workers=2)
    assert [o.value for o in outcomes.values()] == [0, 2, 4, 6]
    assert list(outcomes) == ["case_0", "case_1", "case_2", "case_3"]


def test_a_failing_case_does_not_end_the_others():
    for workers in (0, 2):
        outcomes = run_cases(fail_on_three, arguments(5), description="Failing", workers=workers)
        assert [name for name, o in outcomes.items() if o.error] == ["case_3"]
        assert "three is not supported" in str(outcomes["case_3"].error)


def test_a_killed_worker_is_that_cases_error():
    outcomes = run_cases(die_on_two, arguments(5), description="Dying", workers=2)
    assert isinstance(outcomes["case_2"].error, WorkerLost)
    assert "memory ran out" in str(outcomes["case_2"].error)
    assert [o.value for o in outcomes.values() if not o.error] == [0, 1, 3, 4]


def test_a_case_that_died_is_tried_again_alone(tmp_path):
    outcomes = run_cases(
        die_once, {"a": (str(tmp_path / "a"), 1), "b": (str(tmp_path / "b"), 2)}, description="x", workers=2
    )
    assert [o.value for o in outcomes.values()] == [1, 2]


def test_small_jobs_run_in_this_process():
    outcomes = run_cases(process_id, arguments(3), description="Small", bytes_per_case=1000)
    assert {o.value for o in outcomes.values()} == {os.getpid()}


def test_memory_bounds_the_workers(monkeypatch):
    monkeypatch.setattr("planners.cases.available_cores", lambda: 16)
    monkeypatch.setattr("planners.cases.free_memory_bytes", lambda: 10 * 2**30)
    assert worker_count(cases=100, bytes_per_case=3 * 2**30) == 2
    assert worker_count(cases=100, bytes_per_case=50 * 2**30) == 1
    assert worker_count(cases=1, bytes_per_case=50 * 2**30) == 0


def test_a_worker_that_cannot_start_is_an_error_and_not_a_wait(monkeypatch):
    def no_worker():
        raise RuntimeError("no process can be started")

    monkeypatch.setattr("planners.cases._start_worker", no_worker)
    outcomes = run_cases(double, arguments(2), description="Doubling", workers=1)
    assert all("no process can be started" in str(outcome.error) for outcome in outcomes.values())


def test_another_executor_runs_the_cases():
    with ThreadPoolExecutor(2) as executor:
        outcomes = run_cases(fail_on_three, arguments(5), description="Elsewhere", executor=executor)
    assert [o.value for o in outcomes.values()] == [0, 1, 2, None, 4]
    assert "three is not supported" in str(outcomes["case_3"].error)
