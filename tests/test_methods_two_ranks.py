"""Two processes with a batch each learn what one process learns from both batches put together: every method of the catalog."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from pretrain.catalog import METHODS
from pretrain.distributed import average_gradients, gather
from pretrain.method import Batch, PretrainMethod, Step
from tests.geometries import NAMES, batch_of, build, every_method, scans_of, stages_of, target_of

JOINT = {
    "cpc": "tiles of all ranks are each other's negatives",
    "exemplar": "views of all ranks are each other's negatives",
}
"""Every rank has the loss of the joint batch."""

MEAN = {"rpl", "jigsaw", "rotation", "pcrl", "pumit", "meddinov3"}
"""The loss is a mean over samples: a rank has the mean over its own. PCRL's negatives are the queue's, which all ranks fill.
PUMIT's prior is of the mean token of all ranks, the same for each. So is what MedDINOv3 takes off its teacher's logits."""

APART = {
    "voco": "its projector is normalised by the statistics of a batch, and each volume is set against the next of the batch"
}
"""A batch is a unit: two ranks are two batches whose gradients are averaged, and one batch of both is another task."""

SHARED = {"pcrl": ["mix"]}
"""What a batch draws once: each rank for itself, so the second takes the first's here."""

ONE_GEOMETRY = {"pumit": {"zoom": 0.0}, "meddinov3": {"koleo": 0.0, "centering": "sinkhorn"}}
"""Settings with which the views of both ranks are of one kind, so that one batch can hold them; and without MedDINOv3's
neighbours, which are sought among a rank's own slices."""

COUNTS_FAILURES = {"pumit", "meddinov3"}
"""Methods whose buffers change where something goes wrong only."""


def test_every_method_says_how_ranks_go_together() -> None:
    assert sorted([*JOINT, *MEAN, *APART]) == sorted(NAMES)


def of_one_kind(name: str) -> PretrainMethod:
    """The same method in each process."""
    scans = [scan.info for scan in scans_of("two channels").values()]
    return build(name, target_of(name, "two channels"), scans, **ONE_GEOMETRY.get(name, {}))


def joined(batches: list[Batch]) -> list[Batch]:
    first, second = batches
    assert all(isinstance(value, torch.Tensor) or value == second[key] for key, value in first.items())
    together = {key: torch.cat([value, second[key]]) for key, value in first.items() if isinstance(value, torch.Tensor)}
    return [first | together]


def step_on(model: PretrainMethod, batches: list[Batch], step: Step) -> dict[str, Any]:
    """Fill queues and running statistics, then the mean loss of `batches` and its gradients."""
    model.eval()  # dropout differs from rank to rank
    with torch.no_grad():
        for batch in batches:
            model.after_step(batch, model.loss(batch, step), step)
    terms = [model.backward(batch, step, lambda loss: (loss / len(batches)).backward()) for batch in batches]
    average_gradients(model.parameters())
    return {
        "loss": torch.stack([each["loss"].detach() for each in terms]).mean(),
        "shown": torch.stack([each.get("shown", torch.ones(())) for each in terms]).mean(),
        "gradients": {key: p.grad for key, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
    }


def one_rank(rank: int, place: str) -> None:
    """Each method on one of its two batches; leaves what came of it in `place`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    for name in METHODS:
        model = of_one_kind(name)
        model.gather = gather
        task = torch.load(f"{place}/{name}.pt", weights_only=True)
        torch.save(step_on(model, [task["batches"][rank]], Step(**task["step"])), f"{place}/{name}_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods in two processes, once: starting these costs more than the methods."""
    place = tmp_path_factory.mktemp("ranks")
    scans = list(scans_of("two channels", 8).items())
    for name in NAMES:
        model = of_one_kind(name)
        _, step = stages_of(model)[0]
        two = [batch_of(model, dict(scans[4 * rank : 4 * rank + 4]), step, seed=rank) for rank in range(2)]
        two[1] |= {key: two[0][key] for key in SHARED.get(name, [])}
        torch.save({"step": dataclasses.asdict(step), "batches": two}, place / f"{name}.pt")
    multiprocessing.spawn(one_rank, args=(str(place),), nprocs=2)
    return place


@cache
def results(place: Path, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of the two ranks, and of one process that gathers nothing and has both batches at once."""
    task = torch.load(place / f"{name}.pt", weights_only=True)
    batches = task["batches"] if name in APART else joined(task["batches"])
    alone = step_on(of_one_kind(name), batches, Step(**task["step"]))
    return [torch.load(place / f"{name}_{rank}.pt", weights_only=True) for rank in range(2)], alone


@every_method
def test_two_processes_learn_what_one_would_from_both_batches(two_ranks: Path, name: str) -> None:
    ranks, alone = results(two_ranks, name)
    if name in MEAN:  # else a mean over ranks is not the mean over samples
        assert [float(rank["shown"]) for rank in ranks] == [1, 1]
    losses = [float(rank["loss"]) for rank in ranks]
    assert losses[0] + losses[1] == pytest.approx(2 * float(alone["loss"]), rel=1e-5)
    assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) == (name in JOINT)
    wanted = alone["gradients"]
    reference = torch.cat([wanted[key].flatten() for key in wanted])
    assert float(reference.norm()) > 0
    for rank in ranks:
        assert rank["gradients"].keys() == wanted.keys()
        flat = torch.cat([rank["gradients"][key].flatten() for key in wanted])
        assert float((flat - reference).norm()) < 1e-4 * float(reference.norm())


@every_method
def test_queues_and_statistics_are_those_of_both_batches_on_both_processes(two_ranks: Path, name: str) -> None:
    (first, second), alone = results(two_ranks, name)
    model = of_one_kind(name)
    for key, value in alone["buffers"].items():
        assert torch.equal(first["buffers"][key], second["buffers"][key])
        assert torch.allclose(first["buffers"][key], value, rtol=1e-4, atol=1e-5)
    kept = any(not torch.equal(alone["buffers"][key], value) for key, value in model.named_buffers())
    assert kept == (type(model).after_step is not PretrainMethod.after_step and name not in COUNTS_FAILURES)
