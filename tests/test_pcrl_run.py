"""PCRL in the loop: every mode leaves a whole network behind, resumes exactly, and makes the same views with any workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import loop, training
from pretrain.checkpoint import load_encoder
from tests.stubs import PLAN, copy_home, make_home
from tests.test_pcrl import STEP, batch_of, tiny_model
from tests.tiny import DATASET

SMALL = {"pcrl.queue": 8, "pcrl.embedding": 8, "pcrl.local_views": 2, "pcrl.patch": "4,12,12"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = dict(os.environ)
    root = make_home(tmp_path_factory.mktemp("pcrl") / "root", channels=2)
    os.environ.clear()
    os.environ.update(before)
    return root


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    return copy_home(prepared, tmp_path / "root")


def pretrain(mode: str, **options: Any) -> dict[str, torch.Tensor]:
    settings = {**SMALL, "pcrl.mode": mode}
    folder = loop.pretrain(
        DATASET, method="pcrl", plan=PLAN, device="cpu", settings=settings, **{"workers": 0, "steps": 4, **options}
    )
    tensors, card = load_encoder(folder)
    assert card.scope == "encoder+decoder"
    assert (folder / "views.png").is_file()
    return tensors


class Interrupted(Exception):
    """The run ends here, as by a power cut."""


@pytest.mark.parametrize("mode", ["paper", "official", "v2"])
def test_a_run_that_was_cut_off_goes_on_exactly(mode: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pretrain(mode, run="whole")
    assert any(name.startswith("decoder.stages") for name in whole)
    monkeypatch.setattr(training._Saver, "is_time", lambda self: True)
    evaluate = training._evaluate

    def cut(run: Any, *args: Any) -> None:
        evaluate(run, *args)
        if run.step == 3:
            raise Interrupted

    monkeypatch.setattr(training, "_evaluate", cut)
    with pytest.raises(Interrupted):
        pretrain(mode, run="parts")
    monkeypatch.setattr(training, "_evaluate", evaluate)
    parts = pretrain(mode, run="parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_views_do_not_depend_on_the_number_of_workers(home: Path) -> None:
    alone, together = (pretrain("paper", workers=n, run=f"w{n}", steps=2) for n in (0, 2))
    assert all(torch.equal(tensor, together[name]) for name, tensor in alone.items())


# Cases, keys and the pooled maps of both encoders; in `official` the scale of its scores too.
@pytest.mark.parametrize(("mode", "tensors"), [("paper", 4), ("official", 5)])
def test_queue_and_norms_learn_the_batches_of_all_processes(mode: str, tensors: int) -> None:
    """Only the first process saves them, so they must be equal on all."""
    model = tiny_model(mode=mode)
    batch = batch_of(model)
    gathered = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        gathered.append(tensor)
        return torch.cat([tensor, tensor])

    model.gather = gather
    with torch.no_grad():
        model.after_step(batch, model.loss(batch, STEP), STEP)
    assert len(gathered) == tensors
    assert model.task.queue.filled == 4
    assert int(model.task.embedding.norm.count) == 1
