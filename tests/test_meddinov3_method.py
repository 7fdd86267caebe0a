"""MedDINOv3's stages: what is cut, what learns and at which rate, what rests and follows, when a run stops."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from planners.errors import AutosegError, SettingsError
from planners.files import read_json
from pretrain.checkpoint import EncoderCard
from pretrain.importers.reading import read_weights
from pretrain.loop import pretrain
from pretrain.method import Step
from pretrain.methods.meddinov3 import method as method_module
from pretrain.methods.meddinov3 import views
from pretrain.methods.meddinov3.method import MedDINOv3Pretraining
from pretrain.methods.meddinov3.schedules import (
    DINO,
    GRAM,
    HIGH,
    gram_weight,
    late_fall,
    slow_rise,
    teacher_temperature,
)
from pretrain.methods.meddinov3.settings import MedDINOv3Config, heads_of
from pretrain.methods.meddinov3.sizes import crop_sizes
from pretrain.methods.meddinov3.views import cut, distorted, draw_box
from pretrain.optimise import build_optimizer, prepare_stage, rate_factor, set_rates, update_averages
from tests import layouts
from tests.geometries import batch_of, build, scans_of, target_of
from tests.stubs import PLAN, make_home
from tests.test_methods_run import stop_after
from tests.tiny import DATASET, write_tiny_plan

NAME = "meddinov3"
CONFIG = MedDINOv3Config()


def first(stage: str, total: int = 1000, index: int = 0) -> Step:
    return Step(stage, index, total, index)


def model(*, initialised: bool = False, slices: int | None = None, **settings: Any) -> Any:
    """The method on slices of a few blobs; `slices`: as if there were so many."""
    target = replace(target_of(NAME, "2d"), initialised=initialised)
    pool = [scan.info for scan in scans_of("2d").values()]
    if slices is not None:
        pool = [replace(pool[0], foreground_box=((0, slices), *pool[0].foreground_box[1:]))]
    return build(NAME, target, pool, **settings)


@cache
def shared() -> Any:
    return model()


def stage_of(method: Any, name: str) -> Any:
    return next(stage for stage in method.stages() if stage.name == name)


# What is cut ----------------------------------------------------------------------------------------------------------------


def test_crops_have_the_published_sizes_where_slices_are_large():
    """meddinov3.md 1.3 and 1.8."""
    sizes = crop_sizes(CONFIG, 512)
    assert [(s.large, s.small, s.gram, s.batch) for s in sizes[DINO] + sizes[GRAM]] == [(256, 112, 512, 64)] * 2
    assert [(s.share, s.large, s.small, s.gram) for s in sizes[HIGH]] == [
        (0.30, 384, 112, 512), (0.30, 512, 112, 768), (0.30, 512, 144, 768), (0.05, 512, 160, 768), (0.05, 512, 224, 768)
    ]  # fmt: skip
    plain = 64 * (2 * 256 + 8 * 49)
    tokens = [s.batch * (2 * s.large**2 + 8 * s.small**2) // 256 for s in sizes[HIGH]]
    assert all(abs(found - plain) < 0.03 * plain for found in tokens)


@pytest.mark.parametrize(("edge", "large", "gram"), [(383, 256, 384), (60, 240, 352), (9, 32, 48)])
def test_small_slices_are_not_enlarged_for_nothing(edge, large, gram):
    """meddinov3.md 1.7: below 384 pixels the anchor sees 1.5 times the resolution; crops have at most 4 pixels for one."""
    sizes = crop_sizes(CONFIG, edge)
    assert (sizes[DINO][0].large, sizes[DINO][0].gram) == (large, gram)
    assert all(s.gram <= 1.5 * s.large + 8 for s in sizes[HIGH])


def test_the_sizes_of_a_batch_are_drawn_for_all_its_slices():
    method = shared()
    pool = [scan.info for scan in scans_of("2d").values()]
    found = [method.draw(method.spec, pool, np.random.default_rng(n), first(HIGH)) for n in range(200)]
    assert all(len({sizes for _, (_, sizes, _) in batch}) == 1 for batch in found)
    drawn = [batch[0][1][1] for batch in found]
    assert all(len(batch) == sizes.batch for batch, sizes in zip(found, drawn, strict=True))
    assert drawn.count(method.spec.sizes[HIGH][0]) / 200 == pytest.approx(0.3, abs=0.1)


def test_long_scans_are_seen_as_the_square_root_of_their_slices():
    info = scans_of("2d")["v0"].info
    pool = [replace(info, id=str(n), foreground_box=((0, n), *info.foreground_box[1:])) for n in (4, 36)]
    found = [
        c for n in range(300) for c, _ in shared().draw(shared().spec, pool, np.random.default_rng(n), first(DINO))
    ]
    assert found.count("36") / len(found) == pytest.approx(0.75, abs=0.03)


def test_half_of_the_large_crops_have_masks_of_exact_numbers():
    batch = batch_of(shared(), scans_of("2d"), first(DINO))
    counts = sorted(batch["masked"].flatten(0, 1).sum(1).tolist())
    assert counts == [0] * 4 + [int(16 * r + 1e-6) for r in np.linspace(0.1, 0.5, 5)[1:]]


def test_the_anchor_sees_what_the_student_sees_without_distortions(monkeypatch):
    method, scan = shared(), scans_of("2d")["v1"]
    sizes = replace(method.spec.sizes[GRAM][0], gram=2 * method.spec.sizes[GRAM][0].large)

    def sample(distort: float) -> dict[str, np.ndarray]:
        spec = replace(method.spec, distort=distort)
        return method.sample(spec, scan, (GRAM, sizes, (0, 0)), np.random.default_rng(3))

    plain = sample(0.0)
    coarse = plain["fine"].reshape(2, 1, 64, 2, 64, 2).mean((3, 5))
    assert np.corrcoef(coarse.ravel(), plain["large"].ravel())[0, 1] > 0.995
    monkeypatch.setattr(method_module, "distorted", lambda image, *others: 0 * image)
    blank = sample(1.0)
    assert not blank["large"].any()
    assert blank["fine"].std() > 0.05  # noise of the scan, at least


@pytest.mark.parametrize("area", [(0.32, 1.0), (0.05, 0.32)])
def test_parts_have_the_asked_area_and_shape(area):
    rng = np.random.default_rng(0)
    boxes = [draw_box((90, 120), area, rng) for _ in range(300)]
    shares = [box.size[0] * box.size[1] / (90 * 120) for box in boxes]
    ratios = [box.size[1] / box.size[0] for box in boxes]
    assert area[0] - 0.01 < min(shares) < area[0] + 0.03
    assert area[1] - 0.06 < max(shares) <= 1.001 * area[1] + 0.01
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4
    assert all(s >= 0 and s + n <= whole for b in boxes for s, n, whole in zip(b.start, b.size, (90, 120), strict=True))


def test_a_long_slice_gives_squares():
    assert draw_box((5, 200), (0.9, 1.0), np.random.default_rng(0)).size == (5, 5)


def test_cutting_adds_no_brightness():
    """Bicubic interpolation alone overshoots at edges."""
    image = (np.indices((20, 20)).sum(0) % 7 > 3).astype(np.float32)[None]
    made = cut(image, views.Box((1, 2), (15, 16)), 64)
    assert made.shape == (1, 64, 64)
    assert (made.min(), made.max()) == (0, 1)


def test_cutting_smooths_what_is_too_fine_for_the_crop():
    """A pattern of single pixels, a quarter as large, is grey, not another pattern."""
    image = (np.indices((64, 64)).sum(0) % 2).astype(np.float32)[None]
    made = cut(image, views.Box((1, 3), (60, 52)), 16)
    assert np.abs(made - 0.5).max() < 0.1


def test_changes_are_as_frequent_as_configured(monkeypatch):
    """meddinov3.md 6.1 (18): the published blur happens where it should not, 1 - p of the time."""
    info = scans_of("2d")["v0"].info
    calls = {"gaussian_filter": 0, "_coarser": 0}
    for name in calls:
        original = getattr(views, name)

        def counting(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(views, name, counting)
    image = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)
    rng, same, number = np.random.default_rng(1), 0, 3000
    for _ in range(number):
        same += np.array_equal(distorted(image, info, [False], 1.0, rng), image)
    assert calls["gaussian_filter"] / number == pytest.approx(0.2, abs=0.025)
    assert calls["_coarser"] / number == pytest.approx(0.25, abs=0.025)
    assert same / number == pytest.approx(
        0.9 * 0.8 * 0.85 * 0.75 * 0.9, abs=0.03
    )  # noise, blur, contrast, coarser, gamma


def only(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """This change always, and no other."""
    for name in ("_NOISE", "_BLUR", "_CONTRAST", "_COARSE", "_GAMMA", "_WINDOW", "_DROPPED"):
        monkeypatch.setattr(views, name, float(name == change))


def test_numbers_without_a_unit_are_scaled_and_shifted(monkeypatch):
    only(monkeypatch, "_WINDOW")
    info = scans_of("2d")["v0"].info
    image = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    rng = np.random.default_rng(0)
    assert np.array_equal(distorted(image, info, [False], 1.0, rng), image)
    made = np.stack([distorted(image, info, [True], 1.0, rng) for _ in range(300)])
    assert np.abs(made.mean((1, 2, 3))).max() / info.intensity_std == pytest.approx(0.3, abs=0.02)
    assert [float(np.ptp(made, (1, 2, 3)).min()) / 2, float(np.ptp(made, (1, 2, 3)).max()) / 2] == pytest.approx(
        [0.7, 1.3], abs=0.02
    )


def test_gamma_leaves_what_is_beyond_the_scans_extremes(monkeypatch):
    only(monkeypatch, "_GAMMA")
    info = replace(scans_of("2d")["v0"].info, channel_ranges=((0.0, 1.0),))
    image = np.array([[[-2.0, 0, 0.5, 1, 3]]], np.float32)
    made = distorted(image, info, [False], 1.0, np.random.default_rng(0))[0, 0]
    assert made[[0, 1, 3, 4]].tolist() == [-2, 0, 1, 3]
    assert made[2] != 0.5


def test_one_of_several_channels_is_left_out(monkeypatch):
    only(monkeypatch, "_DROPPED")
    info = scans_of("two channels")["v0"].info
    image = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    rng = np.random.default_rng(0)
    flat = [tuple(np.ptp(distorted(image, info, [False] * 2, 1.0, rng), (1, 2)) == 0) for _ in range(20)]
    assert set(flat) == {(True, False), (False, True)}


# What learns ----------------------------------------------------------------------------------------------------------------


def test_the_teacher_follows_with_its_heads_and_not_its_buffers():
    """meddinov3.md 6.1 (9): from 0 towards 1 with momentum 0.9: 0.1, 0.19, 0.271."""
    method = model(momentum=0.9, late_momentum=1.0)
    for network, value in ((method.student, 1.0), (method.teacher, 0.0)):
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.fill_(value)
    found = []
    for _ in range(3):
        update_averages(method.momentum_pairs(), first(DINO))
        found.append({round(float(p.mean()), 6) for p in method.teacher.parameters()})
    assert found == [{0.1}, {0.19}, {0.271}]
    assert not any(buffer.any() for buffer in method.teacher.buffers())
    before = [p.clone() for p in method.teacher.parameters()]
    update_averages(method.momentum_pairs(), first(GRAM))
    assert all(torch.equal(a, b) for a, b in zip(before, method.teacher.parameters(), strict=True))


@pytest.mark.parametrize("stage", [DINO, GRAM, HIGH])
def test_only_the_student_has_gradients(stage):
    """meddinov3.md 6.1 (10)."""
    method = model()
    prepare_stage(method, stage_of(method, stage), [p for p in method.parameters() if p.requires_grad])
    batch = batch_of(method, scans_of("2d"), first(stage))
    method.loss(batch, first(stage))["loss"].backward()
    assert all(p.grad is None for network in (method.teacher, method.anchor) for p in network.parameters())
    assert all(p.grad is not None for p in method.student.parameters())
    assert method.student.heads.mask_token.grad.any()


def test_the_mask_token_learns_where_there_are_masks():
    method = model()
    batch = batch_of(method, scans_of("2d"), first(DINO))
    batch["masked"] = torch.zeros_like(batch["masked"])
    terms = method.loss(batch, first(DINO))
    terms["loss"].backward()
    assert float(terms["ibot"]) == 0
    assert not method.student.heads.mask_token.grad.any()


def test_last_layers_rest_in_the_first_hundredth():
    """meddinov3.md 1.5 and 6.1 (10): a tenth of the warm-up, which is a tenth of the stage."""
    method = model()
    stage = stage_of(method, DINO)
    groups = method.parameter_groups(stage)
    optimizer = build_optimizer(stage, groups)
    layers = [head.last_layer.weight for head in (method.student.heads.dino, method.student.heads.ibot)]
    moved = []
    for index in (5, 15):
        before = [layer.detach().clone() for layer in layers]
        set_rates(optimizer, stage, groups, first(DINO, index=index))
        method.loss(batch_of(method, scans_of("2d"), first(DINO)), first(DINO))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append([not torch.equal(a, b) for a, b in zip(before, layers, strict=True)])
    assert moved == [[False, False], [True, True]]


def rates(method: Any, stage: str = DINO) -> dict[str, float]:
    """Each parameter's share of the stage's rate, in the middle of the stage."""
    scales = {}
    for group in method.parameter_groups(stage_of(method, stage)):
        scale = group.scale(first(stage, index=500)) if callable(group.scale) else group.scale
        scales |= {id(p): scale for p in group.parameters}
    return {name: scales[id(p)] for name, p in method.student.named_parameters()}


def test_rates_fall_towards_the_image():
    """meddinov3.md 6.1 (14), for a transformer of four blocks."""
    found = rates(model(initialised=True, layer_decay=0.9))
    assert found["backbone.patch_embed.proj.weight"] == pytest.approx(0.9**5 * 0.2)
    assert found["backbone.cls_token"] == found["heads.mask_token"] == pytest.approx(0.9**5)
    assert found["backbone.blocks.0.attn.qkv.weight"] == pytest.approx(0.9**4)
    assert found["backbone.blocks.3.attn.qkv.weight"] == pytest.approx(0.9)
    assert (
        found["backbone.norm.weight"] == found["heads.dino.mlp.0.weight"] == found["heads.ibot.last_layer.weight"] == 1
    )
    assert rates(model(layer_decay=0.9))["backbone.patch_embed.proj.weight"] == pytest.approx(0.9**5)


def test_vectors_and_tokens_have_no_weight_decay():
    method = model()
    groups = method.parameter_groups(stage_of(method, DINO))
    plain = {id(p) for group in groups if group.weight_decay == 0.0 for p in group.parameters}
    names = {name for name, p in method.student.named_parameters() if id(p) in plain}
    assert {name.rpartition(".")[2] for name in names} == {
        "bias", "weight", "gamma_1", "gamma_2", "cls_token", "reg_token", "mask_token"
    }  # fmt: skip
    assert all("norm" in name for name in names if name.endswith("weight"))


def test_the_rate_goes_with_the_batch_and_weights_that_were_trained():
    """meddinov3.md 1.9 and 6.1 (14): 2e-4 for 64 slices, 5.7e-4 for 512; a quarter on few slices with trained weights."""
    wanted = {"rate": 2e-4}
    found = [[stage.learning_rate for stage in model(batch=b, **wanted).stages()] for b in (64, 512)]
    assert found[0] == pytest.approx([2e-4, 1e-4, 5e-5])
    assert found[1][0] == pytest.approx(5.66e-4, rel=1e-3)
    started = [
        model(initialised=True, slices=n, batch=64, **wanted).stages()[0].learning_rate for n in (49_000, 51_000)
    ]
    assert started == pytest.approx([5e-5, 2e-4])


def test_schedules_are_the_published_ones():
    """meddinov3.md 1.5, 1.7, 1.8 and 6.1 (14)."""
    method = shared()
    assert [late_fall(done) for done in (0, 0.9, 1)] == pytest.approx([1, 1, 0.1])
    assert [slow_rise(done) for done in (0, 0.5, 1)] == pytest.approx([0, 0.5, 1])
    assert [gram_weight(first(GRAM, index=i)) for i in (0, 25, 50, 900)] == pytest.approx([0, 1, 2, 2])
    assert gram_weight(first(HIGH)) == 1.5
    warmer = [teacher_temperature(first(DINO, index=i), 0.07) for i in (0, 50, 100, 900)]
    assert warmer == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert [teacher_temperature(first(stage), last) for stage, last in ((GRAM, 0.07), (DINO, 0.02))] == [0.07, 0.02]
    dino, high = stage_of(method, DINO), stage_of(method, HIGH)
    assert [rate_factor(dino, first(DINO, index=i)) for i in (0, 99, 500)] == pytest.approx([0.01, 1, 1])
    assert rate_factor(high, first(HIGH)) == 0
    assert [stage.clip_norm for stage in method.stages()] == [3, 3, 3]
    assert all(len(stage.clip_apart) == 3 for stage in method.stages())


def test_few_slices_have_guard_rails(caplog):
    """meddinov3.md 5: below 5000 slices a slower teacher and no KoLeo; below 500 training alone is better."""
    few, many = (model(slices=n, momentum=None, koleo=None) for n in (4_000, 6_000))
    assert (few.momentum, few.koleo_weight, many.momentum, many.koleo_weight) == (0.996, 0, 0.994, 0.1)
    caplog.clear()
    model(slices=400)
    assert "too few" in caplog.text
    caplog.clear()
    model(slices=4_000)
    assert "--init" in caplog.text
    caplog.clear()
    model(slices=4_000, initialised=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("initialised", "steps", "advised"),
    [
        (True, 100_000, "--steps 2200"),  # 20 · 6000 / 64 · 1.15
        (False, 100_000, "--steps 9700"),  # 90 · 6000 / 64 · 1.15
        (False, 300, "--steps 9000"),
        (False, 10_000, None),
        (True, 300, None),
    ],
)
def test_runs_that_are_too_long_or_too_short_to_help_say_so(caplog, initialised, steps, advised):
    model(slices=6_000, batch=64, steps=steps, gram_share=0.1, high_share=0.05, initialised=initialised)
    assert (advised in caplog.text) if advised else ("--steps" not in caplog.text)


def test_prototypes_follow_the_size_and_the_number_of_slices():
    assert [heads_of(CONFIG, width, 10**6).codes for width in (192, 384, 768)] == [4096, 16384, 65536]
    assert heads_of(CONFIG, 768, 1000).codes == 8000
    assert heads_of(replace(CONFIG, codes=77), 768, 1000).codes == 77
    assert (heads_of(CONFIG, 768, 10**6).hidden, heads_of(CONFIG, 768, 10**6).bottleneck) == (2048, 256)


def test_small_batches_have_a_running_mean():
    assert [model(batch=b, centering=None).centring for b in (31, 32)] == ["softmax", "sinkhorn"]


def test_scores_of_patches_are_never_all_there_at_once(monkeypatch):
    """Neither the teacher's nor the student's, forward nor backward."""
    monkeypatch.setattr(method_module, "ROWS", 5)
    method, widths = model(), []
    for network in (method.student, method.teacher):
        network.heads.ibot.last_layer.register_forward_hook(lambda _, __, out: widths.append(out.shape[:-1].numel()))
    batch = batch_of(method, scans_of("2d"), first(DINO))
    method.loss(batch, first(DINO))["loss"].backward()
    assert int(batch["masked"].sum()) > 10
    assert max(widths) == 5


def test_a_plan_short_of_memory_computes_blocks_twice_with_the_same_gradients():
    """Counted by what the first block is asked: student's large and small crops, forward and once more backward."""
    target, pool = target_of(NAME, "2d"), [scan.info for scan in scans_of("2d").values()]
    gradients, calls = [], []
    for checkpoint in (False, True):
        arguments = target.settings["architecture"]["arch_kwargs"] | {"use_checkpoint": checkpoint}
        changed = {**target.plan, "configurations": {**target.plan["configurations"]}}
        own = changed["configurations"]["2d_vit"]
        architecture = {**own["architecture"], "arch_kwargs": arguments}
        changed["configurations"]["2d_vit"] = {**own, "architecture": architecture}
        method: Any = build(NAME, replace(target, plan=changed), pool).eval()
        count: list[int] = []
        method.student.backbone.blocks[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        method.loss(batch_of(method, scans_of("2d"), first(DINO)), first(DINO))["loss"].backward()
        gradients.append(method.student.backbone.blocks[0].attn.qkv.weight.grad)
        calls.append(len(count))
    assert calls == [2, 4]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)


# What rests, and what stops -------------------------------------------------------------------------------------------------


def anchors(method: Any, stage: str, total: int, **options: Any) -> list[int]:
    """The steps after which the anchor is another."""
    terms = {"dino_total": torch.zeros(257), "ibot_total": torch.zeros(257)}
    found, value = [], method.anchor.cls_token.clone()
    for index in range(total):
        method.teacher.backbone.cls_token.data.fill_(float(index + 1))
        method.after_step({}, terms, first(stage, total, index))
        if not torch.equal(value, method.anchor.cls_token):
            found.append(index)
        value = method.anchor.cls_token.clone()
    return found


def test_the_anchor_is_the_teacher_of_three_tenths_of_the_first_stage():
    method = model(centering="sinkhorn")
    assert anchors(method, DINO, 20) == [5]
    assert anchors(method, GRAM, 20) == anchors(method, HIGH, 20) == []


def test_the_anchor_is_renewed_three_times_where_that_is_asked_for():
    assert anchors(model(centering="sinkhorn", gram_refresh=4), GRAM, 20) == [3, 7, 11]


def test_the_last_stage_weighs_small_crops_less_and_keeps_similarities():
    """meddinov3.md 1.6: 0.111 and 0.889 of the pairs with 2 large and 8 small crops, later half of the second."""
    method = model(koleo=0.0).eval()
    for stage, local, gram in ((DINO, 1.0, 0.0), (HIGH, 0.5, 1.5)):
        with torch.no_grad():
            terms = method.loss(batch_of(method, scans_of("2d"), first(stage)), first(stage))
        among, across = 2 / 6, 4 / 6  # of 2 large and 2 small crops
        wanted = among * terms["dino_large"] + local * across * terms["dino_small"] + terms["ibot"]
        if gram:
            wanted = wanted + gram * terms["gram"]
        assert float(terms["loss"]) == pytest.approx(float(wanted), rel=1e-5)
        assert ("gram" in terms) == (stage != DINO)


@pytest.mark.parametrize(
    ("sign", "message"),
    [({"usage": 0.05}, "same answer"), ({"entropy": 0.9999}, "no opinion"), ({"spread": 0.01}, "same features")],
)
def test_a_run_that_has_collapsed_stops_and_not_before_200_steps(sign, message):
    method = model(centering="sinkhorn")
    healthy = {"usage": 0.8, "entropy": 0.5, "spread": 0.9}
    terms = {key: torch.tensor(value) for key, value in (healthy | sign).items()}
    for index in range(200):
        method.after_step({}, terms, first(DINO, 1000, index))
    with pytest.raises(AutosegError, match=message):
        method.after_step({}, terms, first(DINO, 1000, 200))


def test_a_run_that_recovers_goes_on():
    method = model(centering="sinkhorn")
    healthy = {key: torch.tensor(value) for key, value in {"usage": 0.8, "entropy": 0.5, "spread": 0.9}.items()}
    for index in range(400):
        method.after_step(
            {}, healthy | ({} if index % 90 == 0 else {"spread": torch.tensor(0.0)}), first(DINO, 1000, index)
        )


# Runs -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_home(tmp_path)
    write_tiny_plan(dict(target_of(NAME, "2d").plan))
    return tmp_path


def run(**options: Any) -> Path:
    settings = {
        "meddinov3.batch": 2,
        "meddinov3.gram_share": 1,
        "meddinov3.high_share": 1,
        **options.pop("settings", {}),
    }
    return pretrain(
        DATASET, method=NAME, plan=PLAN, device="cpu", workers=0, settings=settings, **{"steps": 3, **options}
    )


def test_later_stages_need_weights(home: Path) -> None:
    with pytest.raises(SettingsError, match="goes on with weights"):
        run(stages="2,3")


def test_a_later_stage_goes_on_with_an_earlier_run(home: Path) -> None:
    earlier = run(stages="1", run="one")
    later = run(stages="3", init="meddinov3-one", run="two", settings={"meddinov3.late_momentum": 1.0})
    for name in ("encoder", "heads", "anchor"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (earlier, later))
        assert all(torch.equal(value, after[key]) for key, value in before.items())  # the teacher rests with momentum 1
    student = torch.load(later / "state.pt", weights_only=True)["method"]
    heads = load_file(earlier / "heads.safetensors")
    distance = (student["student.heads.dino.mlp.0.weight"] - heads["dino.mlp.0.weight"]).abs().max()
    assert 0 <= float(distance) < 1e-2  # it began there: a new head is 0.1 away


def test_a_run_goes_on_inside_its_stages(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """meddinov3.md 6.1 (18), with interruptions in the first stage and in the last."""
    whole = run(run="whole", steps=6)
    for steps in (1, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(SystemExit):
                run(run="parts", steps=6)
    parts = run(run="parts", steps=6)
    states = [torch.load(folder / "state.pt", weights_only=True)["method"] for folder in (whole, parts)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_published_weights_decide_the_network_and_its_details(home: Path, tmp_path: Path) -> None:
    torch.save(layouts.meddinov3(), tmp_path / "model.pth")
    folder = run(init=str(tmp_path / "model.pth"), settings={"meddinov3.late_momentum": 1.0, "meddinov3.momentum": 1.0})
    card = EncoderCard.from_json(read_json(folder / "encoder.json"))
    arguments = card.architecture["arch_kwargs"]
    assert (arguments["embed_dim"], arguments["depth"], arguments["eps"]) == (128, 4, 1e-6)
    assert "MedDINOv3" in card.licence
    published = read_weights(tmp_path / "model.pth").tensors
    kept = load_file(folder / "encoder.safetensors")
    assert torch.equal(
        kept["blocks.3.mlp.fc1.weight"], published["blocks.3.mlp.fc1.weight"]
    )  # a teacher that never moves
    summed = published["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.allclose(kept["patch_embed.proj.weight"], summed, atol=1e-6)


def test_the_size_decides_the_configuration():
    assert MedDINOv3Pretraining.configuration({"size": "Small"}) == "2d_vit_small"
    assert MedDINOv3Pretraining.configuration({}) == "2d_vit"
    with pytest.raises(SettingsError, match="contradict"):
        model(size="base")


def test_slices_are_read_before_they_are_enlarged(home: Path) -> None:
    target = target_of(NAME, "2d")
    assert MedDINOv3Pretraining.data_configuration(target) == "2d"
    run(stages="1")
    assert not list((home / "preprocessed" / DATASET).glob("*2d_vit*"))
