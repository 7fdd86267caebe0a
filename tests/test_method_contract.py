"""The contract holds methods of every kind: tiny stand-ins for what the published ones need."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import multiprocessing, nn

from planners.dataset import load_dataset
from planners.errors import SettingsError
from pretrain import distributed
from pretrain.batches import LEARNING, Batches
from pretrain.catalog import METHODS, entry, load_method, settings_table
from pretrain.checkpoint import load_encoder
from pretrain.method import Batch, Export, MomentumPair, ParameterGroup, PretrainMethod, Stage, Step, Terms
from pretrain.optimise import phases, rate_factor, update_averages
from pretrain.pools import build_pool
from pretrain.schedule import Schedule
from pretrain.settings import configure, describe
from pretrain.volumes import CaseInfo, Volume
from tests.gathering import MEASURED, data, joint_term, one_process
from tests.stubs import Stub, copy_home, make_home, run_stub, use_method
from tests.tiny import DATASET, tiny_plan


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = dict(os.environ)
    root = make_home(tmp_path_factory.mktemp("contract") / "root")
    os.environ.clear()
    os.environ.update(before)
    return root


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    return copy_home(prepared, tmp_path / "root")


class OneAnisotropyPerBatch(Stub):
    """As PUMIT: kernels depend on the degree of anisotropy, so a batch has one; the crop's depth follows from it."""

    seen: ClassVar[list[tuple[int, tuple[int, ...]]]] = []

    @staticmethod
    def draw(spec: Any, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, Any]]:
        degree = int(rng.integers(0, 2))
        size = (spec[0] * 2 >> degree, *spec[1:])
        return [(case, size) for case, _ in Stub.draw(spec, pool, rng, step)]

    @staticmethod
    def collate(samples: list[dict[str, np.ndarray]]) -> Batch:
        depths = {sample["crop"].shape[1] for sample in samples}
        assert len(depths) == 1
        return {**Stub.collate(samples), "depth": depths.pop()}

    def loss(self, batch: Batch, step: Step) -> Terms:
        if self.training:
            self.seen.append((batch["depth"], tuple(batch["crop"].shape)))
        return super().loss(batch, step)


def test_a_batch_shares_one_degree_of_anisotropy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, OneAnisotropyPerBatch)
    run_stub(steps=8)
    assert len(OneAnisotropyPerBatch.seen) == 8
    assert len({depth for depth, _ in OneAnisotropyPerBatch.seen}) == 2
    assert all(shape[2] == depth for depth, shape in OneAnisotropyPerBatch.seen)


class SizesThatChange(Stub):
    """As MedDINOv3's third stage: each step draws one of several sizes, here by its index."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    @staticmethod
    def draw(spec: Any, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, Any]]:
        larger = (spec[0], 2 * spec[1], spec[2])
        return [(case, larger if step.index % 2 else spec) for case, _ in Stub.draw(spec, pool, rng, step)]

    def loss(self, batch: Batch, step: Step) -> Terms:
        if self.training:
            self.seen.append(tuple(batch["crop"].shape[2:]))
        return super().loss(batch, step)


def test_sizes_may_change_from_step_to_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, SizesThatChange)
    run_stub(steps=4)
    assert [size[1] for size in SizesThatChange.seen] == [8, 16, 8, 16]


class TwoStages(Stub):
    """As PUMIT's tokenizer and masked prediction: the first module learns with SGD, then stands still for the second."""

    seen: ClassVar[list[tuple[str, int, int, int, bool, float, float]]] = []

    def stages(self) -> Sequence[Stage]:
        return [
            Stage("heads", share=1, optimizer="sgd", learning_rate=0.1, weight_decay=0, schedule="constant", warm_up=0),
            Stage("encoder", share=2, optimizer="adam", learning_rate=0.01, frozen=("head",), clip_norm=None),
        ]

    def parameter_groups(self, stage: Stage) -> Sequence[ParameterGroup]:
        if stage.name == "heads":
            return [ParameterGroup(list(self.head.parameters()))]
        stem, rest = list(self.encoder.stem.parameters()), list(self.encoder.stages.parameters())
        return [ParameterGroup(stem, scale=lambda step: float(step.index > 0)), ParameterGroup(rest, scale=0.5)]

    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        self.seen.append(
            (
                step.stage,
                step.index,
                step.total,
                step.global_index,
                self.head.training,
                float(self.head.weight.sum()),
                float(next(self.encoder.stem.parameters()).sum()),
            )
        )


def test_stages_have_their_own_optimisers_and_frozen_modules(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, TwoStages)
    TwoStages.seen.clear()
    run_stub(steps=6)
    assert [row[:4] for row in TwoStages.seen] == [
        ("heads", 0, 2, 0),
        ("heads", 1, 2, 1),
        ("encoder", 0, 4, 2),
        ("encoder", 1, 4, 3),
        ("encoder", 2, 4, 4),
        ("encoder", 3, 4, 5),
    ]
    training, head, stem = ([row[i] for row in TwoStages.seen] for i in (4, 5, 6))
    assert training == [True, True, False, False, False, False]
    assert len(set(head)) == 2  # learns in the first stage only
    assert stem[0] == stem[1] == stem[2]  # starts one step late in the second stage
    assert len(set(stem[2:])) == 4


def test_chosen_stages_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, TwoStages)
    TwoStages.seen.clear()
    run_stub(steps=3, stages="2")
    assert [row[0] for row in TwoStages.seen] == ["encoder"] * 3
    with pytest.raises(SettingsError, match="No such stage"):
        run_stub(steps=3, stages="tokenizer", run="other")


class InParts(Stub):
    """As PCRL: the graph is too large for one piece, so the features' gradients are collected and sent on at the end."""

    def backward(self, batch: Batch, step: Step, run: Callable[[torch.Tensor], None]) -> Terms:
        features = self.encoder(batch["crop"])
        leaves = [feature.detach().requires_grad_() for feature in features]
        total = torch.zeros(())
        for number, mean in enumerate(batch["mean"]):
            pooled = torch.cat([leaf[number].flatten(1).mean(1) for leaf in leaves])
            part = (self.head(pooled)[0] - mean) ** 2 / len(batch["mean"])
            run(part)
            total = total + part.detach()
        torch.autograd.backward(features, [leaf.grad for leaf in leaves])
        return {"loss": total}


def test_an_own_backward_learns_the_same(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for number, method in enumerate((Stub, InParts)):
        use_method(monkeypatch, method)
        results.append(load_encoder(run_stub(steps=3, run=f"r{number}"))[0])
    assert results[0].keys() == results[1].keys()
    assert all(torch.allclose(a, results[1][name], atol=1e-5) for name, a in results[0].items())


class TwoParts(Stub):
    """Calls `run` twice a step."""

    def backward(self, batch: Batch, step: Step, run: Callable[[torch.Tensor], None]) -> Terms:
        parts = []
        for crop, mean in zip(batch["crop"], batch["mean"], strict=True):
            part = (self.predict(crop[None])[0] - mean) ** 2 / len(batch["crop"])
            run(part)
            parts.append(part.detach())
        return {"loss": torch.stack(parts).sum()}


class SameCrops(Stub):
    """The same batch at every step."""

    @staticmethod
    def draw(spec: Any, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, Any]]:
        return [(case.id, spec) for case in pool[:2]]

    @staticmethod
    def sample(spec: Any, case: Volume, parameters: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return Stub.sample(spec, case, parameters, np.random.default_rng(0))

    def stages(self) -> Sequence[Stage]:
        return [replace(super().stages()[0], clip_norm=None)]


class SameCropsTwice(SameCrops):
    """Two batches a step."""

    def stages(self) -> Sequence[Stage]:
        return [replace(super().stages()[0], accumulate=2)]


@pytest.mark.parametrize("pair", [(Stub, TwoParts), (SameCrops, SameCropsTwice)])
def test_parts_add_up_and_batches_of_a_step_are_averaged(
    home: Path, monkeypatch: pytest.MonkeyPatch, pair: tuple[type[Stub], type[Stub]]
) -> None:
    results = []
    for number, method in enumerate(pair):
        use_method(monkeypatch, method)
        results.append(load_encoder(run_stub(steps=3, run=f"r{number}"))[0])
    assert all(torch.allclose(a, results[1][name], atol=1e-5) for name, a in results[0].items())


def test_every_batch_has_random_numbers_of_its_own(home: Path) -> None:
    pool = build_pool(load_dataset(DATASET), tiny_plan(), "3d_fullres", workers=0)

    def crops(rank: int, seed: int = 0, first_step: int = 0) -> list[bytes]:
        batches = Batches(
            SameCropsElsewhere,
            (2, 8, 8),
            pool,
            seed=seed,
            stream=LEARNING,
            rank=rank,
            stage="main",
            first_step=first_step,
            steps=5,
            accumulate=2,
        )
        return [sample.numpy().tobytes() for number in range(10) for sample in batches[number]["crop"]]

    everything = [*crops(0), *crops(1), *crops(0, seed=1), *crops(0, first_step=5)]
    assert len(set(everything)) == len(everything) == 80
    assert crops(0) == crops(0)
    assert crops(0, first_step=2)[:12] == crops(0)[8:]  # numbers go with the step of the run, not of the stage


class SameCropsElsewhere(SameCrops):
    """The same cases, each time at another place."""

    sample = staticmethod(Stub.sample)


class WithTeacherAndQueue(Stub):
    """As PCRL: a momentum copy, and a queue that changes after the step only."""

    queue: torch.Tensor
    lengths: ClassVar[list[int]] = []
    previous: torch.Tensor | None = None

    def __init__(self, network: nn.Module, spec: Any, config: Any) -> None:
        super().__init__(network, spec, config)
        self.teacher = nn.Linear(self.head.in_features, 1)
        self.teacher.load_state_dict(self.head.state_dict())
        self.start = self.teacher.weight.detach().clone()
        self.register_buffer("queue", torch.zeros(8))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def momentum_pairs(self) -> Sequence[MomentumPair]:
        return [MomentumPair(self.head, self.teacher, lambda step: 0.5 + 0.1 * step.index)]

    def loss(self, batch: Batch, step: Step) -> Terms:
        predicted = self.predict(batch["crop"])
        terms = {"loss": ((predicted - batch["mean"]) ** 2).mean(), "keys": predicted.detach()}
        terms["queued"] = self.filled.float()
        return terms

    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        self.queue[: len(terms["keys"])] = terms["keys"]
        self.filled += len(terms["keys"])
        self.lengths.append(int(self.filled))
        before = self.previous if self.previous is not None else self.start
        momentum = 0.5 + 0.1 * step.index
        assert torch.allclose(self.teacher.weight, momentum * before + (1 - momentum) * self.head.weight)
        assert not torch.equal(self.teacher.weight, before)
        self.previous = self.teacher.weight.clone()
        assert not self.teacher.training
        assert not self.teacher.weight.requires_grad


class Steep(Stub):
    """One step of a gradient that is far too large."""

    clipped: ClassVar[tuple[str, ...]] = ()

    def stages(self) -> Sequence[Stage]:
        plain = {"optimizer": "sgd", "learning_rate": 1.0, "betas": (0.0, 0.0), "weight_decay": 0.0, "warm_up": 0.0}
        return [Stage("main", clip_norm=0.1, clip_apart=self.clipped, schedule="constant", **plain)]  # type: ignore[arg-type]

    def loss(self, batch: Batch, step: Step) -> Terms:
        return {"loss": 1e3 * super().loss(batch, step)["loss"]}

    def export(self) -> Export:
        return Export(self.encoder, "encoder", {"head": self.head})


@pytest.mark.parametrize(
    ("clipped", "norms"), [((), {"both": 0.1}), (("encoder", "head"), {"encoder": 0.1, "head": 0.1})]
)
def test_gradients_are_limited_together_or_part_by_part(
    home: Path, monkeypatch: pytest.MonkeyPatch, clipped: tuple[str, ...], norms: dict[str, float]
) -> None:
    """As MedDINOv3, which limits backbone and heads separately: the step of plain gradient descent is the gradient."""
    monkeypatch.setattr(Steep, "clipped", clipped)
    use_method(monkeypatch, Steep)
    begun: dict[str, dict[str, torch.Tensor]] = {}

    def remember(method: Any, stage: Stage) -> Sequence[ParameterGroup]:
        for name in ("encoder", "head"):
            begun.setdefault(
                name, {key: value.clone() for key, value in method.get_submodule(name).state_dict().items()}
            )
        return [ParameterGroup(list(method.parameters()))]

    monkeypatch.setattr(Steep, "parameter_groups", remember)
    folder = run_stub(steps=1)
    ended = {name: load_file(folder / f"{name}.safetensors") for name in ("encoder", "head")}
    moved = {
        name: float(torch.cat([(ended[name][k] - begun[name][k]).flatten() for k in ended[name]]).norm())
        for name in ended
    }
    moved["both"] = (moved["encoder"] ** 2 + moved["head"] ** 2) ** 0.5
    assert {name: moved[name] for name in norms} == pytest.approx(norms, rel=1e-3)


def test_queues_change_after_steps_and_not_on_held_out_batches(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_method(monkeypatch, WithTeacherAndQueue)
    folder = run_stub(steps=4)
    assert WithTeacherAndQueue.lengths == [2, 4, 6, 8]
    assert "queued" in (folder / "progress.csv").read_text()
    assert "keys" not in (folder / "progress.csv").read_text()


def test_averages_follow_with_the_momentum_of_the_step() -> None:
    online, average = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    nn.init.constant_(online.weight, 2.0)
    online.running_mean += 5  # type: ignore[operator]
    for copied in (True, False):
        nn.init.constant_(average.weight, 1.0)
        average.running_mean.zero_()  # type: ignore[union-attr]
        pair = MomentumPair(online, average, lambda step: 0.999, copied)
        update_averages([pair], Step("main", 0, 1, 0))
        assert float(average.weight) == pytest.approx(1.001)
        update_averages([pair], Step("main", 0, 1, 0))
        assert float(average.weight) == pytest.approx(1.001999)
        assert float(average.running_mean) == (5 if copied else 0)  # type: ignore[arg-type]


# Several processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    place = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(one_process, args=(str(place),), nprocs=2)
    return [torch.load(place / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_gathered_term_equals_the_joint_batch(two_processes: list[dict[str, Any]]) -> None:
    x, model = data()
    z = model(x)
    (joint_term(z) + (z**2).mean()).backward()
    for found in two_processes:
        assert float(found["joint"]) == pytest.approx(float(joint_term(z)), abs=1e-12)
        for name, parameter in model.named_parameters():
            assert torch.allclose(found["gradients"][name], parameter.grad, atol=1e-12)  # type: ignore[arg-type]
        assert float(found["gradients"]["only_here"]) == 0.5
        assert found["gradients"]["nowhere"] is None


def test_a_number_is_averaged_over_the_processes_that_have_it(two_processes: list[dict[str, Any]]) -> None:
    assert [found["means"] for found in two_processes] == [{"everywhere": 2.0, "first": 4.0, "last": 5.0}] * 2


def test_one_process_gathers_itself() -> None:
    x = torch.ones(3)
    assert distributed.gather(x) is x
    assert distributed.mean(MEASURED[0], torch.device("cpu")) == MEASURED[0]


# Schedules and settings ---------------------------------------------------------------------------------------------------


def test_steps_are_shared_out_among_stages() -> None:
    stages = [Stage("a", 0.1), Stage("b", 0.8), Stage("c", 0.1)]
    assert [(p.first_step, p.steps) for p in phases(stages, 100)] == [(0, 10), (10, 80), (90, 10)]
    assert [(p.first_step, p.steps) for p in phases(stages, 3)] == [(0, 1), (1, 1), (2, 1)]
    assert [p.stage.name for p in phases(stages, 10, ["1", "c"])] == ["a", "c"]
    with pytest.raises(SettingsError):
        phases(stages, 2)


def test_rates_rise_and_fall() -> None:
    stage = Stage("a", warm_up=0.1)
    factors = [rate_factor(stage, Step("a", i, 100, i)) for i in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.001
    assert rate_factor(Stage("a", warm_up=0, schedule="constant"), Step("a", 99, 100, 99)) == 1


def test_a_schedule_may_be_a_function_of_what_is_done_after_the_warm_up() -> None:
    stage = Stage("main", warm_up=0.2, schedule=lambda done: 1 - done)
    assert [rate_factor(stage, Step("main", i, 10, i)) for i in (0, 1, 2, 6)] == pytest.approx([0.5, 1, 1, 0.5])


def test_a_schedule_is_a_stage() -> None:
    chosen = {"learning_rate": 0.1, "weight_decay": 0.2, "warm_up": 0.3}
    assert Schedule(steps=7, **chosen).stage(4, None) == Stage("main", **chosen, clip_norm=None, accumulate=4)
    assert Schedule(**chosen).stage(1) == Stage("main", **chosen, clip_norm=1.0)


def test_unknown_methods_and_settings_are_named() -> None:
    with pytest.raises(SettingsError, match="Did you mean 'voco'"):
        entry("vocco")
    config = load_method("voco").Config
    assert configure(config, "voco", {"steps": "7", "grid": "1,3,3"}).grid == (1, 3, 3)
    assert configure(config, "voco", {"grid": "none", "clip_norm": "none"}).clip_norm is None
    with pytest.raises(SettingsError, match=r"voco\.gird"):
        configure(config, "voco", {"gird": "1,3,3"})
    with pytest.raises(SettingsError, match=r"voco\.steps") as error:
        configure(config, "voco", {"steps": "many", "momentum": "2"})
    assert "voco.momentum" in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_explains_each_setting_and_has_both_presets(name: str) -> None:
    method: type[PretrainMethod] = load_method(name)
    assert set(method.presets) >= {"default", "cpu"}
    table = settings_table(name)
    assert [row[0] for row in table] == [f"{name}.{key}" for key in describe(method.Config)]
    assert f"{name}.steps" in [row[0] for row in table]
    assert all(row[3] for row in table)
