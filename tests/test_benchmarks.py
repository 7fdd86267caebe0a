"""The benchmarks' own machinery: what is measured, how it is judged and kept."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import prediction_step, pretrain_step, table
from benchmarks.__main__ import main as benchmarks_command
from benchmarks.catalog import Benchmark
from benchmarks.devices import Stopwatch, measure_on
from benchmarks.made_up_dataset import as_many, make_dataset
from benchmarks.measuring import Agreement, Cost, Duel, Outcome, Scale, compare, measure
from benchmarks.scans import made_up, merge_labels
from benchmarks.toy_model import SmoothlyAnswering, ToyNetwork
from planners import paths
from planners.files import read_json
from pretrain.catalog import METHODS
from pretrain.loop import build_fabric
from pretrain.method import MomentumPair, Stage
from pretrain.optimise import prepare_stage
from tests.stubs import Stub

AGREE = Agreement("identical", True)
CPU = torch.device("cpu")


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


@pytest.fixture(scope="module")
def made_up_scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("made_up")
    return root, make_dataset(root, (20, 44, 41), (2.0, 1.1, 1.0))


@pytest.mark.parametrize("name", METHODS)
def test_every_stage_of_a_method_is_measured_with_batches_as_large_as_asked_for(name, made_up_scans):
    root, dataset = made_up_scans
    paths.configure(root)
    method, spec, pool = pretrain_step.method_of(name, dataset, "cpu", pretrain_step.settings_of(name, None, 2))
    rows = list(pretrain_step.measured(name, method, spec, pool, 1, CPU))
    assert [row.stage for row in rows] == [stage.name for stage in method.stages()]
    assert all(row.samples == 2 and row.making_s > 0 and row.step_s > 0 for row in rows)


def test_the_command_prints_a_row_for_each_stage(made_up_scans, monkeypatch, capsys):
    root, dataset = made_up_scans
    paths.configure(root)
    monkeypatch.setattr(pretrain_step, "make_dataset", lambda folder: dataset)
    pretrain_step.main(["pumit", "--preset", "cpu", "--batch", "3", "--steps", "1", "--device", "cpu"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| pumit ")]
    assert [row[1:3] for row in rows] == [["tokenizer", "3"], ["mim", "3"]]


class Counting(Stub):
    """Learns one number by the mean of what the batches hold."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.online = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.online.weight)
        self.average = copy.deepcopy(self.online).requires_grad_(False)
        self.seen: list[float] = []

    def stages(self):
        free = {"weight_decay": 0.0, "betas": (0.0, 0.0), "clip_norm": None}
        return [Stage("main", optimizer="sgd", learning_rate=1.0, accumulate=2, **free)]

    def momentum_pairs(self):
        return [MomentumPair(self.online, self.average, lambda step: 0.75)]

    def loss(self, batch, step):
        return {"loss": (self.online.weight * batch["x"]).mean()}

    def after_step(self, batch, terms, step):
        self.seen.append(float(batch["x"]))


def test_a_step_is_an_update_from_all_its_batches_and_what_follows_it():
    method = Counting()
    (stage,) = method.stages()
    prepare_stage(method, stage, list(method.online.parameters()))
    batches = [{"x": torch.tensor([value])} for value in (1.0, 3.0, 5.0, 7.0)]
    step = pretrain_step.stepper(build_fabric(CPU), method, stage, batches, 3)
    learned = []
    for number in range(3):
        step(number)
        learned.append(float(method.online.weight))
    assert learned == [-2.0, -8.0, -10.0]
    assert float(method.average.weight) == pytest.approx(((-2 * 0.25) * 0.75 - 8 * 0.25) * 0.75 - 10 * 0.25)
    assert method.seen == [1.0, 3.0, 5.0, 7.0, 1.0, 3.0]


def test_a_row_says_how_many_cores_keep_the_device_busy():
    row = pretrain_step.Row("voco", "main", samples=8, making_s=1.5, step_s=0.5, peak_bytes=2e9)
    assert str(row) == "| voco | main | 8 | 1.5 | 0.5 | 16 | 3 | 2.00 |"


def test_a_pool_counts_its_scans_several_times(made_up_scans):
    root, dataset = made_up_scans
    paths.configure(root)
    _, _, pool = pretrain_step.method_of("rotation", dataset, "cpu", {})
    five = as_many(pool, 5)
    assert len({case.id for case in five.cases}) == 5
    assert [five.files[case.id].stem for case in five.cases] == ["scan_0", "scan_1", "scan_0", "scan_1", "scan_0"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["vocoo"],
        ["voco", "--size", "s"],
        ["pumit", "--size", "xl"],
        ["rotation", "--batch", "0"],
        ["cpc", "--device", "x"],
    ],
)
def test_pretrain_step_ends_with_2_at_what_it_does_not_know_before_it_makes_scans(wrong, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_step, "make_dataset", lambda root: pytest.fail("scans were made"))
    with pytest.raises(SystemExit) as stopped:
        pretrain_step.main(wrong)
    assert stopped.value.code == 2 and wrong[-1] in capsys.readouterr().err


def test_the_costly_network_runs_and_hardly_changes_the_toys_answer():
    torch.manual_seed(0)
    costly = nn.Conv3d(1, 3, 1)
    both, image = SmoothlyAnswering(costly, 3), torch.randn(1, 1, 5, 7, 6)
    toy = ToyNetwork(3)(image)
    with torch.no_grad():
        answer = both(image)
    torch.testing.assert_close(answer, toy + 1e-3 * costly(image))
    assert (answer.argmax(1) == toy.argmax(1)).float().mean() > 0.99


GPU = torch.device("cuda")


class Event:
    """Stands in for one of a GPU that needs a second from each event to the next."""

    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "of the device"
        Event.made += 1
        self.number = Event.made

    def elapsed_time(self, later: Event) -> float:
        return 1000.0 * (later.number - self.number)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """What is asked of a GPU here, answered without one: it is done 0.1 s after it is waited for."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.1))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "of the device")
    monkeypatch.setattr(torch.cuda, "Event", Event)


def test_a_call_on_a_gpu_is_over_when_the_gpu_is_and_has_its_memory(pretended_gpu):
    output, cost = measure_on(GPU, lambda: "made")
    assert output == "made" and cost.peak_bytes == 7
    assert cost.wall_s >= 0.1


def test_a_stopwatch_reads_the_clock_of_the_gpu(pretended_gpu):
    network = nn.Identity()
    watch = Stopwatch(network, GPU)
    network(0)
    network(0)
    assert watch.taken() == 2


class Sleepy(nn.Module):
    def forward(self, seconds: float) -> None:
        time.sleep(abs(seconds))
        if seconds < 0:
            raise MemoryError


def test_a_stopwatch_counts_finished_passes_alone():
    network = Sleepy()
    watch = Stopwatch(network, CPU)
    network(0.05)
    with pytest.raises(MemoryError):
        network(-0.3)
    time.sleep(0.3)
    network(0.05)
    assert 0.1 <= watch.taken() < 0.35
    assert watch.taken() == 0


def test_both_sides_of_a_prediction_are_compared_by_their_medians():
    theirs = [prediction_step.Prediction(Cost(cpu, 6.0, 3e9), 2.0) for cpu in (9.0, 8.0, 100.0)]
    ours = [prediction_step.Prediction(Cost(3.0, wall, 0.0), 1.0) for wall in (2.0, 3.0, 50.0)]
    assert prediction_step.ratios(theirs, ours) == "wall 2.00, wall without the network 2.00, network 2.00, CPU 3.00"


@pytest.mark.slow  # nnU-Net starts four processes
def test_prediction_of_both_sides_is_measured(capsys):
    size = ["--voxels", "80", "--patch", "64", "--features", "2", "--classes", "4", "--cases", "1", "--rounds", "1"]
    prediction_step.main([*size, "--no-mirroring", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| 1 ")] == ["nnU-Net", "autoseg"]
    assert float(lines[-1].split()[0]) < 1e-3  # of voxels differ


@pytest.mark.parametrize("wrong", [["--device", "x"], ["--patch", "48"]])
def test_prediction_step_ends_with_2_at_what_it_cannot_do(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        prediction_step.main(wrong)
    assert stopped.value.code == 2 and wrong[-1] in capsys.readouterr().err


def test_what_is_finished_is_written_though_a_later_script_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.__main__._ON_A_DEVICE", (["prediction_step", "--help"], ["nowhere"]))
    assert benchmarks_command(["gpu", "--device", "cpu"]) == 1
    (page,) = tmp_path.glob("*_gpu.md")
    assert "Seconds a case" in page.read_text() and page.read_text().endswith("Failed.\n")


def test_nothing_is_written_where_the_device_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert benchmarks_command(["gpu", "--device", "abacus"]) == 2
    assert not list(tmp_path.iterdir())
