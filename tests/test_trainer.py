"""Training: what a run leaves behind, what may change it, and that nothing is lost when it is interrupted."""

import copy
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import matplotlib
import pytest
import torch

from planners import paths
from planners.errors import PlanError, PretrainedMismatch, SettingsError, UnsafeFile
from planners.locks import sole_lock
from pretrain.checkpoint import EncoderCard, encoder_folder, save_encoder
from pretrain.encoders import build_segmentation_network, encoder_of
from tests.tiny import DATASET, dataset_json, tiny_plan, write_tiny_dataset, write_tiny_plan
from trainers import base
from trainers.checkpoint import load_checkpoint
from trainers.job import prepare
from trainers.train import train

SHORT = {"epochs": 3, "iterations": 3}


@pytest.fixture
def tiny(tmp_path):
    write_tiny_dataset(tmp_path, cases=5)
    write_tiny_plan(tiny_plan())
    return tmp_path


def short_train(**options):
    options = {"plan": "tinyPlans", "device": "cpu", "settings": SHORT, **options}
    return train(901, **options)[0]


def tiny_encoder(seed=7, dataset=DATASET, steps=(10, 10), cases=(), method="voco", plan=None):
    from planners.plans import plan_hash

    plan = plan or tiny_plan()
    torch.manual_seed(seed)
    module = encoder_of(build_segmentation_network(plan, "3d_fullres", dataset_json()))
    card = EncoderCard(
        method=method, version="0.1.0", dataset=dataset, plan_name=plan["plans_name"],
        plan_hash=plan_hash(plan, "3d_fullres"), configuration="3d_fullres",
        architecture=plan["configurations"]["3d_fullres"]["architecture"], scope="encoder", spacing=[2.5, 1.1, 1.0],
        patch_size=[8, 24, 20], DA=1, channels=["MR0"], intensity=["zscore"], steps_done=steps[0], steps_asked=steps[1],
        metrics={}, cases=list(cases), held_out=[], excluded_fold=None, licence="Apache-2.0", citation="",
    )  # fmt: skip
    save_encoder(encoder_folder(DATASET, plan["plans_name"], "3d_fullres", method), module, card)
    return module


def weights(fold):
    return load_checkpoint(fold / "checkpoint_final.pth")["network_weights"]


def test_a_run_leaves_nnunets_files_a_record_and_nothing_else(tiny):
    fold = short_train()
    assert fold.parent.name == "AutosegTrainer__tinyPlans__3d_fullres"
    assert {p.name for p in fold.parent.iterdir()} == {"plans.json", "dataset.json", "fold_0", ".fold_0.lock"}
    there = {p.name for p in fold.iterdir() if not p.name.startswith("training_log")}
    assert there == {
        "checkpoint_final.pth", "checkpoint_best.pth", "progress.png", "progress.csv", "tensorboard", "validation",
    }  # fmt: skip
    rows = list(csv.DictReader((fold / "progress.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"train_loss", "validation_loss", "dice", "dice_organ", "dice_core", "lr", "seconds"} <= rows[0].keys()
    options = json.loads((fold.parent / "plans.json").read_text())["autoseg"]["train"]
    assert (options["epochs"], options["run"], options["pretrained"]) == (3, None, None)
    assert json.loads((paths.preprocessed(DATASET) / "tinyPlans.json").read_text()) == tiny_plan()


def test_nnunets_picture_leaves_other_pictures_as_they_were(tiny):
    before = dict(matplotlib.rcParams)
    short_train()
    assert dict(matplotlib.rcParams) == before


def test_checkpoints_load_without_an_allow_list_and_name_nnunets_trainer(tiny):
    checkpoint = torch.load(short_train() / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["autoseg"]["trainer_name"] == "AutosegTrainer"
    assert checkpoint["init_args"]["configuration"] == "3d_fullres"
    assert checkpoint["inference_allowed_mirroring_axes"] == (0, 1, 2)


def test_validation_is_written_as_nnunet_writes_it(tiny):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    folder = short_train() / "validation"
    ours = load_summary_json(folder / "summary.json")
    (folder / "summary.json").unlink()
    reference = paths.preprocessed(DATASET) / "gt_segmentations"
    theirs = compute_metrics_on_folder(str(reference), str(folder), None, SimpleITKIO(), ".nii.gz", [1, 2], None, 1)
    assert ours == theirs


def test_an_interrupted_validation_continues_with_the_missing_case(tiny, caplog):
    fold = short_train()
    first = next((fold / "validation").glob("*.nii.gz"))
    kept = first.stat().st_mtime_ns
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    (fold / "validation" / "summary.json").unlink()
    caplog.set_level("INFO", logger="autoseg")
    short_train()
    assert first.stat().st_mtime_ns == kept
    assert "Epoch" not in caplog.text
    assert json.loads((fold / "validation" / "summary.json").read_text()) == summary

    os.utime(first, ns=(0, 0))  # older than the weights: from a training before
    train(901, plan="tinyPlans", device="cpu", validation_only=True)
    assert first.stat().st_mtime_ns > 0


def test_continuing_after_a_kill_equals_training_straight_through(tiny, monkeypatch):
    straight = weights(short_train(run="straight"))
    killed = base.AutosegTrainer.on_epoch_end

    def die_after_the_first_epoch(trainer):
        killed(trainer)
        if trainer.current_epoch == 1:
            raise MemoryError("killed")

    monkeypatch.setattr(base.AutosegTrainer, "on_epoch_end", die_after_the_first_epoch)
    with pytest.raises(MemoryError):
        short_train(run="killed")
    monkeypatch.setattr(base.AutosegTrainer, "on_epoch_end", killed)
    fold = short_train(run="killed")
    continued = weights(fold)
    assert all(torch.equal(tensor, continued[name]) for name, tensor in straight.items())
    assert len((fold / "progress.csv").read_text().splitlines()) == 1 + 3
    assert not (fold / "checkpoint_latest.pth").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", ["train_step", "validation_step"])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_the_same_command_continues(tiny, monkeypatch, number, code, step):
    straight = weights(short_train(run="straight"))
    original, count = getattr(base.AutosegTrainer, step), []

    def signalled(trainer, batch):
        count.append(1)
        if len(count) == 2:  # in training: within the first epoch; in validation: of the second epoch
            os.kill(os.getpid(), number)
        return original(trainer, batch)

    monkeypatch.setattr(base.AutosegTrainer, step, signalled)
    with pytest.raises(SystemExit) as caught:
        short_train(run="stopped")
    assert caught.value.code == code
    continued = weights(short_train(run="stopped"))
    assert all(torch.equal(tensor, continued[name]) for name, tensor in straight.items())


def test_a_signal_during_the_last_validation_loses_nothing(tiny, monkeypatch):
    original, count = base.AutosegTrainer.validation_step, []

    def signalled(trainer, batch):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(trainer, batch)

    monkeypatch.setattr(base.AutosegTrainer, "validation_step", signalled)
    with pytest.raises(SystemExit):
        short_train()
    fold = short_train()
    assert len((fold / "progress.csv").read_text().splitlines()) == 1 + 3


def test_a_time_limit_ends_training_with_the_rate_at_zero(tiny, monkeypatch, caplog):
    """Each iteration and each validation take a sixteenth of the second there is: two epochs of six, and four of the third."""
    clock = itertools.count(step=1 / 16)
    monkeypatch.setattr(base, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: next(clock)}))
    caplog.set_level("INFO", logger="autoseg")
    fold = short_train(settings={"epochs": 500, "iterations": 5, "max_minutes": 1 / 60})
    rates = [float(row["lr"]) for row in csv.DictReader((fold / "progress.csv").open())]
    last_of_epochs = [0.01 * (1 - done / 16) ** 0.9 for done in (4, 10, 15)]
    assert rates == pytest.approx(last_of_epochs, rel=1e-3)
    assert "by max_minutes" in caplog.text
    assert (fold / "checkpoint_final.pth").is_file()


def test_repeating_a_finished_run_does_nothing(tiny, caplog):
    fold = short_train()
    stamp = (fold / "checkpoint_final.pth").stat().st_mtime_ns
    caplog.set_level("INFO", logger="autoseg")
    assert short_train(settings={}) == fold
    assert "is finished" in caplog.text
    assert (fold / "checkpoint_final.pth").stat().st_mtime_ns == stamp


def test_two_processes_cannot_train_the_same_fold(tiny):
    folder = short_train(settings={"epochs": 1, "iterations": 1}).parent
    with (
        sole_lock(folder / ".fold_0.lock", "training fold 0 of this run"),
        pytest.raises(SettingsError, match="Another process is training fold 0"),
    ):
        short_train(settings={"epochs": 1, "iterations": 1}, overwrite=True)
    assert (folder / "fold_0" / "checkpoint_final.pth").is_file()


def test_an_existing_run_keeps_its_options_and_refuses_others(tiny):
    short_train()
    assert prepare(901, plan="tinyPlans", device="cpu", folds=(1,)).resolved.settings.epochs == 3
    with pytest.raises(SettingsError, match=r"train\.epochs=5 \(the run has 3\)"):
        short_train(settings={"epochs": 5, "iterations": 3})
    fold = short_train(settings={"epochs": 1, "iterations": 3}, overwrite=True)
    assert len((fold / "progress.csv").read_text().splitlines()) == 1 + 1


def test_overwriting_one_fold_does_not_split_a_run_in_two(tiny):
    short_train(folds=(0, 1), settings={"epochs": 1, "iterations": 1})
    with pytest.raises(SettingsError, match="other options"):
        short_train(settings={"epochs": 2, "iterations": 1}, overwrite=True)


def test_the_encoder_arrives_is_reported_and_names_the_run(tiny, monkeypatch, caplog):
    module = tiny_encoder(cases=[f"{DATASET}/case_0{i}" for i in range(5)])
    started = {}
    monkeypatch.setattr(
        base.AutosegTrainer,
        "run_training",
        lambda trainer: (
            started.update(copy.deepcopy(encoder_of(trainer.bare_network).state_dict())),
            trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(),
            trainer.save_checkpoint(trainer.output_folder + "/checkpoint_final.pth"),
        ),
    )
    caplog.set_level("INFO", logger="autoseg")
    fold = train(901, pretrained="voco", settings=SHORT, device="cpu")[0]  # the encoder decides the plan
    assert fold.parent.name == "AutosegTrainer-voco__tinyPlans__3d_fullres"
    assert all(torch.equal(tensor, started[name]) for name, tensor in module.state_dict().items())
    report = json.loads((fold.parent / "transfer.json").read_text())
    assert report["encoder_share"] == 1.0
    assert report["source"]["method"] == "voco"
    assert "encoder 100 %" in caplog.text
    assert "validation cases of fold 0" in caplog.text
    assert str(tiny) not in (fold.parent / "plans.json").read_text()


def test_frozen_epochs_leave_the_encoder_as_it_came(tiny):
    module = tiny_encoder()
    options = {"pretrained": "voco", "settings": {"epochs": 1, "iterations": 2, "frozen_epochs": 1}}
    trained = weights(short_train(**options))
    assert all(torch.equal(tensor, trained[f"encoder.{name}"]) for name, tensor in module.state_dict().items())


def test_the_run_of_an_encoder_alone_names_the_encoder_that_is_meant(tiny):
    tiny_encoder(method="voco-long")
    with pytest.raises(SettingsError, match=r"to fix +--pretrained voco-long$"):
        prepare(901, pretrained="long", device="cpu")
    with pytest.raises(SettingsError, match=r"to fix .*--method METHOD, or give the path"):
        prepare(901, pretrained="short", device="cpu")


def test_contradictions_about_the_encoder_are_refused(tiny):
    tiny_encoder()
    write_tiny_plan(tiny_plan(name="otherPlans"))
    folder = encoder_folder(DATASET, "tinyPlans", "3d_fullres", "voco")
    with pytest.raises(SettingsError, match="pretrained with something else"):
        prepare(901, plan="otherPlans", pretrained=folder, device="cpu")
    with pytest.raises(SettingsError, match="no encoder voco for that plan"):
        prepare(901, plan="otherPlans", pretrained="voco", device="cpu")
    with pytest.raises(SettingsError, match=r"no encoder cpc[\s\S]*voco \(tinyPlans__3d_fullres\)"):
        prepare(901, pretrained="cpc", device="cpu")
    with pytest.raises(SettingsError, match="new weights"):
        prepare(901, pretrained="voco", run="scratch", device="cpu")


def test_two_encoders_of_one_name_are_listed(tiny):
    for name in ("tinyPlans", "otherPlans"):
        write_tiny_plan(tiny_plan(name=name))
        tiny_encoder(plan=tiny_plan(name=name))
    with pytest.raises(SettingsError, match=r"-p otherPlans -c 3d_fullres[\s\S]*-p tinyPlans"):
        prepare(901, pretrained="voco", device="cuda" if torch.cuda.is_available() else "cpu")
    assert prepare(901, pretrained="voco", plan="otherPlans", device="cpu").plan_name == "otherPlans"


def test_the_small_plans_encoder_is_taken_without_a_gpu(tiny):
    for name in ("autosegPlans", "autosegPlans_cpu"):
        write_tiny_plan(tiny_plan(name=name))
        tiny_encoder(plan=tiny_plan(name=name))
    assert prepare(901, pretrained="voco", device="cpu").plan_name == "autosegPlans_cpu"


def test_unfinished_encoders_need_to_be_allowed(tiny):
    tiny_encoder(steps=(5, 10))
    with pytest.raises(PretrainedMismatch, match="5 of 10 steps"):
        prepare(901, pretrained="voco", device="cpu")
    assert prepare(901, pretrained="voco", device="cpu", allow_partial=True).source.name == "voco"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"settings": {"speed": 3}}, SettingsError, "no such setting"),
        ({"folds": (7,)}, SettingsError, "No such fold"),
        ({"run": "a__b"}, SettingsError, "Not a name for a run"),
        ({"plan": "nothing"}, PlanError, "no plan nothing"),
        ({"configuration": "4d"}, PlanError, "no configuration 4d"),
        ({"device": "tpu"}, SettingsError, "No such device"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tiny, options, error, message):
    with pytest.raises(error, match=message):
        short_train(**options)
    assert not paths.results(DATASET).exists()


def test_a_malicious_plan_is_refused_before_anything_is_written(tiny, monkeypatch):
    ran = []
    monkeypatch.setattr(os, "system", lambda *a: ran.append(a))
    plan = tiny_plan()
    plan["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = (
        "torch.nn.functional.torch.hub.os.system"
    )
    write_tiny_plan(plan)
    with pytest.raises(UnsafeFile):
        short_train()
    assert not ran
    assert not paths.results(DATASET).exists()


def test_signals_cannot_be_caught_in_a_thread_and_training_runs_all_the_same(tiny):
    done = []
    thread = threading.Thread(target=lambda: done.append(short_train(settings={"epochs": 1, "iterations": 1})))
    thread.start()
    thread.join()
    assert done


def test_the_configuration_is_shown_without_training(tiny, caplog):
    caplog.set_level("INFO", logger="autoseg")
    assert train(901, plan="tinyPlans", device="cpu", settings={"epochs": "3"}, show_config=True) == []
    lines = [record.getMessage().split() for record in caplog.records]
    assert ["train.epochs", "3", "flag"] in lines
    assert ["train.weight_decay", "3e-05", "default"] in lines
    assert not paths.results(DATASET).exists()


def test_all_cases_can_be_trained_on(tiny):
    fold = short_train(folds=("all",), settings={"epochs": 1, "iterations": 1})
    assert fold.name == "fold_all"
    assert len(list((fold / "validation").glob("*.nii.gz"))) == 5


def test_training_from_scratch_imports_nothing_that_only_encoders_need():
    program = "import sys, trainers.train; print({'timm', 'torchvision', 'tensorboard', 'monai'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
