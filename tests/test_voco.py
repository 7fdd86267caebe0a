"""VoCo's losses, embeddings and views. Values: the authors' functions, or by hand (specification of VoCo, §5)."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn

from planners.errors import PlanError
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.method import Step, Target
from pretrain.methods.voco import (
    VoCo,
    VoCoConfig,
    VoCoSpec,
    constant_answer_loss,
    cosines,
    position_loss,
    split_embeddings,
    spread_loss,
)
from pretrain.methods.voco_geometry import Layout, typical_labels
from pretrain.optimise import build_optimizer, update_averages
from tests.tiny import Array, dataset_json, tiny_plan

STEP = Step("main", 0, 10, 0)
LABELS = torch.tensor([0.5625, 0.1875, 0.1875, 0.0625, 0, 0, 0, 0, 0])[None, None]
ANSWERS = torch.tensor([0.5, 0.2, 0.1, 0, 0.3, 0, 0, 0, 0])[None, None]


def spec_of(layout: Layout, **changes: object) -> VoCoSpec:
    plain = VoCoSpec(layout, (1.0,) * len(layout.crop), volumes=2, random_crops=3, mirror=0, turn=0, shift=0)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def tiny_model(channels: int = 1, dims: int = 3, **settings: object) -> VoCo:
    plan = tiny_plan(dims=dims, channels=channels)
    configuration = "3d_fullres" if dims == 3 else "2d"
    torch.manual_seed(0)
    network = build_segmentation_network(plan, configuration, dataset_json(channels))
    layout = Layout((4, 12, 12), (1, 2, 2), False, 1.0) if dims == 3 else Layout((12, 12), (2, 2), False, 1.0)
    return VoCo(network, spec_of(layout), VoCoConfig(hidden=16, **settings))  # type: ignore[arg-type]


def random_batch(model: VoCo, volumes: int = 2, channels: int = 1, n: int = 3) -> dict[str, torch.Tensor]:
    layout = model.spec.layout
    bases = layout.bases
    generator = torch.Generator().manual_seed(1)
    labels = typical_labels(layout)[:: max(1, 16000 // (volumes * n))][: volumes * n]
    return {
        "base": torch.randn(volumes, bases, channels, *layout.crop, generator=generator),
        "random": torch.randn(volumes, n, channels, *layout.crop, generator=generator),
        "labels": torch.from_numpy(labels.copy()).view(volumes, n, bases),
        "bases_valid": torch.ones(volumes, bases, dtype=torch.bool),
        "crops_valid": torch.ones(volumes, n, dtype=torch.bool),
        "offsets": torch.zeros(volumes, n, len(layout.crop), dtype=torch.long),
        "overview": torch.zeros(volumes, 1, 24, 24, dtype=torch.float16),
    }


# Losses ---------------------------------------------------------------------------------------------------------------


def test_position_loss_on_the_fixed_tensor() -> None:
    counted = torch.ones_like(LABELS, dtype=torch.bool)
    pos, neg = position_loss(LABELS, ANSWERS, counted, "v1")
    assert (float(pos), float(neg)) == (pytest.approx(0.059863, abs=1e-5), pytest.approx(0.018, abs=1e-6))
    assert float(sum(position_loss(LABELS, ANSWERS, counted, "v2"))) == pytest.approx(0.131197, abs=1e-5)


@pytest.mark.parametrize(("answer", "expected"), [(1.0, 0.0), (0.5, 0.693144), (0.0, 13.8155)])
def test_position_loss_of_one_certain_place(answer: float, expected: float) -> None:
    labels = torch.tensor([[[1.0, 0.0]]])
    pos, neg = position_loss(labels, torch.tensor([[[answer, 0.0]]]), labels > -1, "v2")
    assert float(pos + neg) == pytest.approx(expected, abs=1e-4)
    assert abs(float(neg)) < 2e-6


def test_the_loss_is_never_negative() -> None:
    for variant in ("v1", "v2"):
        pos, neg = position_loss(LABELS, LABELS, LABELS > -1, variant)
        assert float(pos) >= 0
        assert float(neg) >= 0


def test_masked_entries_do_not_count() -> None:
    counted = torch.ones_like(LABELS, dtype=torch.bool)
    counted[..., 4] = False
    wrong = ANSWERS.clone()
    wrong[..., 4] = 0.99
    for variant in ("v1", "v2"):
        a = position_loss(LABELS, wrong, counted, variant)
        b = position_loss(
            LABELS[..., [0, 1, 2, 3, 5, 6, 7, 8]],
            ANSWERS[..., [0, 1, 2, 3, 5, 6, 7, 8]],
            counted[..., :8] | True,
            variant,
        )
        assert [float(t) for t in a] == pytest.approx([float(t) for t in b])


def test_a_volume_without_a_counted_crop_does_not_dilute_the_mean() -> None:
    counted = torch.ones(2, 1, 9, dtype=torch.bool)
    counted[1] = False
    both = position_loss(LABELS.expand(2, 1, 9), ANSWERS.expand(2, 1, 9), counted, "v2")
    one = position_loss(LABELS, ANSWERS, counted[:1], "v2")
    assert [float(t) for t in both] == pytest.approx([float(t) for t in one])
    nothing = position_loss(LABELS, ANSWERS, counted[1:], "v2")
    assert [float(t) for t in nothing] == [0, 0]


@pytest.mark.parametrize(
    ("bases", "expected"),
    [
        ([[1, 0], [0, 1], [1, 1]], 1 / 3),
        ([[1, 0, 0], [0.8, 0.6, 0], [0.6, 0, 0.8]], 0.410133),
        ([[1, 0], [0, 2]], 0.0),
        ([[1, 2], [2, 4]], 1.0),
    ],
)
def test_spread_loss(bases: list, expected: float) -> None:
    base = torch.tensor(bases, dtype=torch.float32)[None].requires_grad_()
    loss = spread_loss(base, torch.ones(1, len(bases), dtype=torch.bool))
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_every_base_crop_gets_a_gradient() -> None:
    base = torch.tensor([[[1.0, 0], [0, 1], [1, 1.1]]], requires_grad=True)
    spread_loss(base, torch.ones(1, 3, dtype=torch.bool)).backward()
    assert (base.grad.abs().sum(-1) > 0).all()


def test_padding_is_not_pushed_apart() -> None:
    base = torch.tensor([[[1.0, 0], [1, 0], [0, 1]]])
    assert float(spread_loss(base, torch.tensor([[True, False, True]]))) == 0


def test_similarity() -> None:
    z, bases = torch.tensor([[[3.0, 4]]]), torch.tensor([[[1.0, 0], [0, 1], [-1, 0]]])
    assert cosines(z, bases).relu()[0, 0].tolist() == pytest.approx([0.6, 0.8, 0])


def test_what_a_constant_answer_reaches() -> None:
    """0.584 (v2, at a similarity of 0.2) and 0.71 (at 0) for the authors' grid."""
    labels = torch.from_numpy(typical_labels(Layout((64, 64), (3, 3), False, 1.0)))
    assert constant_answer_loss(labels, "v2") == pytest.approx(0.584, abs=0.003)
    everything = torch.ones_like(labels, dtype=torch.bool)[None]
    for variant in ("v1", "v2"):
        zero = sum(position_loss(labels[None], torch.zeros_like(labels)[None], everything, variant))
        assert float(zero) == pytest.approx(0.71, abs=0.005)
    fifth = sum(position_loss(labels[None], torch.full_like(labels, 0.2)[None], everything, "v1"))
    assert float(fifth) + 0.2**2 == pytest.approx(0.44, abs=0.005)


# The module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v2", "v1"])
def test_gradients_reach_encoder_and_student_and_never_the_teacher(variant: str) -> None:
    model = tiny_model(variant=variant)
    for pair in model.momentum_pairs():
        assert not any(p.requires_grad for p in pair.average.parameters())
    for parameter in model.encoder.parameters():
        if not parameter.any() and parameter.ndim == 1:  # nnU-Net begins with residual branches that give nothing
            nn.init.ones_(parameter)
    terms = model.loss(random_batch(model), STEP)
    terms["loss"].backward()
    teachers = {id(p) for pair in model.momentum_pairs() for p in pair.average.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) in teachers)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.parameters() if p.ndim == 2)
    # A bias in front of a norm has no effect and so no gradient to speak of; kernels must all have one.
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters() if p.ndim > 1)
    learning = {
        id(p)
        for g in build_optimizer(model.stages()[0], model.parameter_groups(model.stages()[0])).param_groups
        for p in g["params"]
    }
    assert not learning & teachers
    assert learning == {id(p) for p in model.parameters()} - teachers


def test_the_target_between_volumes_has_no_gradient() -> None:
    model = tiny_model()
    _, teacher = model.embed(random_batch(model))
    assert not teacher.random.requires_grad
    assert not teacher.base.requires_grad


def test_teachers_begin_as_copies_and_follow_the_student() -> None:
    model = tiny_model(variant="v1")
    pairs = model.momentum_pairs()
    assert len(pairs) == 2
    for pair in pairs:
        for average, online in zip(pair.average.parameters(), pair.online.parameters(), strict=True):
            assert torch.equal(average, online)
            assert average is not online
    optimizer = build_optimizer(model.stages()[0], model.parameter_groups(model.stages()[0]))
    for _ in range(2):
        before = [p.clone() for pair in pairs for p in pair.average.parameters()]
        model.loss(random_batch(model), STEP)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        update_averages(pairs, STEP)
        after = [p for pair in pairs for p in pair.average.parameters()]
        online = [p for pair in pairs for p in pair.online.parameters()]
        for old, new, student in zip(before, after, online, strict=True):
            assert torch.allclose(new, 0.9 * old + 0.1 * student, atol=1e-7)
    assert not torch.equal(after[0], before[0])


class Brightness(nn.Module):
    """An encoder whose only feature is the mean of the crop."""

    output_channels = (2,)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([x.cos(), x.sin()], 1)]


@pytest.mark.parametrize(("volumes", "n", "grid"), [(2, 2, (1, 2, 2)), (3, 4, (1, 2, 3))])
def test_crops_stay_with_their_volume(volumes: int, n: int, grid: tuple[int, ...]) -> None:
    network = nn.Module()
    network.encoder = Brightness()
    model = VoCo(network, spec_of(Layout((2, 2, 2), grid, False, 1.0)), VoCoConfig(hidden=8))
    model.student = model.teacher = nn.Identity()  # type: ignore[assignment]
    bases = math.prod(grid)
    level = torch.arange(volumes, dtype=torch.float32).view(-1, 1, 1, 1, 1, 1)
    batch = {"random": level.expand(-1, n, 1, 2, 2, 2), "base": level.expand(-1, bases, 1, 2, 2, 2)}
    student, _ = model.embed(batch)
    assert student.random.shape == (volumes, n, 2)
    assert student.base.shape == (volumes, bases, 2)
    assert torch.allclose(cosines(student.random, student.base), torch.ones(volumes, n, bases))


def test_rows_are_split_random_crops_first() -> None:
    rows = torch.arange(2 * 2 + 2 * 3).float()[:, None]
    embeddings = split_embeddings(rows, torch.zeros(2, 2, 1), torch.zeros(2, 3, 1))
    assert embeddings.random[..., 0].tolist() == [[0, 1], [2, 3]]
    assert embeddings.base[..., 0].tolist() == [[4, 5, 6], [7, 8, 9]]


def test_dropout_takes_features_and_never_a_whole_crop() -> None:
    model = tiny_model(feature_dropout=0.2)
    batch = random_batch(model)
    seen: list[torch.Tensor] = []
    model.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for _ in range(20):
        model.loss(batch, STEP)
    rows = torch.cat(seen)
    assert (rows != 0).any(1).all()
    assert (rows == 0).any()
    model.eval()
    first, second = (model.loss(batch, STEP)["loss"] for _ in range(2))
    assert torch.equal(first, second)


def test_no_term_between_volumes_with_one_volume(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    assert "inter" not in model.loss(random_batch(model, volumes=1), STEP)
    assert "inter" in model.loss(random_batch(model, volumes=2), STEP)
    assert "inter" not in tiny_model(variant="v1").loss(random_batch(model), STEP)
    with caplog.at_level(logging.WARNING, "autoseg"):
        VoCo.plan(_target(), [Array(np.zeros((1, 13, 27, 22))).info], VoCoConfig())
    assert "one volume a batch" in caplog.text


def test_only_v1_has_a_teacher_to_export() -> None:
    pool = [Array(np.zeros((1, 13, 27, 22))).info]
    with pytest.raises(
        PlanError, match=r"voco.export_teacher\n\s+found\s+voco.variant=v2\n\s+expected\s+v1\n\s+to fix"
    ):
        VoCo.plan(_target(), pool, VoCoConfig(export_teacher=True))


def test_the_term_between_volumes_asks_the_next_volume() -> None:
    model = tiny_model()
    for parameter in model.teacher.parameters():  # at the start both answer the same, and the term is zero
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    batch = random_batch(model, volumes=3)
    student, teacher = model.embed(batch)
    losses = []
    for i, j in ((0, 1), (1, 2), (2, 0)):
        wanted = cosines(teacher.random[i : i + 1], teacher.base[j : j + 1]).relu()
        answer = cosines(student.random[i : i + 1], student.base[j : j + 1]).relu()
        losses.append(sum(position_loss(wanted, answer, torch.ones_like(wanted, dtype=torch.bool), "v2")))
    assert float(model.loss(batch, STEP)["inter"]) == pytest.approx(float(sum(losses)) / 3, rel=1e-5)


def test_terms_add_up() -> None:
    for variant, parts in (("v2", ("intra", "inter", "reg")), ("v1", ("intra", "reg"))):
        model = tiny_model(variant=variant)
        terms = model.loss(random_batch(model), STEP)
        assert float(terms["loss"]) == pytest.approx(sum(float(terms[p]) for p in parts))
        assert float(terms["intra"]) == pytest.approx(float(terms["pos"] + terms["neg"]))


def test_crops_that_do_not_count_change_nothing() -> None:
    model = tiny_model(variant="v1")  # in v2 they are still bases and neighbours of the other volume
    batch = random_batch(model)
    batch["crops_valid"][0, 1] = False
    before = model.loss(batch, STEP)
    batch["labels"][0, 1] = torch.tensor([1.0, 0, 0, 0])
    after = model.loss(batch, STEP)
    assert {k: float(v) for k, v in before.items()} == {k: float(v) for k, v in after.items()}


def test_a_run_that_learns_nothing_is_told() -> None:
    model = tiny_model()
    late = Step("main", 100, 200, 100)
    stuck = {"intra": model.plateau, "dead_fraction": 0.0, "acc": 0.26}
    assert "does not tell places apart" in str(model.diagnose(stuck, late))
    assert model.diagnose(stuck, Step("main", 5, 200, 5)) is None
    assert model.diagnose({**stuck, "intra": 0.9 * model.plateau}, late) is None
    assert model.diagnose({**stuck, "acc": 0.5}, late) is None
    assert "learn nothing" in str(model.diagnose({**stuck, "dead_fraction": 0.6}, late))


def test_chance_is_uniform_and_the_centre_is_known() -> None:
    model = tiny_model()
    assert model.chance()["acc"] == 0.25
    network = nn.Module()
    network.encoder = Brightness()
    nine = VoCo(network, spec_of(Layout((4, 4, 4), (1, 3, 3), False, 1.0)), VoCoConfig(hidden=8))
    assert nine.chance() == {"acc": pytest.approx(1 / 9), "always_centre": pytest.approx(0.25, abs=0.01)}


# Views ----------------------------------------------------------------------------------------------------------------


def test_a_crop_on_a_cell_equals_its_base_crop() -> None:
    layout = Layout((4, 6, 6), (1, 1, 2), False, 1.0)
    volume = Array(np.random.default_rng(0).normal(size=(2, 4, 6, 12)))
    seen = set()
    for seed in range(40):
        views = VoCo.sample(spec_of(layout, random_crops=6), volume, None, np.random.default_rng(seed))
        for crop, labels in zip(views["random"], views["labels"], strict=True):
            if labels.max() == 1:
                seen.add(int(labels.argmax()))
                assert np.array_equal(crop, views["base"][labels.argmax()])
    assert seen == {0, 1}  # the last cell too


def test_base_crops_tile_the_region_in_order() -> None:
    layout = Layout((2, 3, 3), (2, 2, 2), False, 1.0)
    voxels = np.arange(4 * 6 * 6, dtype=float).reshape(1, 4, 6, 6)
    views = VoCo.sample(spec_of(layout), Array(voxels), None, np.random.default_rng(0))
    assert views["base"][0, 0, 0, 0, 0] == 0
    assert np.array_equal(views["base"][7, 0], voxels[0, 2:, 3:, 3:])
    assert np.array_equal(views["base"][1, 0], voxels[0, :2, :3, 3:])
    assert views["overview"].shape == (2, 6, 6)


def test_views_change_with_augmentation_and_stay_where_they_are() -> None:
    layout = Layout((4, 6, 6), (1, 2, 2), False, 1.0)
    volume = Array(np.random.default_rng(0).normal(size=(1, 4, 12, 12)))
    plain = VoCo.sample(spec_of(layout), volume, None, np.random.default_rng(3))
    moved = VoCo.sample(spec_of(layout, mirror=1.0), volume, None, np.random.default_rng(3))
    assert np.array_equal(plain["base"][0], moved["base"][0][:, ::-1, ::-1, ::-1])
    brighter = VoCo.sample(spec_of(layout, shift=1.0), volume, None, np.random.default_rng(3))
    difference = brighter["base"] - plain["base"]
    assert np.allclose(difference.std(axis=(2, 3, 4)), 0, atol=1e-6)
    assert 0 < np.abs(difference).max() <= 0.1 * volume.voxels.std() + 1e-6


def test_crops_turn_only_where_sizes_and_spacings_agree() -> None:
    volume = Array(np.random.default_rng(0).normal(size=(1, 4, 12, 12)))
    square, oblong = Layout((4, 6, 6), (1, 2, 2), False, 1.0), Layout((4, 4, 6), (1, 2, 2), False, 1.0)
    for layout, spacing, turns in [
        (square, (3.0, 1, 1), True),
        (square, (3.0, 1.1, 1), False),
        (oblong, (3.0, 1, 1), False),
    ]:
        plain, turned = (
            VoCo.sample(spec_of(layout, turn=turn, spacing=spacing), volume, None, np.random.default_rng(3))
            for turn in (0.0, 1.0)
        )
        equal = np.array_equal(plain["base"][0], turned["base"][0])
        assert equal != turns
        assert np.allclose(np.sort(plain["base"][0].ravel()), np.sort(turned["base"][0].ravel()))


def test_a_scan_smaller_than_one_crop_is_padded_and_marked() -> None:
    layout = Layout((8, 12, 12), (1, 2, 2), False, 1.0)
    volume = Array(np.random.default_rng(0).normal(size=(1, 5, 4, 4)))
    views = VoCo.sample(spec_of(layout), volume, None, np.random.default_rng(0))
    assert np.isfinite(views["base"]).all()
    assert np.allclose(views["labels"][views["crops_valid"]].sum(1), 1)
    assert not views["bases_valid"].all() or views["crops_valid"].all()


def test_air_is_masked() -> None:
    layout = Layout((4, 6, 6), (1, 2, 2), False, 1.0)
    volume = Array(np.zeros((1, 4, 12, 12)))
    volume.info = dataclasses.replace(volume.info, foreground_threshold=0.5)
    views = VoCo.sample(spec_of(layout), volume, None, np.random.default_rng(0))
    assert not views["crops_valid"].any()
    model = tiny_model()
    batch = random_batch(model)
    batch["crops_valid"][:] = False
    terms = model.loss(batch, STEP)
    assert torch.isfinite(terms["loss"])
    terms["loss"].backward()


def test_slices_of_the_foreground_in_2d() -> None:
    voxels = np.broadcast_to(np.arange(9.0)[:, None, None], (9, 20, 24))[None]
    volume = Array(np.ascontiguousarray(voxels))
    volume.info = dataclasses.replace(volume.info, foreground_box=((3, 6), (0, 20), (0, 24)))
    spec = spec_of(Layout((10, 12), (2, 2), False, 1.0))
    seen = {float(VoCo.sample(spec, volume, None, np.random.default_rng(i))["base"][0].max()) for i in range(30)}
    assert seen == {3.0, 4.0, 5.0}


def test_the_whole_foreground_can_be_resized_to_the_grid() -> None:
    voxels = np.zeros((1, 10, 40, 40))
    voxels[:, 2:8, 10:30, 5:35] = 1
    volume = Array(voxels)
    volume.info = dataclasses.replace(volume.info, foreground_box=((2, 8), (10, 30), (5, 35)))
    views = VoCo.sample(spec_of(Layout((4, 6, 6), (1, 2, 2), True, 1.0)), volume, None, np.random.default_rng(0))
    assert (views["base"] == 1).all()


def test_pictures_show_the_task() -> None:
    for dims in (3, 2):
        model = tiny_model(dims=dims)
        figure = model.picture(random_batch(model))
        titles = [axis.get_title() for axis in figure.axes]
        assert sum("base crops" in title for title in titles) == 2
        assert sum(title.startswith("crop") for title in titles) == 6


def _target(dims: int = 3) -> Target:
    plan = tiny_plan(dims=dims)
    configuration = "3d_fullres" if dims == 3 else "2d"
    return Target(plan, configuration, encoder_info(plan, configuration, dataset_json()))
