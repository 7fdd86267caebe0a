"""Every method of the catalog through the loop: a run and its parts, what it leaves, and its views in workers."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from planners import paths
from planners.dataset import load_dataset
from pretrain import training
from pretrain.batches import HELD_OUT, LEARNING, Batches, load
from pretrain.catalog import entry, load_method
from pretrain.checkpoint import load_encoder
from pretrain.encoders import encoder_of
from pretrain.loop import pretrain
from pretrain.method import Batch, PretrainMethod
from pretrain.pools import build_pool
from pretrain.transfer import transfer
from pretrain.volumes import Pool
from tests.geometries import GEOMETRIES, SMALLER, build, every_method, network_of, target_of
from tests.stubs import PLAN, make_home
from tests.tiny import DATASET, write_tiny_plan

STEPS = 4


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny dataset for each kind of scans, made once: runs have folders of their own in it."""

    @cache
    def home(kind: str) -> Path:
        return make_home(tmp_path_factory.mktemp("home"), channels=GEOMETRIES[kind].channels)

    return home


@pytest.fixture
def enter(homes: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Point all paths at the dataset of a kind, with the plan of a method; measure on few batches, to save time."""
    monkeypatch.setattr(training, "_HELD_OUT_BATCHES", 2)

    def go(name: str, kind: str) -> None:
        paths.configure(homes(kind))
        write_tiny_plan(dict(target_of(name, kind).plan))

    return go


def run(name: str, kind: str, **options: Any) -> Path:
    """The folder of a run; one that is finished already is left alone, so tests share it."""
    configuration = target_of(name, kind).configuration
    settings = {f"{name}.{key}": value for key, value in SMALLER.get(name, {}).items()}
    given = {"workers": 0, "steps": STEPS, "settings": settings, **options}
    return pretrain(DATASET, method=name, plan=PLAN, configuration=configuration, device="cpu", **given)


def pool_of(name: str, kind: str) -> Pool:
    target = target_of(name, kind)
    configuration = load_method(name).data_configuration(target)
    return build_pool(load_dataset(DATASET), dict(target.plan), configuration, workers=0)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """As if SIGTERM came during the given step."""

    @contextlib.contextmanager
    def counting() -> Iterator[Callable[[], int]]:
        asked = iter(range(1, 1000))
        yield lambda: 15 if next(asked) == steps else 0

    monkeypatch.setattr(training, "stop_signal", counting)


@every_method
def test_a_run_equals_its_parts(enter: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    enter(name, "two channels")
    whole = run(name, "two channels")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            run(name, "two channels", run="parts")
    parts = run(name, "two channels", run="parts", workers=2)  # nor does the number of workers change the views
    for column in ("loss", "held_out_loss"):
        values = [[row[column] for row in csv.DictReader((f / "progress.csv").open())] for f in (whole, parts)]
        assert values[0] == values[1]
        assert len(values[0]) >= STEPS
    states = [torch.load(folder / "state.pt", weights_only=True)["method"] for folder in (whole, parts)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    tensors, others = (load_encoder(folder)[0] for folder in (whole, parts))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in tensors.items())


@every_method
@pytest.mark.parametrize("kind", ["two channels", "2d"])
def test_a_run_exports_what_it_trained(enter: Callable[[str, str], None], kind: str, name: str) -> None:
    """The encoder in the network of the plan has the features of the method in the saved state, and not those of step 0."""
    if GEOMETRIES[kind].dims not in entry(name).dims:
        pytest.skip("the catalog says so, and the loop refuses it")
    enter(name, kind)
    folder = run(name, kind)
    tensors, card = load_encoder(folder)
    cases = [case for case in pool_of(name, kind).cases if case.id in card.cases]
    target = target_of(name, kind)
    model = build(name, target, cases, steps=STEPS)
    export = model.export()
    start = export.module.state_dict()
    assert not [key for key, value in tensors.items() if value.ndim > 1 and torch.equal(value, start[key])]
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["method"])

    whole, network = card.scope == "encoder+decoder", network_of(target).eval()
    report = transfer(tensors, network if whole else encoder_of(network))
    assert report.encoder_share == 1
    assert not report.unused
    kept = (encoder_of(export.module) if whole else export.module).eval()
    image = torch.randn(1, target.encoder.channels, *(2 * s for s in target.encoder.total_stride))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(encoder_of(network)(image), kept(image), strict=True))


@every_method
def test_a_run_leaves_a_picture_and_says_what_chance_is(enter: Callable[[str, str], None], name: str) -> None:
    enter(name, "two channels")
    folder = run(name, "two channels")
    card = load_encoder(folder)[1]
    assert all(value["chance"] is not None for key, value in card.metrics.items() if key.startswith("acc"))
    picture = imread(folder / "views.png")
    assert min(picture.shape[:2]) > 200
    assert picture[..., :3].std() > 0.05


@every_method
def test_views_are_the_same_for_the_same_seed_whatever_the_workers(
    enter: Callable[[str, str], None], name: str
) -> None:
    enter(name, "two channels")
    pool = pool_of(name, "two channels")
    model = build(name, target_of(name, "two channels"), list(pool.cases))

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
