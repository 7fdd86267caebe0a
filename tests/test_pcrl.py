"""PCRL's losses, parts and gradients. Values: by hand, or of the authors' functions (specification of PCRL, §4)."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from planners.errors import PlanError, SettingsError
from pretrain.checkpoint import load_encoder, save_encoder
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.method import Step, Target
from pretrain.methods.pcrl import PCRL, PCRLConfig, PCRLSpec, local_size, queue_size
from pretrain.methods.pcrl_parts import (
    KeyQueue,
    RunningNorm,
    TransAtt,
    explained,
    info_nce,
    mean_similarity,
    noise_contrast,
)
from pretrain.methods.pcrl_pyramid import Predictor, comparison, fading
from pretrain.methods.pcrl_three import mixed
from pretrain.optimise import build_optimizer, prepare_stage, update_averages
from pretrain.settings import configure
from pretrain.transfer import transfer
from tests.test_checkpoint import card
from tests.test_voco import Array
from tests.tiny import dataset_json, tiny_plan

STEP = Step("main", 3, 10, 3)
MODES = ("paper", "official", "v2")


def blobs(name: str, channels: int = 1, shape: tuple[int, ...] = (11, 29, 23)) -> Array:
    """A volume with something to see in it."""
    rng = np.random.default_rng(len(name) + ord(name[0]))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    voxels = np.stack([np.sin(3 * np.tensordot(rng.normal(size=len(shape)), grid, 1)) for _ in range(channels)])
    return Array(voxels + rng.normal(0, 0.1, voxels.shape), name)


def target_of(channels: int = 1, dims: int = 3) -> Target:
    plan, configuration = tiny_plan(dims=dims, channels=channels), "3d_fullres" if dims == 3 else "2d"
    return Target(plan, configuration, encoder_info(plan, configuration, dataset_json(channels)))


def network_of(channels: int = 1, dims: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    plan, configuration = tiny_plan(dims=dims, channels=channels), "3d_fullres" if dims == 3 else "2d"
    return build_segmentation_network(plan, configuration, dataset_json(channels))


def tiny_model(channels: int = 1, dims: int = 3, double: bool = True, **settings: Any) -> PCRL:
    config = PCRLConfig(**{"queue": 8, "embedding": 16, "local_views": 2, "batch": 2, **settings})
    spec = PCRL.plan(target_of(channels, dims), [blobs(n, channels).info for n in "abcde"], config)
    model = PCRL(network_of(channels, dims), spec, config)
    prepare_stage(model, model.stages()[0], [p for p in model.parameters() if p.requires_grad])
    return model.double() if double else model


def batch_of(model: PCRL, seed: int = 0, cases: str = "ab", channels: int = 1) -> dict[str, Tensor]:
    volumes = {name: blobs(name, channels) for name in cases}
    rng = np.random.default_rng(seed)
    drawn = PCRL.draw(model.spec, [v.info for v in volumes.values()], rng, STEP)
    batch = PCRL.collate([PCRL.sample(model.spec, volumes[name], p, rng) for name, p in drawn])  # type: ignore[arg-type]
    double = next(model.parameters()).dtype == torch.float64
    return {k: v.double() if double and v.is_floating_point() else v for k, v in batch.items()}


def with_negatives(model: PCRL, seed: int = 5) -> PCRL:
    """A queue with keys of other cases, and norms that have seen something."""
    generator = torch.Generator().manual_seed(seed)
    task = model.task
    if model.config.mode != "v2":
        keys = nn.functional.normalize(torch.randn(6, model.config.embedding, generator=generator), dim=1)
        task.queue.push(keys, torch.arange(6) + 100)
    for _ in range(2):
        batch = batch_of(model, seed + 1)
        with torch.no_grad():
            model.after_step(batch, model.loss(batch, STEP), STEP)
    return model


def gradients(model: PCRL) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Parts ----------------------------------------------------------------------------------------------------------------


def test_info_nce_on_the_fixed_vectors() -> None:
    """Logits (3, 0, -5, 4): 1.326652; without the last negative 0.048907; equal logits: ln(K + 1)."""
    q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    negatives = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.8, 0.6]])
    counted = torch.ones(1, 3, dtype=torch.bool)
    assert float(info_nce(q, k, negatives, counted, 0.2)) == pytest.approx(1.326652, abs=1e-6)
    counted[0, 2] = False
    assert float(info_nce(q, k, negatives, counted, 0.2)) == pytest.approx(0.048907, abs=1e-6)
    same = k.expand(5, 2)
    assert float(info_nce(q, k, same, torch.ones(1, 5, dtype=torch.bool), 0.2)) == pytest.approx(math.log(6))


def test_the_official_contrast_on_the_fixed_scores() -> None:
    """Scores (0.5, 0.1, 0.2), 10 images: 1.435157."""
    loss = noise_contrast(
        torch.tensor([0.5]), torch.tensor([[0.1, 0.2]]), torch.ones(1, 2, dtype=torch.bool), images=10
    )
    assert float(loss) == pytest.approx(1.435157, abs=1e-6)


def test_the_queue_wraps_around_and_survives_a_save() -> None:
    queue = KeyQueue(5, 2)
    queue.push(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
    assert (int(queue.pointer), queue.filled) == (3, 3)
    queue.push(torch.arange(8.0).view(4, 2), torch.tensor([7, 8, 9, 10]))
    assert (int(queue.pointer), queue.filled) == (2, 5)
    assert queue.cases.tolist() == [9, 10, 0, 7, 8]  # slots 3, 4, 0, 1
    assert queue.keys[[3, 4, 0, 1]].flatten().tolist() == list(range(8))
    other = KeyQueue(5, 2)
    other.load_state_dict(queue.state_dict())
    assert (int(other.pointer), other.cases.tolist()) == (2, queue.cases.tolist())


def test_keys_of_the_own_case_and_empty_slots_are_no_negatives() -> None:
    queue = KeyQueue(4, 2)
    queue.push(torch.ones(2, 2), torch.tensor([3, 3]))
    counted = queue.counted(torch.tensor([3, 4]), mask_same_case=True)
    assert counted.tolist() == [[False] * 4, [True, True, False, False]]
    alone = info_nce(torch.ones(1, 2), torch.ones(1, 2), queue.keys, counted[:1], 0.2)
    assert float(alone) == 0
    assert queue.counted(torch.tensor([3]), mask_same_case=False).tolist() == [[True, True, False, False]]
    queue.push(torch.ones(1, 2), torch.tensor([-1]))  # a view that shows nothing
    assert not queue.counted(torch.tensor([4]), mask_same_case=True)[0, 2]


def test_transatt_gates() -> None:
    gate = TransAtt(7, 512)
    assert sum(p.numel() for p in gate.parameters()) == 133_632
    gate = TransAtt(7, 4)
    x, code = torch.randn(2, 4, 3, 3, 3), torch.randn(2, 7)
    nn.init.zeros_(gate.layers[2].weight)
    nn.init.zeros_(gate.layers[2].bias)
    assert torch.equal(gate(x, code), x / 2)
    nn.init.constant_(gate.layers[2].bias, 50.0)
    assert torch.equal(gate(x, code), x)


def test_running_norm_keeps_statistics_of_the_steps_before() -> None:
    norm = RunningNorm(2)
    rows = torch.tensor([[0.0, 2.0], [2.0, 4.0]], requires_grad=True)
    before = norm(rows)
    assert torch.allclose(before, rows, atol=1e-4)
    norm.eval()
    assert int(norm.count) == 0
    norm.update(rows)
    assert norm.mean.tolist() == [1, 3]
    assert torch.allclose(norm(rows), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4)
    (gradient,) = torch.autograd.grad(norm(rows)[0, 0], rows)
    assert torch.allclose(gradient, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), atol=1e-4)  # none through the mean
    norm.update(rows + 2)
    assert norm.mean.tolist() == [2, 4]  # the mean of both
    for _ in range(30):
        norm.update(rows)
    mean = norm.mean.clone()
    norm.update(rows + 20)
    assert torch.allclose(norm.mean - mean, torch.tensor(1.0), atol=0.05)


def test_mixing() -> None:
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.equal(mixed(ones, zeros, torch.tensor(1.0)), ones)
    assert torch.equal(mixed(ones, zeros, torch.tensor(0.0)), zeros)
    assert float(mixed(ones, zeros, torch.tensor(0.75)).mean()) == 0.75


def test_coefficients_are_folded() -> None:
    spec, pool = tiny_model().spec, [blobs("a").info]
    rng = np.random.default_rng(0)
    drawn = np.array([PCRL.draw(spec, pool, rng, STEP)[0][1]["mix"] for _ in range(10_000)])
    assert 0.5 <= drawn.min() <= drawn.max() <= 1
    assert drawn.mean() == pytest.approx(0.75, abs=0.01)


def test_queue_and_local_sizes_follow_the_rules() -> None:
    assert queue_size(2, 0.999) == 1024
    assert [queue_size(1, 0.9), queue_size(64, 0.999)] == [256, 16384]
    assert local_size((96, 96, 96), (32, 32, 32)) == (64, 64, 64)
    assert local_size((256, 64), (16, 16)) == (64, 32)


def test_explained_variance() -> None:
    target = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0))
    variances = target.flatten(1).var(1, correction=0)
    both, one = torch.ones(2), torch.tensor([0.0, 1.0])
    assert float(explained("x", torch.zeros(2), target, both)["explained_x"]) == 1
    assert float(explained("x", variances, target, both)["explained_x"]) == pytest.approx(0, abs=1e-6)
    half = torch.stack([torch.tensor(9.0), variances[1] / 2])
    assert float(explained("x", half, target, one)["explained_x"]) == pytest.approx(0.5)
    assert explained("x", half, target, 0 * one) == {}


# Paper mode -----------------------------------------------------------------------------------------------------------


def test_the_average_follows_and_never_learns() -> None:
    """Every tensor is m · average + (1 - m) · online after a step; no gradient, no place in the optimiser."""
    model = with_negatives(tiny_model(momentum=0.9, queue=32))
    optimizer = build_optimizer(model.stages()[0], model.parameter_groups(model.stages()[0]))
    before = copy.deepcopy([pair.average for pair in model.momentum_pairs()])
    batch = batch_of(model)
    terms = model.backward(batch, STEP, lambda part: part.backward())
    assert all(p.grad is None for pair in model.momentum_pairs() for p in pair.average.parameters())
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in learning for pair in model.momentum_pairs() for p in pair.average.parameters())
    optimizer.step()
    update_averages(model.momentum_pairs(), STEP)
    model.after_step(batch, terms, STEP)
    assert sum(1 for _ in model.task.average.parameters()) > 0
    for old, pair in zip(before, model.momentum_pairs(), strict=True):
        for was, now, online in zip(old.parameters(), pair.average.parameters(), pair.online.parameters(), strict=True):
            assert torch.allclose(now, 0.9 * was + 0.1 * online, atol=1e-12)
    assert int(model.task.queue.filled) == 6 + 2 * 2 + 2


def test_the_momentum_context_teaches_the_decoder_only() -> None:
    model = tiny_model()
    batch = batch_of(model)
    task = model.task
    averaged = task.averaged(batch["input"][:, 1])
    task.restored(task.gated(averaged, batch["codes"][:, 1])).square().mean().backward()
    assert all(p.grad is None for p in task.body.encoder.parameters())
    assert task.body.decoder.stages[0].convs[0].conv.weight.grad.abs().sum() > 0
    assert task.attention.layers[0].weight.grad.abs().sum() > 0


def test_with_one_coefficient_hybrid_and_ordinary_are_equal() -> None:
    model = tiny_model()
    batch = batch_of(model)
    batch["mix"] = torch.ones_like(batch["mix"])
    batch["codes"][:, 2] = batch["codes"][:, 0]
    terms = model.loss(batch, STEP)
    assert float(terms["hybrid"]) == float(terms["ordinary"])
    batch["mix"] = torch.full_like(batch["mix"], 0.5)
    assert float(model.loss(batch, STEP)["hybrid"]) != float(terms["ordinary"])


def test_maps_of_every_level_are_mixed() -> None:
    model = tiny_model()
    batch = batch_of(model)
    maps = [torch.full_like(one, 1.0) for one in model.task.averaged(batch["input"][:, 0])]
    zeros = [torch.zeros_like(one) for one in maps]
    batch["mix"] = torch.full_like(batch["mix"], 0.75)
    context = list(model.task._contexts(batch, maps, zeros))[2]
    hybrid = context.maps()
    assert len(hybrid) == 3
    assert all(bool((one == 0.75).all()) for one in hybrid)


def test_targets_are_the_clean_views_in_their_contexts() -> None:
    model = tiny_model()
    batch = batch_of(model)
    batch["codes"][:] = torch.tensor([0.0, 0, 0, 1, 0, 0, 0])
    contexts = {c.name: c for c in model.task._contexts(batch, [], [])}
    assert torch.equal(contexts["ordinary"].target, batch["clean"][:, 0])
    assert torch.equal(contexts["momentum"].target, batch["clean"][:, 1])
    assert not torch.equal(batch["input"], batch["clean"])
    batch["codes"][:] = torch.tensor([0.0, 1, 0, 1, 0, 0, 0])
    flipped = next(iter(model.task._contexts(batch, [], []))).target
    assert torch.equal(flipped, batch["clean"][:, 0].flip(3))
    batch["clean"][:, 0], batch["clean"][:, 1] = 1, 0
    batch["mix"] = torch.full_like(batch["mix"], 0.7)
    hybrid = list(model.task._contexts(batch, [], []))[2].target
    assert bool((hybrid == 0.7).all())


def test_the_indicator_changes_the_answer_and_not_the_embedding() -> None:
    model = tiny_model()
    batch = batch_of(model)
    with torch.no_grad():
        maps = list(model.task.body.encoder(batch["input"][:, 0]))
        kept = [one.clone() for one in maps]
        a, b = (model.task.gated(maps, code) for code in (batch["codes"][:, 0], batch["codes"][:, 0] + 1))
        assert all(torch.equal(x, y) for x, y in zip(a[:-1], maps[:-1], strict=True))
        assert not torch.equal(model.task.restored(a), model.task.restored(b))
    assert all(torch.equal(x, y) for x, y in zip(kept, maps, strict=True))
    first = model.loss(batch, STEP)
    batch["codes"][:, 0, 0] = 1 - batch["codes"][:, 0, 0]
    assert torch.equal(first["contrast"], model.loss(batch, STEP)["contrast"])


def test_own_keys_are_not_among_the_negatives() -> None:
    model = tiny_model(mask_same_case=False)
    terms = model.loss(batch_of(model), STEP)
    assert float(terms["contrast"]) == 0  # the queue is still empty
    model.after_step(batch_of(model), terms, STEP)
    assert model.task.queue.filled == 2
    assert float(model.loss(batch_of(model), STEP)["contrast"]) > 0


def test_the_hybrid_is_a_second_positive() -> None:
    both, one = (with_negatives(tiny_model(hybrid_contrast=on)) for on in (True, False))
    batch = batch_of(both)
    batch["mix"] = torch.ones_like(batch["mix"])  # the hybrid embedding is then the query itself
    a, b = both.loss(batch, STEP)["contrast"], one.loss(batch, STEP)["contrast"]
    with torch.no_grad():
        z, _ = both.task.embedding(both.task.body.encoder(batch["input"][:, 0])[-1])
    counted = both.task.queue.counted(batch["case"], mask_same_case=True)
    itself = info_nce(z, z, both.task.queue.keys, counted, 0.2).mean()
    assert float(a) == pytest.approx(float(0.5 * (b + itself)))


def test_views_that_show_nothing_do_not_count() -> None:
    model = with_negatives(tiny_model())
    batch = batch_of(model)
    batch["valid"][1] = 0
    first = model.loss(batch, STEP)
    batch["input"][1], batch["clean"][1] = 5.0 * batch["input"][0], 3
    second = model.loss(batch, STEP)
    assert float(first["loss"]) == pytest.approx(float(second["loss"]), abs=1e-12)
    model.after_step(batch, second, STEP)
    assert (model.task.queue.cases == -1).sum() >= 1


def test_the_hybrid_key_teaches_nothing() -> None:
    """Gradients are those of a key that is held fixed."""
    model = with_negatives(tiny_model())
    task, batch = model.task, batch_of(model)
    with torch.no_grad():
        maps, averaged = list(task.body.encoder(batch["input"][:, 0])), task.averaged(batch["input"][:, 1])
        keys, _ = task.embedding_average(averaged[-1])
    deepest = maps[-1].requires_grad_()
    found = torch.autograd.grad(task._contrast(batch, deepest, averaged[-1], keys)[0], deepest)[0]
    query, hybrid = (task.embedding(m)[0] for m in (deepest, mixed(deepest, averaged[-1], batch["mix"][0])))
    counted = task.queue.counted(batch["case"], mask_same_case=True)
    each = [info_nce(query, key, task.queue.keys, counted, 0.2).mean() for key in (keys, hybrid.detach())]
    assert torch.allclose(found, torch.autograd.grad(sum(each) / 2, deepest)[0], atol=1e-12)


def test_the_three_contexts_are_drawn_apart() -> None:
    spec = tiny_model(identity=0.0, blur=0, shuffle=0, paint=0).spec
    scan, rng = blobs("a"), np.random.default_rng(0)
    drawn = np.stack([PCRL.sample(spec, scan, {"mix": np.float32(0.7)}, rng)["codes"] for _ in range(30)])  # type: ignore[arg-type]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (drawn[:, a] == drawn[:, b]).all(1).mean() < 0.5  # 1/16 are expected to be equal


def test_the_average_is_a_copy_without_momentum_and_stays_with_full() -> None:
    for momentum in (0.0, 1.0):
        model = tiny_model(momentum=momentum)
        for pair in model.momentum_pairs():
            before = copy.deepcopy(pair.average.state_dict())
            with torch.no_grad():
                for parameter in pair.online.parameters():
                    parameter.add_(1)
            update_averages([pair], Step("main", 3, 10_000, 3))
            expected = pair.online.state_dict() if momentum == 0 else before
            assert all(torch.equal(expected[n], t) for n, t in pair.average.state_dict().items())


def test_the_norms_learn_from_samples_that_show_something() -> None:
    models = [with_negatives(tiny_model(mode=mode)) for mode in ("paper", "paper", "official", "official")]
    batch = [batch_of(model) for model in models]
    for number, (model, one) in enumerate(zip(models, batch, strict=True)):
        one["valid"][1] = 0
        if number % 2:
            one["input"][1] *= -3
        with torch.no_grad():
            model.after_step(one, model.loss(one, STEP), STEP)
    for a, b in (models[:2], models[2:]):
        for name in ("embedding", "embedding_average"):
            assert torch.equal(getattr(a.task, name).norm.mean, getattr(b.task, name).norm.mean)
    norm = models[0].task.embedding.norm
    before = (int(norm.count), norm.mean.clone())
    norm.update(torch.zeros(0, len(norm.mean), dtype=torch.float64))
    assert (int(norm.count), norm.mean.tolist()) == (before[0], before[1].tolist())


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_logits_keep_their_precision_within_autocast(mode: str) -> None:
    model = with_negatives(tiny_model(mode=mode, double=False))
    task, batch = model.task, batch_of(model)
    with torch.no_grad():
        deepest, averaged = task.body.encoder(batch["input"][:, 0])[-1], task.averaged(batch["input"][:, 1])[-1]
        (query, _), (keys, _) = task.embedding(deepest), task.embedding_average(averaged)

        def computed() -> list[Tensor]:
            if mode == "official":
                own = task._contrast(batch, query, keys, batch["valid"]), task._scale(batch, query)
                return [*own, *mean_similarity(query, batch["valid"]).values()]
            loss, metrics = task._contrast(batch, deepest, averaged, keys)
            return [loss, metrics["told_apart"], metrics["similarity"]]

        exact = computed()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            within = computed()
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(exact, within, strict=True))


def test_momentum_rises_in_short_runs() -> None:
    task = tiny_model().task
    assert task.momentum(Step("main", 0, 10_000, 0)) == 0.999
    assert task.momentum(Step("main", 0, 100, 0)) == pytest.approx(0.99)
    assert task.momentum(Step("main", 50, 100, 50)) == pytest.approx(0.9945)
    assert task.momentum(Step("main", 99, 100, 99)) == pytest.approx(0.999, abs=1e-5)


# All modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_backward_in_parts_gives_the_gradients_of_the_whole(mode: str) -> None:
    model = with_negatives(tiny_model(mode=mode))
    batch = batch_of(model)
    whole = model.loss(batch, STEP)
    whole["loss"].backward()
    expected = gradients(model)
    model.zero_grad()
    parts = model.backward(batch, STEP, lambda part: part.backward())
    found = gradients(model)
    assert expected.keys() == found.keys()
    assert max(float((found[n] - g).abs().max()) for n, g in expected.items()) < 1e-10
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), abs=1e-12)
    assert any("encoder" in n for n in found)


def test_one_decoder_pass_is_in_memory_at_a_time() -> None:
    model = tiny_model()
    batch = batch_of(model)
    alive: list[int] = []

    def run(part: Tensor) -> None:
        alive.append(1)
        part.backward()  # a second backward through a freed graph would raise

    model.backward(batch, STEP, run)
    assert len(alive) == 4  # contrast and three contexts


@pytest.mark.parametrize("mode", MODES)
def test_loss_has_no_side_effects_and_is_the_same_in_evaluation(mode: str) -> None:
    model = with_negatives(tiny_model(mode=mode))
    batch = batch_of(model)
    before = copy.deepcopy(model.state_dict())
    first = model.loss(batch, STEP)
    model.eval()
    with torch.no_grad():
        second = model.loss(batch, STEP)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(torch.allclose(first[n], second[n]) for n in first)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "dims"), [(1, 2), (2, 3), (3, 2)])
def test_channels_and_dimensions(mode: str, channels: int, dims: int) -> None:
    model = tiny_model(channels, dims, mode=mode)
    batch = batch_of(model, channels=channels)
    terms = model.backward(batch, STEP, lambda part: part.backward())
    assert torch.isfinite(terms["loss"])
    assert batch["clean"].shape == (2, 2, channels, *model.spec.patch)
    assert len(model.spec.patch) == dims
    model.after_step(batch, terms, STEP)
    assert model.picture(batch).axes
    assert set(model.chance()) <= {n for n, t in terms.items() if t.ndim == 0}


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_network_but_its_output_layers_is_handed_on(mode: str, tmp_path: Path) -> None:
    """nnU-Net's loader asks for every name but those with `.seg_layers.`; both names of the encoder agree."""
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    model = tiny_model(mode=mode, double=False)
    export = model.export()
    assert export.scope == "encoder+decoder"
    save_encoder(tmp_path, export.module, dataclasses.replace(card(), scope="encoder+decoder"))
    tensors, _ = load_encoder(tmp_path)
    assert not any("seg_layers" in name for name in tensors)
    filled = network_of(seed=1)
    report = transfer(tensors, filled)
    assert report.encoder_share == 1
    assert report.unused == ()
    assert {name for name, _ in report.new} == {n for n in filled.state_dict() if ".seg_layers." in n}

    torch.save({"network_weights": filled.state_dict()}, tmp_path / "nnunet.pth")
    fresh = network_of(seed=2)
    load_pretrained_weights(fresh, tmp_path / "nnunet.pth")
    state = fresh.state_dict()
    own = model.task.body.state_dict()
    assert all(torch.equal(state[n], t) for n, t in own.items())
    assert all(torch.equal(t, state[f"decoder.{n}"]) for n, t in state.items() if n.startswith("encoder."))


def test_the_average_encoder_can_be_handed_on() -> None:
    model = tiny_model(keep="average")
    assert model.export().module is model.task.average
    with pytest.raises(PlanError, match="no average"):
        tiny_model(mode="v2", keep="average")


def test_settings_that_leave_nothing_to_cut_are_refused() -> None:
    for settings in ({"local_views": "0"}, {"zooms": ()}):
        with pytest.raises(SettingsError, match=r"at least 1|greater than or equal to 1"):
            configure(PCRLConfig, "pcrl", settings)


def test_what_differs_from_the_authors_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="autoseg")
    infos = [blobs(name).info for name in "abcde"]
    PCRL.plan(target_of(), infos, PCRLConfig(mode="official"))
    assert "last 1024 keys, not 16384" in caplog.text
    assert "not restored (as in the authors' code" in caplog.text
    caplog.clear()
    PCRL.plan(target_of(), infos, PCRLConfig(queue=5))
    assert "16384" not in caplog.text
    assert "not restored" not in caplog.text


def test_a_patch_that_does_not_fit_is_refused() -> None:
    for patch in ((8, 24), (7, 24, 20), (2, 4, 4)):
        with pytest.raises(PlanError, match="Not a patch"):
            tiny_model(patch=patch)
    assert tiny_model(patch=(4, 12, 12)).spec.patch == (4, 12, 12)


def test_a_strongly_anisotropic_plan() -> None:
    """Spacing 5×0.6×0.6: no quarter turns unless the plane is square, targets keep their shape."""
    target = target_of()
    target.settings["spacing"] = [5.0, 0.6, 0.6]
    for patch, turns in (((8, 24, 16), (0, 2)), ((8, 16, 16), (0, 1, 2, 3))):
        config = PCRLConfig(patch=patch, batch=2, queue=8)
        spec: PCRLSpec = PCRL.plan(target, [blobs("a").info, blobs("b").info], config)
        assert (spec.contexts.plane, spec.contexts.turns) == ((1, 2), turns)
        model = PCRL(network_of(), spec, config).double()
        batch = batch_of(model)
        assert torch.isfinite(model.loss(batch, STEP)["loss"])


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_shows_nothing_has_no_figures_of_merit(mode: str) -> None:
    model = with_negatives(tiny_model(mode=mode))
    batch = batch_of(model)
    batch["valid"][:] = 0
    terms = model.loss(batch, STEP)
    assert float(terms["loss"]) == float(terms["shown"]) == 0
    assert not [name for name in terms if name.startswith(("explained", "told_apart", "similarity"))]


def test_scans_that_show_nothing_are_reported() -> None:
    model = tiny_model()
    late = Step("main", 60, 60_000, 60)
    assert "Hardly any view" in str(model.diagnose({"shown": 0.01}, late))
    assert "Hardly any view" in str(model.diagnose({"shown": 0.0}, Step("main", 3, 4, 3)))  # at the end of a short run
    assert model.diagnose({"shown": 0.0}, Step("main", 10, 60_000, 10)) is None
    assert model.diagnose({"shown": 0.3}, late) is None


def test_a_small_scan_counts_and_a_blank_one_does_not() -> None:
    spec = tiny_model().spec
    small, blank = blobs("a", shape=(4, 9, 8)), Array(np.zeros((1, 20, 40, 40)), "b")
    counts = [
        PCRL.sample(spec, scan, {"mix": np.float32(0.7)}, np.random.default_rng(0))["valid"] for scan in (small, blank)
    ]  # type: ignore[arg-type]
    assert counts == [1, 0]


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_targets_that_stay_as_they_are_are_reported_apart(mode: str) -> None:
    """The mean of both, weighted by variance, is that of all; half a turn may be written as two mirrors."""
    model = tiny_model(mode=mode)
    batch = batch_of(model)
    batch["codes"][:, 0] = torch.tensor([[0.0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]])
    terms = model.loss(batch, STEP)
    only = {**batch, "valid": torch.tensor([1.0, 0.0]).to(batch["valid"])}
    assert torch.equal(terms["explained_as_it_is"], model.loss(only, STEP)["explained_ordinary"])
    assert "explained_turned" not in model.loss(only, STEP)
    batch["codes"][:, 0] = torch.tensor([0.0, 1, 1, 0, 0, 1, 0])
    assert "explained_turned" not in model.loss(batch, STEP)


def test_collapse_is_reported() -> None:
    model = tiny_model()
    late = Step("main", 60, 100, 60)
    assert model.diagnose({"similarity": 0.5}, late) is None
    assert "nearly the same" in str(model.diagnose({"similarity": 0.97}, late))
    assert model.diagnose({"similarity": 0.97}, Step("main", 5, 100, 5)) is None


# Official mode --------------------------------------------------------------------------------------------------------


def test_the_official_mode_mixes_images_and_counts_its_terms() -> None:
    model = with_negatives(tiny_model(mode="official"))
    batch = batch_of(model)
    terms = model.loss(batch, STEP)
    names = ("ordinary", "hybrid", "blended", "blended_hybrid")
    assert float(terms["restore"]) == pytest.approx(float(np.mean([float(terms[n]) for n in names])))
    assert float(terms["loss"]) == pytest.approx(float(terms["contrast"] + terms["restore"]))
    assert sorted(batch["partner"].tolist()) == [0, 1]
    # With everything from the first image alone, the blended pass sees the views themselves, without TransAtt.
    batch["mix"] = torch.ones_like(batch["mix"])
    with torch.no_grad():
        maps = model.task.body.encoder(batch["input"][:, 0])
        expected = ((model.task.restored(maps) - batch["clean"][:, 0]) ** 2).flatten(1).mean()
    assert float(model.loss(batch, STEP)["blended"]) == pytest.approx(float(expected))


def test_the_official_targets_and_pairs_are_those_of_the_authors() -> None:
    """Four targets and three pairs, put together here step by step (specification of PCRL, §1.6)."""
    model = with_negatives(tiny_model(mode="official"))
    task, batch = model.task, batch_of(model)
    share, blend, second = torch.tensor([0.7, 0.6, 0.8], dtype=torch.float64)
    batch["mix"][:] = torch.stack([share, blend, second])
    batch["partner"] = torch.tensor([1, 0])
    batch["codes"][:] = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0]])
    terms = model.loss(batch, STEP)

    first, other = batch["input"].unbind(1)
    clean, clean_other = batch["clean"].unbind(1)
    own_code, other_code = batch["codes"][:, 0], batch["codes"][:, 1]
    partner = [1, 0]
    with torch.no_grad():
        maps, averaged = task.body.encoder(first), task.average(other)
        own, average = task.gated(maps, own_code), task.gated(averaged, other_code)
        blended = [x * blend + x[partner] * (1 - blend) for x in (first, other, clean, clean_other)]
        second_maps, second_averaged = task.body.encoder(blended[0]), task.average(blended[1])
        hybrid = [a * share + b * (1 - share) for a, b in zip(own, average, strict=True)]
        second_hybrid = [a * second + b * (1 - second) for a, b in zip(second_maps, second_averaged, strict=True)]
        turned, turned_other = clean.flip(2), clean_other.flip(3).rot90(2, (3, 4))
        expected = {
            "ordinary": (own, turned),
            "hybrid": (hybrid, share * turned + (1 - share) * turned_other),
            "blended": (second_maps, blended[2]),
            "blended_hybrid": (second_hybrid, second * blended[2] + (1 - second) * blended[3]),
        }
        for name, (seen, target) in expected.items():
            error = ((task.restored(seen) - target) ** 2).mean()
            assert float(terms[name]) == pytest.approx(float(error), rel=1e-9), name

        z, z_second = task.embedding(maps[-1])[0], task.embedding(second_maps[-1])[0]
        key, key_second = task.embedding_average(averaged[-1])[0], task.embedding_average(second_averaged[-1])[0]
        counted = task.queue.counted(batch["case"], mask_same_case=True)

        def pair(query: Tensor, positive: Tensor) -> Tensor:
            scores = [(s / 0.2).exp() / task.normaliser for s in ((query * positive).sum(1), query @ task.queue.keys.T)]
            return noise_contrast(scores[0], scores[1], counted, model.spec.images).mean()

        blended_key = blend * key + (1 - blend) * key[partner]
        pairs = [pair(z, key), pair(z_second, key_second), pair(z_second, blended_key)]
    assert float(terms["contrast"]) == pytest.approx(float(sum(pairs)) / 3, rel=1e-9)


def test_partners_that_show_nothing_are_not_mixed_in() -> None:
    model = with_negatives(tiny_model(mode="official"))
    batch = batch_of(model)
    batch["partner"], batch["valid"][1] = torch.tensor([1, 0]), 0
    first = float(model.loss(batch, STEP)["loss"])
    batch["input"][1], batch["clean"][1] = 9, 9
    assert float(model.loss(batch, STEP)["loss"]) == pytest.approx(first, abs=1e-12)


def test_the_normaliser_is_set_once_there_are_negatives() -> None:
    model = tiny_model(mode="official", mask_same_case=False)
    batch = batch_of(model)
    values = []
    for _ in range(3):
        with torch.no_grad():
            model.after_step(batch, model.loss(batch, STEP), STEP)
        values.append(float(model.task.normaliser))
    assert values[0] == 0  # no negatives yet
    assert values[1] == values[2] > 0


# PCRLv2 ---------------------------------------------------------------------------------------------------------------


def test_comparison_on_the_fixed_vectors() -> None:
    """p¹ = (1, 0), z² = (0.6, 0.8), p² = (0, 1), z¹ = (0.6, 0.8): -0.7, and no gradient into z."""
    p1, p2 = (torch.tensor([row], requires_grad=True) for row in ([1.0, 0.0], [0.0, 1.0]))
    z1, z2 = (torch.tensor([[0.6, 0.8]], requires_grad=True) for _ in range(2))
    loss = comparison(p1, p2, z1, z2)
    assert float(loss) == pytest.approx(-0.7)
    loss.sum().backward()
    assert z1.grad is None
    assert z2.grad is None
    assert p1.grad is not None


def test_the_middle_scale_fades() -> None:
    assert [fading(Step("main", t, 100, t)) for t in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_skips_of_zeros_leave_their_half_of_the_kernels_alone() -> None:
    model = tiny_model(mode="v2")
    model.loss(batch_of(model), STEP)["loss"].backward()
    for stage in model.task.body.decoder.stages:
        kernel = stage.convs[0].conv.weight
        half = kernel.shape[1] // 2
        assert float(kernel.grad[:, half:].abs().max()) == 0
        assert float(kernel.grad[:, :half].abs().max()) > 0


def test_every_local_view_counts_and_their_order_does_not() -> None:
    model = with_negatives(tiny_model(mode="v2", local_views=6))
    batch = batch_of(model)
    batch["scales"] = torch.ones_like(batch["scales"])
    whole = model.loss(batch, STEP)["compare_local"]
    batch["local"] = batch["local"][:, torch.tensor([3, 1, 5, 0, 2, 4])]
    assert float(model.loss(batch, STEP)["compare_local"]) == pytest.approx(float(whole), abs=1e-10)
    for view in range(6):
        changed = {**batch, "local": batch["local"].clone()}
        changed["local"][:, view] += torch.randn_like(changed["local"][:, view])
        assert float(model.loss(changed, STEP)["compare_local"]) != float(whole)


def test_what_shows_nothing_stays_out_of_the_predictors_statistics() -> None:
    model = tiny_model(mode="v2")
    batch = batch_of(model)
    batch["valid"][1] = 0
    first = float(model.loss(batch, STEP)["loss"])
    batch["input"][1] *= -3
    batch["local"][1] *= -3
    assert float(model.loss(batch, STEP)["loss"]) == pytest.approx(first, abs=1e-12)


def test_collapse_of_the_pyramid_shows_before_the_norm() -> None:
    model = tiny_model(mode="v2")
    batch = batch_of(model)
    late = Step("main", 60, 100, 60)
    assert model.diagnose({"similarity": float(model.loss(batch, STEP)["similarity"])}, late) is None
    for name, parameter in model.task.body.decoder.named_parameters():
        if ".norm." in name:
            nn.init.constant_(parameter, 1e-4 if name.endswith("weight") else 1.0)
    collapsed = float(model.loss(batch, STEP)["similarity"])
    assert collapsed == pytest.approx(1, abs=1e-6)
    assert "nearly the same" in str(model.diagnose({"similarity": collapsed}, late))


def test_predictors_take_their_statistics_from_the_batch() -> None:
    predictor = Predictor(4).double()
    rows = 5 + 3 * torch.randn(6, 4, dtype=torch.float64)
    z, p = predictor(rows)
    assert (z.shape, p.shape) == ((6, 4), (6, 4))
    assert float(z.mean(0).abs().max()) < 1e-12
    assert torch.allclose(predictor.eval()(rows)[1], p)
    assert not list(predictor.buffers())
