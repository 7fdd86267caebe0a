"""The loop: what a run leaves behind, and what an interruption, other options or a bad method do to it."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planners import paths
from planners.errors import AutosegError, DatasetError, PlanError, PretrainedMismatch, SettingsError
from planners.locks import sole_lock
from planners.plans import folds
from pretrain import distributed, training
from pretrain.checkpoint import load_encoder
from pretrain.encoders import build_segmentation_network, encoder_of
from pretrain.loop import pretrain
from pretrain.method import Batch, Export, Step, Target, Terms
from pretrain.networks import SwinUNETR
from pretrain.transfer import transfer
from pretrain.volumes import CaseInfo
from tests.stubs import PLAN, Stub, StubConfig, copy_home, make_home, run_stub, use_method
from tests.tiny import DATASET, dataset_json, tiny_plan


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = dict(os.environ)
    root = make_home(tmp_path_factory.mktemp("loop") / "root")
    os.environ.clear()
    os.environ.update(before)
    return root


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    return copy_home(prepared, tmp_path / "root")


def voco(**options: Any) -> Path:
    settings = {"voco.hidden": "16", **options.pop("settings", {})}
    return pretrain(
        DATASET, method="voco", plan=PLAN, device="cpu", **{"workers": 0, "steps": 2, "settings": settings, **options}
    )


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """As if a signal came during the given step."""

    @contextlib.contextmanager
    def counting() -> Iterator[Callable[[], int]]:
        asked = 0

        def stopped() -> int:
            nonlocal asked
            asked += 1
            return int(number) if asked == steps else 0

        yield stopped

    monkeypatch.setattr(training, "stop_signal", counting)


def same_encoders(a: Path, b: Path) -> bool:
    first, second = load_encoder(a)[0], load_encoder(b)[0]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_an_encoder_that_fits_and_says_what_it_is(home: Path) -> None:
    folder = voco()
    assert folder == home / "results" / DATASET / "pretrained" / f"{PLAN}__3d_fullres" / "voco"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "encoder.safetensors",
        "encoder.json",
        "settings.json",
        "state.pt",
        "progress.csv",
        "views.png",
        "tensorboard",
    }
    tensors, card = load_encoder(folder)
    network = build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json())
    assert transfer(tensors, encoder_of(network)).encoder_share == 1
    assert (card.method, card.scope, card.steps_done, card.finished, card.DA) == ("voco", "encoder", 2, True, 1)
    assert card.metrics["acc"]["chance"] == pytest.approx(1 / 6)
    assert card.metrics["loss"]["value"] is not None
    assert len(card.cases) == 5
    assert len(card.held_out) == 1
    assert card.cases[0].startswith(f"{DATASET}/case_")
    assert not set(card.cases) & set(card.held_out)
    first, last = rows(folder)[0], rows(folder)[-1]
    assert float(first["held_out_acc"]) >= 0
    assert float(last["chance_acc"]) == pytest.approx(1 / 6)
    assert float(last["steps_per_second"]) > 0
    json.loads((folder / "settings.json").read_text())


def test_an_encoder_says_what_was_asked_of_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain numbers, whatever a method plans with."""

    class Planned(Stub):
        @classmethod
        def plan(cls, target: Target, pool: Sequence[CaseInfo], config: StubConfig) -> Any:
            return tuple(2 * np.array(target.encoder.total_stride))

        def chance(self) -> dict[str, float]:
            return {"acc": 0.5}

    use_method(monkeypatch, Planned)
    assert load_encoder(run_stub(steps=1))[1].task == {"views": [4, 8, 8], "chance": {"acc": 0.5}}


def test_batches_that_show_nothing_are_left_out_of_all_means(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second batch shows nothing: the means are those of the others, and of none there is no loss at all."""

    class Half(Stub):
        def loss(self, batch: Batch, step: Step) -> Terms:
            self.calls = getattr(self, "calls", -1) + 1
            if self.calls % every == every - 1:
                return {**super().loss(batch, step), "loss": self.head.weight.sum() * 0 + 3, "shown": torch.tensor(0.5)}
            return {"loss": self.head.weight.sum() * 0, "shown": torch.tensor(0.0)}

    use_method(monkeypatch, Half)
    every = 2
    first = rows(run_stub(steps=2))[0]
    assert (float(first["held_out_loss"]), float(first["held_out_shown"])) == (3, 0.25)
    every = 1000
    folder = run_stub(steps=2, run="nothing")
    assert load_encoder(folder)[1].metrics == {"shown": {"value": 0, "chance": None}}
    assert not rows(folder)[-1].get("loss")


def test_twenty_steps_equal_ten_and_ten(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an averaged encoder and dropout, which the defaults (`tests/test_methods.py`) do not have."""
    options: dict[str, Any] = {"steps": 20, "settings": {"voco.variant": "v1", "voco.feature_dropout": "0.1"}}
    straight = voco(**options)
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(SystemExit) as stop:
            voco(run="parts", **options)
    assert stop.value.code == 143
    parts = straight.with_name("voco-parts")
    assert load_encoder(parts)[1].steps_done == 10
    assert not load_encoder(parts)[1].finished
    assert (
        pretrain(DATASET, method="voco", plan=PLAN, device="cpu", workers=0, run="parts") == parts
    )  # options that are not given come from the run
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(straight)]
    assert [row["held_out_loss"] for row in rows(parts)] == [row["held_out_loss"] for row in rows(straight)]
    assert [row["learning_rate"] for row in rows(parts)] == [row["learning_rate"] for row in rows(straight)]
    assert same_encoders(straight, parts)
    states = [torch.load(f / "state.pt", weights_only=True)["method"] for f in (straight, parts)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_finished_run_is_left_alone_and_overwritten_when_asked(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = voco()
    before = (folder / "encoder.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO", "autoseg"):
        voco()
    assert "Finished already" in caplog.text
    assert (folder / "encoder.safetensors").stat().st_mtime_ns == before
    voco(overwrite=True)
    assert (folder / "encoder.safetensors").stat().st_mtime_ns > before


def test_other_options_on_a_run_are_refused_by_name(home: Path) -> None:
    voco()
    with pytest.raises(SettingsError) as error:
        voco(steps=3, seed=5, exclude_fold=1, settings={"voco.hidden": "32"})
    for text in ("voco.steps 3 (was 2)", "seed 5 (was 0)", "exclude_fold 1 (was None)", "voco.hidden 32 (was 16)"):
        assert text in str(error.value)


def test_options_that_are_not_given_are_the_runs_own(home: Path) -> None:
    folder = voco(seed=5)
    assert voco() == folder
    assert json.loads((folder / "settings.json").read_text())["seed"] == 5


def test_the_configuration_is_shown_without_pretraining(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="autoseg")
    folder = voco(show_config=True, seed=5)
    shown = {
        line.split()[0]: line.split()[1:] for line in caplog.messages if line.startswith(("voco.", "seed", "preset"))
    }
    assert shown["seed"] == ["5", "flag"]
    assert shown["voco.variant"] == ["v2", "default"]
    assert shown["voco.steps"] == ["2", "flag"]
    assert not list(folder.glob("*"))


def test_two_processes_cannot_pretrain_the_same_encoder(home: Path) -> None:
    folder = voco()
    with (
        sole_lock(folder.with_name(f".{folder.name}.lock"), "pretraining this encoder"),
        pytest.raises(SettingsError, match="Another process is pretraining this encoder"),
    ):
        voco(overwrite=True)
    assert (folder / "encoder.json").is_file()


def test_other_scans_in_a_run_that_goes_on_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit):
            voco(steps=4)
    for kind in ("imagesTr", "labelsTr"):
        for file in (home / "raw" / DATASET / kind).glob("case_00*"):
            file.unlink()
    with pytest.raises(SettingsError, match="0 new, 1 gone"):
        voco(steps=4)


class SignalsItself(Stub):
    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        if step.index == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_saves_and_ends_with_its_number(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, SignalsItself)
    with pytest.raises(SystemExit) as stop:
        run_stub(steps=5)
    assert stop.value.code == 130
    use_method(monkeypatch, Stub)
    assert load_encoder(run_stub(steps=5))[1].finished


def test_an_excluded_fold_is_not_seen(home: Path) -> None:
    card = load_encoder(voco(exclude_fold=1))[1]
    left_out = set(folds(DATASET)[1]["val"])
    used = {name.rpartition("/")[2] for name in card.cases + card.held_out}
    assert left_out
    assert not used & left_out
    assert len(used) + len(left_out) == 6
    assert card.excluded_fold == 1
    with pytest.raises(SettingsError, match="No such fold"):
        voco(exclude_fold=9, run="nine")


class Loses(Stub):
    def export(self) -> Export:
        other = copy.deepcopy(self.encoder)
        other.register_forward_hook(lambda module, inputs, output: [2 * skip for skip in output])
        return Export(other, "encoder")


def test_an_encoder_that_would_not_come_back_equal_is_found_before_the_first_step(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_method(monkeypatch, Loses)
    with pytest.raises(PretrainedMismatch, match="other features"):
        run_stub()
    assert not list((home / "results").rglob("progress.csv"))


class WholeNetwork(Stub):
    """Keeps encoder and decoder, as PCRL."""

    def __init__(self, network: Any, spec: Any, config: Any) -> None:
        super().__init__(network, spec, config)
        self.network = network

    def export(self) -> Export:
        return Export(self.network, "encoder+decoder")


def test_a_whole_network_can_be_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, WholeNetwork)
    tensors, card = load_encoder(run_stub())
    assert card.scope == "encoder+decoder"
    network = build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json())
    report = transfer(tensors, network)
    assert not report.new
    assert not report.unused


class BecomesNaN(Stub):
    def loss(self, batch: Batch, step: Step) -> Terms:
        terms = super().loss(batch, step)
        return {"loss": terms["loss"] * (float("nan") if step.index == 2 and self.training else 1.0)}


def test_a_loss_that_is_no_number_ends_the_run_with_advice(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, BecomesNaN)
    with pytest.raises(AutosegError, match="The loss is nan at step 3") as error:
        run_stub(steps=5)
    assert "learning rate" in str(error.value)


def test_a_run_can_start_from_an_encoder(home: Path) -> None:
    first = voco(steps=3)
    second = voco(steps=1, init="voco", run="more", settings={"voco.learning_rate": 1e-12})
    a, b = load_encoder(first)[0], load_encoder(second)[0]
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert not same_encoders(first, voco(steps=1, run="new", settings={"voco.learning_rate": 1e-12}))
    with pytest.raises(DatasetError, match="No such file or folder of weights"):
        voco(init="missing", run="no")


def test_a_run_can_start_from_weights_of_others(home: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs = build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json())
    file = tmp_path / "published.pth"
    torch.save({"network_weights": theirs.state_dict()}, file)
    folder = voco(steps=1, init=file, settings={"voco.learning_rate": 1e-12})
    tensors, card = load_encoder(folder)
    state = encoder_of(theirs).state_dict()
    assert all(torch.allclose(tensor, state[name], atol=1e-6) for name, tensor in tensors.items())
    assert "published" not in card.licence
    assert str(tmp_path) not in json.dumps(card.to_json())


def test_weights_of_another_network_decide_the_configuration(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "swin.pt"
    torch.save(SwinUNETR(1, 3, feature_size=12).encoder.state_dict(), file)
    before = (paths.preprocessed(DATASET) / f"{PLAN}.json").read_text()
    folder = voco(init=file, show_config=True)
    assert folder.parent.name == f"{PLAN}__3d_fullres_swin_12"
    assert (paths.preprocessed(DATASET) / f"{PLAN}.json").read_text() == before


def test_a_pretrained_encoder_waits_until_the_heads_are_warm(home: Path) -> None:
    first = voco(steps=2)
    with_wait = voco(steps=4, init=first, run="wait", settings={"voco.warm_up": "0.9"})
    assert same_encoders(first, with_wait)


def test_an_unfinished_encoder_is_started_from_only_when_allowed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit):
            voco(steps=4)
    with pytest.raises(PretrainedMismatch, match="1 of 4 steps"):
        voco(init="voco", run="more")
    voco(init="voco", run="more", allow_partial=True)


@pytest.mark.parametrize(("channels", "dims"), [(2, 3), (1, 2), (2, 2)])
def test_several_channels_and_two_dimensions(tmp_path: Path, channels: int, dims: int) -> None:
    make_home(tmp_path / "root", channels=channels, dims=dims, cases=3)
    folder = voco()
    tensors, card = load_encoder(folder)
    configuration = "3d_fullres" if dims == 3 else "2d"
    network = build_segmentation_network(tiny_plan(dims=dims, channels=channels), configuration, dataset_json(channels))
    assert transfer(tensors, encoder_of(network)).encoder_share == 1
    assert len(card.channels) == channels
    assert (1 if dims == 3 else None) == card.DA


def test_a_single_scan_can_be_learned_from(tmp_path: Path) -> None:
    make_home(tmp_path / "root", cases=1)
    card = load_encoder(voco())[1]
    assert card.cases == card.held_out == [f"{DATASET}/case_00"]


def test_what_does_not_exist_is_named(home: Path) -> None:
    with pytest.raises(SettingsError, match="Unknown method"):
        pretrain(DATASET, method="vocco", plan=PLAN)
    with pytest.raises(SettingsError, match="No such preset"):
        voco(preset="huge")
    with pytest.raises(SettingsError, match=r"voco\.speed"):
        voco(settings={"voco.speed": "1"})
    with pytest.raises(SettingsError, match=r"pcrl\.steps"):
        voco(settings={"pcrl.steps": "1"})
    with pytest.raises(PlanError):
        voco(configuration="2d")


def test_a_method_gathers_over_all_processes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Gathers(Stub):
        def loss(self, batch: Batch, step: Step) -> Terms:
            given.append(self.gather)
            return super().loss(batch, step)

    use_method(monkeypatch, Gathers)
    run_stub(steps=1)
    assert set(given) == {distributed.gather}
