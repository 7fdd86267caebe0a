"""What every pretraining method must do: one suite over the catalog. A new method is covered by its line there.

What is particular to a method is tested in its own file: losses against numbers, views against coordinates, learning checks.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, multiprocessing, nn

from planners.configurations import with_configuration
from planners.dataset import load_dataset
from planners.errors import PlanError
from planners.files import write_json
from planners.plans import plan_path
from pretrain import training
from pretrain.batches import HELD_OUT, LEARNING, Batches, load
from pretrain.catalog import METHODS, entry, load_method
from pretrain.checkpoint import load_encoder
from pretrain.distributed import average_gradients, gather
from pretrain.encoders import build_segmentation_network, encoder_info, encoder_of
from pretrain.loop import pretrain
from pretrain.method import Batch, PretrainMethod, Step, Target
from pretrain.optimise import build_optimizer, phases, prepare_stage, update_averages
from pretrain.settings import configure
from pretrain.transfer import transfer
from pretrain.volumes import CaseInfo, Pool, build_pool
from tests.stubs import PLAN, copy_home, make_home
from tests.tiny import DATASET, Array, dataset_json, tiny_plan

NAMES = list(METHODS)
every_method = pytest.mark.parametrize("name", NAMES)


# A method on a plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """A kind of scans and the network a plan has for them."""

    patch: tuple[int, ...]
    spacing: tuple[float, ...]
    shape: tuple[int, int, int]
    strides: tuple[tuple[int, ...], ...]
    channels: int = 1

    @property
    def slices_mm(self) -> float:
        return self.spacing[0] if len(self.spacing) == 3 else 4.0


GEOMETRIES = {
    "isotropic": Geometry((24, 28, 24), (1.0, 1.0, 1.0), (30, 41, 35), ((1, 1, 1), (2, 2, 2), (2, 2, 2))),
    "anisotropic": Geometry((8, 40, 32), (5.0, 0.6, 0.6), (9, 55, 47), ((1, 1, 1), (1, 2, 2), (2, 2, 2))),
    "2d": Geometry((40, 32), (0.6, 0.6), (7, 55, 47), ((1, 1), (2, 2), (2, 2))),
    "two channels": Geometry((8, 24, 20), (2.5, 1.1, 1.0), (13, 27, 22), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), channels=2),
}


def plan_of(name: str, plan: dict) -> tuple[dict, str]:
    """The plan with the configuration that the method works on, and its name."""
    if entry(name).networks != ("PUMIT",):
        return plan, next(c for c in ("3d_fullres", "2d") if c in plan["configurations"])
    small = {"autoseg": {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}}
    return with_configuration(plan | small, "3d_fullres_sac"), "3d_fullres_sac"


def target_of(geometry: Geometry, name: str) -> Target:
    """A plan with a network of three stages, or the method's own network."""
    dims = len(geometry.patch)
    plan = tiny_plan(dims=dims, channels=geometry.channels)
    configuration = "3d_fullres" if dims == 3 else "2d"
    settings = plan["configurations"][configuration]
    settings |= {"patch_size": list(geometry.patch), "spacing": list(geometry.spacing), "batch_size": 2}
    settings["architecture"]["arch_kwargs"]["strides"] = [list(s) for s in geometry.strides]
    plan, configuration = plan_of(name, plan)
    return Target(plan, configuration, encoder_info(plan, configuration, dataset_json(geometry.channels)))


def scans_of(geometry: Geometry, number: int = 4) -> dict[str, Array]:
    """Scans of a few textured blobs, of sizes that differ a little."""
    spacing = (geometry.slices_mm, *geometry.spacing[-2:])
    made = {}
    for index in range(number):
        rng = np.random.default_rng(index)
        shape = tuple(n + int(rng.integers(0, 3)) for n in geometry.shape)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
        blobs = [np.exp(-((grid - rng.uniform(-0.6, 0.6, 3)) ** 2).sum(-1) / 0.2) for _ in range(4)]
        image = np.stack([sum(blobs) * (-1) ** c + rng.normal(0, 0.1, shape) for c in range(geometry.channels)])
        made[f"v{index}"] = Array(image, f"v{index}", spacing=spacing)
    return made


def build(name: str, geometry: Geometry, pool: list[CaseInfo], **settings: Any) -> PretrainMethod:
    """The method with its settings for a CPU, with new weights. Raises PlanError as `plan` does."""
    method, target = load_method(name), target_of(geometry, name)
    config = configure(method.Config, name, method.presets["cpu"], settings)
    spec = method.plan(target, pool, config)
    torch.manual_seed(0)
    network = build_segmentation_network(dict(target.plan), target.configuration, dataset_json(geometry.channels))
    model = method(network, spec, config)  # type: ignore[call-arg]
    model.spec = spec  # type: ignore[assignment]
    for pair in model.momentum_pairs():
        pair.average.requires_grad_(False)
    return model


def batch_of(model: PretrainMethod, scans: dict[str, Array], step: Step, seed: int = 0) -> Batch:
    pool = [scan.info for scan in scans.values()]
    drawn = model.draw(model.spec, pool, np.random.default_rng([seed, 0]), step)
    return model.collate(
        [
            model.sample(model.spec, scans[case], parameters, np.random.default_rng([seed, 1 + position]))  # type: ignore[arg-type]
            for position, (case, parameters) in enumerate(drawn)
        ]
    )


@cache
def built(name: str, kind: str) -> tuple[PretrainMethod, dict[str, Array]] | PlanError:
    """The method on a kind of scans, or why not."""
    scans = scans_of(GEOMETRIES[kind])
    try:
        return build(name, GEOMETRIES[kind], [scan.info for scan in scans.values()]), scans
    except PlanError as error:
        return error


def stages_of(model: PretrainMethod) -> list[tuple[Any, Step]]:
    """Each phase with its first step."""
    return [(phase, Step(phase.stage.name, 0, phase.steps, phase.first_step)) for phase in phases(model.stages(), 100)]


@every_method
@pytest.mark.parametrize("kind", GEOMETRIES)
def test_every_geometry_works_or_is_refused_with_a_remedy(name: str, kind: str) -> None:
    if len(GEOMETRIES[kind].patch) not in entry(name).dims:
        pytest.skip("the catalog says so, and the loop refuses it")
    result = built(name, kind)
    if isinstance(result, PlanError):
        assert "to fix" in str(result)
        return
    model, scans = result
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim == 1:  # nnU-Net begins with residual branches that give nothing
            nn.init.ones_(parameter)
    shapes = []
    export = model.export()
    encoder = export.module if export.scope == "encoder" else encoder_of(export.module)
    seen = getattr(encoder, "vit", encoder)  # PUMIT's encoder is for one DA, the transformer in it for all
    hook = seen.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    learnable = [p for p in model.parameters() if p.requires_grad]
    for phase, step in stages_of(model):
        prepare_stage(model, phase.stage, learnable)
        batch = batch_of(model, scans, step)
        terms = model.backward(batch, step, lambda loss: loss.backward())
        assert torch.isfinite(terms["loss"])
        assert {term for term in terms if term.startswith("acc")} <= model.chance().keys()
    hook.remove()
    stride = target_of(GEOMETRIES[kind], name).encoder.total_stride
    assert all(n % s == 0 for shape in shapes for n, s in zip(shape[2:], stride, strict=True))
    assert {shape[1] for shape in shapes} == {GEOMETRIES[kind].channels}
    # A bias in front of a norm has no effect and so no gradient to speak of; kernels must all have one.
    kernels = [p for p in encoder.parameters() if p.ndim > 1 and p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in kernels)
    assert figure_has_content(model.eval().picture(batch))


def figure_has_content(figure: Any) -> bool:
    return len(figure.axes) > 1 and any(axis.has_data() for axis in figure.axes)


@every_method
def test_scans_of_nothing_give_a_loss_that_is_a_number(name: str) -> None:
    model = build(name, GEOMETRIES["two channels"], [s.info for s in scans_of(GEOMETRIES["two channels"]).values()])
    air = {key: Array(0 * scan.voxels, key) for key, scan in scans_of(GEOMETRIES["two channels"]).items()}
    for _, step in stages_of(model):
        terms = model.backward(batch_of(model, air, step), step, lambda loss: loss.backward())
        assert torch.isfinite(terms["loss"])
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_method
def test_measuring_changes_nothing_and_gives_the_same_twice(name: str) -> None:
    result = built(name, "two channels")
    assert not isinstance(result, PlanError)
    model, scans = result
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _, step in stages_of(model):
        batch = batch_of(model, scans, step)
        with torch.no_grad():
            first, second = (model.loss(batch, step) for _ in range(2))
            model.picture(batch)
        assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in second.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@every_method
def test_one_batch_can_be_learned(name: str) -> None:
    """Each stage lowers its loss on the batch it sees again and again."""
    scans = scans_of(GEOMETRIES["two channels"])
    model = build(name, GEOMETRIES["two channels"], [scan.info for scan in scans.values()])
    learnable = [p for p in model.parameters() if p.requires_grad]
    for phase, first in stages_of(model):
        prepare_stage(model, phase.stage, learnable)
        optimizer = build_optimizer(phase.stage, model.parameter_groups(phase.stage))
        batch, losses = batch_of(model, scans, first), []
        for index in range(25):
            step = replace(first, index=index, global_index=first.global_index + index)
            optimizer.zero_grad()
            terms = model.backward(batch, step, lambda loss: loss.backward())
            optimizer.step()
            update_averages(model.momentum_pairs(), step)
            with torch.no_grad():
                model.after_step(batch, terms, step)
            losses.append(float(terms["loss"]))
        print(name, phase.stage.name, [round(loss, 3) for loss in losses[::4]])
        assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.1 * abs(np.mean(losses[:3]))


# Through the loop -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = dict(os.environ)
    root = make_home(tmp_path_factory.mktemp("methods") / "root")
    write_json(plan_path(DATASET, PLAN), plan_of("pumit", tiny_plan())[0])
    os.environ.clear()
    os.environ.update(before)
    return root


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    return copy_home(prepared, tmp_path / "root")


def run(name: str, **options: Any) -> Path:
    return pretrain(DATASET, method=name, plan=PLAN, device="cpu", **{"workers": 0, "steps": 4, **options})


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """As if SIGTERM came during the given step."""

    @contextlib.contextmanager
    def counting() -> Iterator[Callable[[], int]]:
        asked = iter(range(1, 1000))
        yield lambda: 15 if next(asked) == steps else 0

    monkeypatch.setattr(training, "stop_signal", counting)


@every_method
def test_a_run_equals_its_parts_fits_the_network_and_leaves_a_picture(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = run(name)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            run(name, run="parts")
    parts = run(name, run="parts", workers=2)  # nor does the number of workers change the views
    for column in ("loss", "held_out_loss"):
        values = [[row[column] for row in csv.DictReader((f / "progress.csv").open())] for f in (whole, parts)]
        assert values[0] == values[1]
        assert len(values[0]) >= 4
    states = [torch.load(folder / "state.pt", weights_only=True)["method"] for folder in (whole, parts)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    (tensors, card), (others, _) = load_encoder(whole), load_encoder(parts)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in tensors.items())

    network = build_segmentation_network(*plan_of(name, tiny_plan()), dataset_json())
    report = transfer(tensors, network if card.scope == "encoder+decoder" else encoder_of(network))
    assert report.encoder_share == 1
    assert not report.unused
    assert all(value["chance"] is not None for key, value in card.metrics.items() if key.startswith("acc"))
    picture = imread(whole / "views.png")
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.05


@every_method
def test_views_are_the_same_for_the_same_seed_whatever_the_workers(home: Path, name: str) -> None:
    pool = build_pool(load_dataset(DATASET), tiny_plan(), "3d_fullres", workers=0)
    model = build(name, GEOMETRIES["two channels"], list(pool.cases))

    def first_batches(workers: int, seed: int = 0, stream: int = LEARNING) -> list[Batch]:
        return list(load(batches(model, pool, seed, stream), 1, workers=workers, pin=False))

    alone, shared = first_batches(0), first_batches(2)
    assert len(alone) == 2
    assert all(equal(a, b) for a, b in zip(alone, shared, strict=True))
    assert not equal(*alone)
    assert not equal(alone[0], first_batches(0, seed=1)[0])
    assert not equal(alone[0], first_batches(0, stream=HELD_OUT)[0])


def batches(model: PretrainMethod, pool: Pool, seed: int, stream: int) -> Batches:
    return Batches(
        type(model),
        model.spec,
        pool,
        seed=seed,
        stream=stream,
        rank=0,
        stage=model.stages()[0].name,
        first_step=0,
        steps=3,
        accumulate=1,
    )


def equal(a: Batch, b: Batch) -> bool:
    """Every tensor of two batches."""
    assert a.keys() == b.keys()
    return all(torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key] for key, value in a.items())


# Two processes --------------------------------------------------------------------------------------------------------


def of_two_ranks(name: str) -> PretrainMethod:
    """The same model in each process."""
    return build(
        name, GEOMETRIES["two channels"], [scan.info for scan in scans_of(GEOMETRIES["two channels"]).values()]
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All methods in two processes, once: starting these costs more than the methods."""
    place = tmp_path_factory.mktemp("ranks")
    scans = scans_of(GEOMETRIES["two channels"], 8)
    for name in NAMES:
        model = of_two_ranks(name).eval()
        _, step = stages_of(model)[0]
        two = [batch_of(model, dict(list(scans.items())[4 * r : 4 * r + 4]), step, seed=r) for r in range(2)]
        torch.save({"step": dataclasses.asdict(step), "batches": two}, place / f"{name}.pt")
    multiprocessing.spawn(one_rank, args=(str(place),), nprocs=2)
    return place


def one_rank(rank: int, place: str) -> None:
    """The backward pass of each method on one of its two batches; leaves the loss and the averaged gradients in `place`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    for name in NAMES:
        model = of_two_ranks(name).eval()
        model.gather = gather
        task = torch.load(f"{place}/{name}.pt", weights_only=True)
        terms = model.backward(task["batches"][rank], Step(**task["step"]), lambda loss: loss.backward())
        average_gradients(model.parameters())
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        torch.save({"loss": terms["loss"].detach(), "gradients": gradients}, f"{place}/{name}_{rank}.pt")
    torch.distributed.destroy_process_group()


@every_method
def test_two_processes_learn_what_one_would_from_both_batches(two_ranks: Path, name: str) -> None:
    """Means over samples are averaged; terms of gathered tensors have the value and the gradient of the joint batch."""
    task = torch.load(two_ranks / f"{name}.pt", weights_only=True)
    model = of_two_ranks(name).eval()
    expected = joint_terms(model, task["batches"], Step(**task["step"]))
    (sum(terms["loss"] for terms in expected) / 2).backward()
    wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        found = torch.load(two_ranks / f"{name}_{rank}.pt", weights_only=True)
        assert float(found["loss"]) == pytest.approx(float(expected[rank]["loss"]), rel=1e-5)
        assert found["gradients"].keys() == wanted.keys()
        flat, reference = (torch.cat([d[key].flatten() for key in wanted]) for d in (found["gradients"], wanted))
        assert float((flat - reference).norm()) < 1e-4 * float(reference.norm())
        assert float(reference.norm()) > 0


def joint_terms(model: PretrainMethod, two: list[Batch], step: Step) -> list[dict[str, Tensor]]:
    """The terms of two ranks in one process and one graph: two threads that exchange what they gather."""
    meet, slots = threading.Barrier(2), [torch.empty(0)] * 2
    place = threading.local()
    terms: list[Any] = [None, None]

    def exchange(tensor: Tensor) -> Tensor:
        slots[place.rank] = tensor
        meet.wait(60)
        both = torch.cat(slots)
        meet.wait(60)
        return both

    def rank(number: int) -> None:
        place.rank = number
        try:
            terms[number] = model.loss(two[number], step)
        except BaseException:
            meet.abort()
            raise

    model.gather = exchange
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return terms
