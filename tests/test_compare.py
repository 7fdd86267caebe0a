"""A whole comparison: what it does, what it leaves behind, and that failures and interruptions lose nothing.

Trainings are replaced by stand-ins that write what a training leaves, except where the real ones are the point.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from autoseg.comparison import report
from autoseg.comparison import run as run_module
from autoseg.comparison.design import decide
from autoseg.comparison.outcomes import COLUMNS
from autoseg.comparison.run import compare
from planners import paths
from planners.errors import PlanError, SettingsError
from planners.plans import folds
from planners.preprocess import preprocess_dataset
from pretrain.checkpoint import load_encoder
from tests.stubs import PLAN, copy_home, make_home
from tests.tiny import DATASET
from trainers import base
from trainers.data import label_subset
from trainers.runs import find_models
from trainers.train import train

TINY = {
    "plan": PLAN, "device": "cpu", "settings": {"epochs": 2, "iterations": 2}, "steps": 2, "label_fractions": (0.25, 1.0),
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = dict(os.environ)
    root = make_home(tmp_path_factory.mktemp("compare") / "root", cases=6)
    os.environ.clear()
    os.environ.update(before)
    return root


@pytest.fixture
def home(prepared, tmp_path):
    return copy_home(prepared, tmp_path / "root")


@pytest.fixture
def stand_ins(home, monkeypatch):
    """Quick pretraining and training that note how they were called; `fail` decides what goes wrong."""
    calls: list[tuple[str, dict]] = []
    fail: list[str] = []

    def note(kind, options):
        calls.append((kind, options))
        if any(part in options["run"] for part in fail):
            raise RuntimeError(f"no memory for {options['run']}\nat all")

    def pretrained(dataset, **options):
        note("pretrain", options)
        return Path()

    def trained(dataset, **options):
        note("train", options)
        fold = options["folds"][0]
        folder = paths.results(DATASET) / f"AutosegTrainer-{options['run']}__{PLAN}__{options['configuration']}"
        write_training(
            folder / f"fold_{fold}", folds(DATASET)[fold]["val"], 0.5 + 0.1 * (options["pretrained"] is not None)
        )
        return [folder / f"fold_{fold}"]

    class Card:
        cases: tuple = ()
        held_out: tuple = ()

    monkeypatch.setattr(run_module, "pretrain", pretrained)
    monkeypatch.setattr(run_module, "train", trained)
    monkeypatch.setattr(run_module, "load_encoder", lambda folder: ({}, Card))
    for name in ("draw_dice_over_labels", "draw_learning_curves"):  # seconds each
        monkeypatch.setattr(report, name, lambda *arguments: Figure(figsize=(1, 1)))
    monkeypatch.setattr(run_module.gc, "collect", lambda: 0)  # a quarter of a second each
    return calls, fail


def write_training(folder: Path, cases: list[str], dice: float) -> None:
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    measured = [
        {"prediction_file": f"m/{case}.nii.gz", "metrics": {"1": {"Dice": dice}, "2": {"Dice": dice}}} for case in cases
    ]
    content = {"foreground_mean": {"Dice": dice}, "metric_per_case": measured}
    (folder / "validation" / "summary.json").write_text(json.dumps(content))
    (folder / "progress.csv").write_text(f"epoch,dice,seconds\n1,{dice / 2},1\n2,{dice},1\n")
    (folder / "checkpoint_final.pth").touch()


def run_tiny(methods="voco", **options):
    return compare(901, methods=methods, **{**TINY, **options})


def files(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in sorted(root.rglob("*")) if not path.name.endswith(".lock")}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# Label subsets.


def test_smaller_subsets_are_parts_of_larger_ones():
    cases = [f"case_{i:03d}" for i in range(37)]
    for seed in range(5):
        subsets = [set(label_subset(cases, f, seed)) for f in (0.001, 0.05, 0.1, 0.25, 0.5, 0.99, 1.0)]
        assert [len(s) for s in subsets] == [1, 2, 4, 9, 18, 37, 37]
        assert all(small <= large for small, large in itertools.pairwise(subsets))


def test_subsets_are_decided_by_the_seed_alone():
    cases = [f"case_{i:03d}" for i in range(20)]
    assert label_subset(cases, 0.25, 3) == sorted(label_subset(cases[::-1], 0.25, 3))
    assert len({tuple(label_subset(cases, 0.25, seed)) for seed in range(10)}) == 10
    # The order of cases does not change when one is held out.
    assert set(label_subset(cases, 0.25, 3)) - {cases[0]} <= set(label_subset(cases[1:], 0.3, 3))


def test_a_training_takes_the_subset_and_keeps_all_validation_cases(home):
    settings = {"epochs": 1, "iterations": 1, "label_fraction": 0.5, "seed": 4}
    folder = train(901, plan=PLAN, device="cpu", settings=settings, run="half")[0]
    split = folds(DATASET)[0]
    log = next(folder.glob("training_log*")).read_text()
    assert f"Training on 2 of 4 cases: {', '.join(label_subset(split['train'], 0.5, 4))}" in log
    assert sorted(p.name[:-7] for p in (folder / "validation").glob("*.nii.gz")) == sorted(split["val"])
    stored = json.loads((folder.parent / "plans.json").read_text())["autoseg"]["train"]
    assert stored["label_fraction"] == 0.5
    with pytest.raises(SettingsError, match=r"label_fraction=1\.0"):
        train(901, plan=PLAN, device="cpu", settings={"label_fraction": "1"}, run="half")


# Order, names and equal settings.


def test_every_arm_is_trained_alike_on_the_same_cases(stand_ins):
    calls, _ = stand_ins
    run_tiny("voco,voco[region=full]", folds=(0, 2), seeds=(0, 5))
    trainings = [options for kind, options in calls if kind == "train"]
    assert len(trainings) == 3 * 2 * 2 * 2
    assert len({options["run"] for options in trainings}) == len(trainings)
    by_place: dict[tuple, list] = {}
    for options in trainings:
        settings = options["settings"]
        by_place.setdefault((options["folds"], settings["seed"], settings["label_fraction"]), []).append(settings)
    assert len(by_place) == 2 * 2 * 2
    assert all(len(arms) == 3 and arms[0] == arms[1] == arms[2] for arms in by_place.values())
    assert {options["pretrained"] is None for options in trainings if "scratch" in options["run"]} == {True}


def test_long_trainings_share_their_rate_too(home):
    """By the rule for single runs a pretrained one of this length gets a tenth of the rate."""
    design = decide(901, "voco", plan=PLAN, device="cpu", settings={"epochs": 1000, "iterations": 250})
    assert design.train["3d_fullres"].lr == 1e-2 and design.train["3d_fullres"].warm_up == 0


def test_each_fold_has_an_encoder_of_its_own_that_is_used_for_all_its_trainings(stand_ins):
    calls, _ = stand_ins
    run_tiny("voco[region=full,steps=7]", folds=(0, 1), steps=3)
    pretrainings = [options for kind, options in calls if kind == "pretrain"]
    assert [(o["exclude_fold"], o["run"]) for o in pretrainings] == [
        (0, "cmp-voco.region.full.steps.7-x0"), (1, "cmp-voco.region.full.steps.7-x1"),
    ]  # fmt: skip
    assert all(o["settings"] == {"voco.region": "full"} and o["steps"] == 7 for o in pretrainings)
    for kind, options in calls:
        if kind == "train" and options["pretrained"] is not None:
            assert options["pretrained"].name.endswith(f"-x{options['folds'][0]}")


def test_comparisons_do_not_appear_among_the_models_to_predict_with(stand_ins):
    run_tiny()
    assert find_models(DATASET) == []
    assert len(find_models(DATASET, run="cmp-voco-f100-s0-x0")) == 1


# What goes wrong.


def test_a_failed_training_is_reported_and_the_others_go_on(stand_ins):
    _, fail = stand_ins
    fail.append("cmp-voco-f25")
    result = run_tiny(seeds=(0, 1))
    assert list(result.failures) == [f"voco, fold 0, 25 % of the labels, seed {seed}" for seed in (0, 1)]
    assert "no memory for" in next(iter(result.failures.values()))
    assert [(line.arm, line.fraction) for line in result.lines] == [("scratch", 0.25), ("scratch", 1.0), ("voco", 1.0)]
    text = (result.folder / "comparison.md").read_text()
    assert "## Failed" in text and "Not finished: 2 of 8 trainings" in text
    fail.clear()
    assert run_tiny(seeds=(0, 1)).failures == {}


def test_without_its_encoder_an_arm_is_left_out_and_the_others_go_on(stand_ins):
    calls, fail = stand_ins
    fail.append("region.full-x0")
    result = run_tiny("voco,voco[region=full]", folds=(0, 1))
    assert list(result.failures) == ["pretraining voco[region=full] without fold 0"]
    trained = [options["run"] for kind, options in calls if kind == "train"]
    assert not any("region.full" in run and run.endswith("x0") for run in trained)
    assert any("region.full" in run and run.endswith("x1") for run in trained)
    assert {line.arm: line.cases for line in result.lines}["scratch"] > result.lines[2].cases


def test_an_encoder_that_saw_validation_cases_is_not_used(stand_ins, monkeypatch):
    class Card:
        cases = (f"{DATASET}/{folds(DATASET)[0]['val'][0]}",)
        held_out: tuple = ()

    monkeypatch.setattr(run_module, "load_encoder", lambda folder: ({}, Card))
    result = run_tiny()
    assert "has seen validation cases" in next(iter(result.failures.values()))
    assert {line.arm for line in result.lines} == {"scratch"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "voco[grdi=1,3,3]"}, "no such setting"),
        ({"methods": "voco[preset=fast]"}, "No such preset"),
        ({"methods": "voco[steps=many]"}, "Not a number of steps"),
        ({"settings": {"lr": "fast"}}, "train.lr"),
        ({"settings": {"seed": 3}}, "--seeds"),
        ({"label_fractions": (0.0,)}, "label_fraction"),
        ({"folds": (7,)}, "No such fold"),
        ({"folds": ()}, "Nothing to compare on"),
        ({"run": "a__b"}, "Not a name"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(home, options, message):
    before = files(home)
    with pytest.raises(SettingsError, match=message):
        run_tiny(**options)
    assert files(home) == before


def test_a_configuration_there_is_not_is_told_before_anything_is_done(home):
    with pytest.raises(PlanError, match="no configuration 2d"):
        run_tiny("voco@2d")


def test_other_settings_need_another_name(stand_ins):
    calls, _ = stand_ins
    run_tiny()
    done = len(calls)
    with pytest.raises(SettingsError, match=r"epochs 3 \(was 2\)"):
        run_tiny(settings={"epochs": 3, "iterations": 2})
    with pytest.raises(SettingsError, match=r"steps 9 \(was 2\)"):
        run_tiny(steps=9)
    assert len(calls) == done
    run_tiny(settings={"epochs": 3, "iterations": 2}, run="longer")
    assert (paths.results(DATASET) / "comparison-longer" / "results.csv").is_file()


def test_a_setting_that_was_not_there_before_counts_as_its_default(stand_ins):
    kept = run_tiny().folder / "settings.json"
    content = json.loads(kept.read_text())
    for trained in content["train"].values():
        del trained["augment_on"]
    kept.write_text(json.dumps(content))
    run_tiny(seeds=(0, 1))
    content["train"] = {one: {**trained, "augment_on": "device"} for one, trained in content["train"].items()}
    kept.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=r"augment_on cpu \(was device\)"):
        run_tiny()


def test_a_comparison_can_be_added_to(stand_ins):
    run_tiny(label_fractions=(1.0,))
    result = run_tiny("voco,voco[region=full]", seeds=(0, 1))
    assert len(result.lines) == 3 * 2
    assert {row["seed"] for row in rows(result.folder)} == {"0", "1"}


# What is left behind.


def test_the_table_has_every_case_and_the_report_is_honest(stand_ins):
    result = run_tiny(folds=(0, 1))
    table = rows(result.folder)
    assert tuple(table[0]) == COLUMNS
    cases = {case for fold in (0, 1) for case in folds(DATASET)[fold]["val"]}
    assert {row["case"] for row in table} == cases
    assert len(table) == 2 * 2 * len(cases) * 2  # arms, shares, cases, structures
    assert {row["training_cases"] for row in table if row["label_fraction"] == "0.25"} == {"1"}

    summary = json.loads((result.folder / "summary.json").read_text())
    voco = [line for line in summary["lines"] if line["arm"] == "voco"]
    assert [line["difference"]["mean"] for line in voco] == pytest.approx([0.1, 0.1])
    assert {line["verdict"] for line in voco} == {"too few cases to tell"}  # always 0.1, but of three cases
    text = (result.folder / "comparison.md").read_text()
    for part in ("One seed", "validation cases: below 6", "+0.100", "dice_over_labels.png", "is not proof"):
        assert part in text
    assert str(paths.results(DATASET)) not in text


@pytest.mark.parametrize(
    ("methods", "said"),
    [("voco", "without labels, 3 steps\n"), ("voco[steps=5]", "3 steps unless the arm says otherwise\n")],
)
def test_the_report_says_whose_steps_the_options_are(stand_ins, methods, said):
    assert said in (run_tiny(methods, steps=3).folder / "comparison.md").read_text()


def test_lines_of_a_log_say_one_thing_a_training(stand_ins, caplog):
    caplog.set_level("INFO", logger="autoseg")
    run_tiny()
    lines = [record.getMessage() for record in caplog.records if record.name == "autoseg.comparison"]
    assert len(lines) == 5
    assert lines[0].startswith("[1/5] pretraining voco without fold 0: done in")
    assert "voco, fold 0, 100 % of the labels, seed 0" in lines[-1] and "Dice 0.600" in lines[-1]


# The real thing.


def test_a_stopped_comparison_goes_on_and_what_is_finished_is_untouched(home, monkeypatch, caplog):
    caplog.set_level("INFO", logger="autoseg")
    original, count = base.AutosegTrainer.train_step, []

    def signalled(trainer, batch):
        count.append(1)
        if len(count) == 6:  # in the first epoch of the second training, which is voco's
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, batch)

    monkeypatch.setattr(base.AutosegTrainer, "train_step", signalled)
    with pytest.raises(SystemExit) as caught:
        run_tiny(label_fractions=(0.25,), workers=0)
    assert caught.value.code == 143
    folder = paths.results(DATASET) / "comparison"
    assert {row["arm"] for row in rows(folder)} == {"scratch"}  # what there is, is shown
    encoder = next(paths.results(DATASET).glob("pretrained/*/voco-cmp-voco-x0"))
    scratch = next(paths.results(DATASET).glob("AutosegTrainer-cmp-scratch-f25-s0-x0__*/fold_0"))
    before = {**files(encoder), **files(scratch)}

    result = run_tiny(label_fractions=(0.25,), workers=0)
    assert len(count) == 8  # two epochs of two iterations for each arm: none was made twice
    assert {**files(encoder), **files(scratch)} == before
    assert result.failures == {}
    assert {row["arm"] for row in rows(folder)} == {"scratch", "voco"}
    assert "Continuing at epoch 1" in (folder / "log.txt").read_text()

    held_out = set(folds(DATASET)[0]["val"])
    card = load_encoder(encoder)[1]
    seen = {case.split("/")[1] for case in (*card.cases, *card.held_out)}
    assert card.excluded_fold == 0 and seen == {f"case_{i:02d}" for i in range(6)} - held_out
    models = [next(paths.results(DATASET).glob(f"*cmp-{arm}-f25-s0-x0__*")) for arm in ("scratch", "voco")]
    options = [json.loads((model / "plans.json").read_text())["autoseg"]["train"] for model in models]
    for name in ("dice_over_labels.png", "learning_curves.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
    different = {key for key in options[0] if options[0][key] != options[1][key]}
    assert different == {"run", "pretrained"}


def test_a_dry_run_forecasts_and_writes_nothing(home):
    before = files(home)
    assumed = run_tiny(dry_run=True)
    assert files(home) == before  # no fold file, no configuration, no data
    assert all(cost.basis.startswith("assumed (the data are not preprocessed yet)") for _, _, cost in assumed.rows)

    folds(DATASET)
    preprocess_dataset(DATASET, PLAN, ["3d_fullres"], workers=1)
    before = files(home)
    measured = run_tiny(dry_run=True, seeds=(0, 1))
    assert files(home) == before
    assert [(count, cost.basis) for _, count, cost in measured.rows] == [(1, "measured"), (8, "measured")]
    assert 0 < measured.seconds < 600 and 1e4 < measured.bytes < 1e8
    assert np.isfinite(measured.seconds)


def test_scans_that_training_does_not_use_need_not_be_preprocessed_for_its_forecast(home):
    folds(DATASET)
    preprocess_dataset(DATASET, PLAN, ["3d_fullres"], workers=1)
    raw = paths.raw(DATASET)
    (raw / "imagesUn").mkdir()
    for image in sorted((raw / "imagesTr").iterdir())[:1]:
        shutil.copyfile(image, raw / "imagesUn" / f"unseen_{image.name}")
    pretraining, training = (cost.basis for _, _, cost in run_tiny(dry_run=True).rows)
    assert pretraining.startswith("assumed (the unlabelled scans are not preprocessed yet)")
    assert training == "measured"
