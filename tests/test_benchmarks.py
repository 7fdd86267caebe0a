"""The benchmarks' own machinery: what is measured, how it is judged and kept."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import table
from benchmarks.catalog import Benchmark
from benchmarks.measuring import Agreement, Cost, Duel, Outcome, Scale, compare, measure
from benchmarks.scans import made_up, merge_labels
from planners.files import read_json

AGREE = Agreement("identical", True)


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def outcome(ratio: float, *, memory: float = 0.5, holds: bool = True) -> Outcome:
    reference = Cost(ratio, ratio, 1e9)
    return Outcome(reference, Cost(1.0, 1.0, memory * 1e9), (ratio - 1, ratio + 1), Agreement("0 voxels", holds))


def test_both_sides_alternate_and_the_last_outputs_are_compared():
    calls: list[str] = []

    def agreement(reference: int, ours: int) -> Agreement:
        return Agreement(f"{reference} {ours}", True)

    def side(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = compare(Duel(lambda: side("reference"), lambda: side("ours"), agreement), 2)
    assert calls == ["reference", "ours"] * 2
    assert found.agreement.text == "3 4" and len(found.ratios) == 2


def test_the_ratio_is_that_of_cpu_time_and_sleep_costs_nothing():
    def sleepy() -> None:
        busy(0.02)
        time.sleep(0.2)

    found = compare(Duel(lambda: busy(0.08), sleepy, lambda a, b: AGREE), 3)
    assert 2.5 < found.ratio < 5
    assert found.ours.wall_s > 0.2


def test_cpu_time_of_children_counts():
    program = "import time\nwhile time.process_time() < 0.2: pass"
    _, cost = measure(lambda: subprocess.run([sys.executable, "-c", program], check=True))
    assert 0.2 <= cost.cpu_s < 0.6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a call")
def test_peak_memory_is_of_the_call_alone():
    kept = np.ones(2**23)  # 64 MiB that are there before
    _, large = measure(lambda: np.ones(2**22).sum())
    _, small = measure(lambda: np.ones(2**20).sum())
    assert 30 < large.peak_bytes / 2**20 < 40
    assert 6 < small.peak_bytes / 2**20 < 16
    assert kept[0]


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (outcome(10), True),
        (outcome(9.9), False),
        (outcome(20, memory=0.7), False),
        (outcome(20, holds=False), False),
    ],
)
def test_a_goal_is_met_in_time_memory_and_agreement_together(found, met):
    benchmark = Benchmark("nowhere:nothing", 10, "a thing", memory_goal=0.6)
    assert table.row_of(benchmark, found, Scale.full, 2)["met"] is met


def test_rows_of_the_day_are_kept_and_replaced_by_name_and_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    benchmark = Benchmark("nowhere:nothing", 10, "a thing")
    for name, ratio, scale in (
        ("a", 10, Scale.full),
        ("b", 11, Scale.full),
        ("a", 5, Scale.small),
        ("a", 12, Scale.full),
    ):
        page = table.store(name, table.row_of(benchmark, outcome(ratio), scale, 2))
    rows = read_json(page.with_suffix(".json"))["rows"]
    assert {name: row["ratio"] for name, row in rows.items()} == {"a": 12, "b": 11, "a (small)": 5}
    assert "**12.0** (11.0 to 13.0)" in page.read_text() and "a thing" in page.read_text()


def test_rows_of_another_machine_are_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    row = table.row_of(Benchmark("nowhere:nothing", 10, "a thing"), outcome(10), Scale.full, 2)
    table.store("a", row)
    monkeypatch.setattr(table, "this_machine", lambda: {"cpu": "other", "cores": 1, "memory_gb": 1, "versions": {}})
    assert list(read_json(table.store("b", row).with_suffix(".json"))["rows"]) == ["b"]


def test_the_readme_keeps_what_stands_around_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "README", tmp_path / "README.md")
    table.README.write_text(f"before\n{table._BEGIN}\nold\n{table._END}\nafter\n")
    for name, scale in (("large", Scale.full), ("little", Scale.small)):
        table.store(name, table.row_of(Benchmark("nowhere:nothing", 10, "a thing"), outcome(10), scale, 2))
    table.update_readme()
    text = table.README.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| large |" in text and "little" not in text and "old" not in text


def test_the_command_names_what_it_does_not_know():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "imagge"], capture_output=True, text=True, cwd=table.HERE.parent
    )
    assert result.returncode == 2 and "No benchmark imagge" in result.stderr


def test_made_up_anatomy_has_its_labels_in_a_body_in_air():
    scan = made_up((13, 27, 22), labels=7)
    assert scan.image.shape == scan.labels.shape == (13, 27, 22)
    assert np.unique(scan.labels).tolist() == list(range(8))
    assert scan.image[0, 0, 0] < -900 and scan.image[scan.labels > 0].min() > -300


def test_merged_labels_have_no_gaps():
    assert merge_labels(np.array([0, 4, 9, 11]), 2).tolist() == [0, 1, 2, 1]
