"""What every pretraining method must do: one suite over the catalog. A new method is covered by its line there.

Here are batches and weights, without the loop; `test_methods_run.py` goes through it, `test_methods_two_ranks.py` is about two
processes. What is particular to a method is tested in its own file: losses against numbers, views against coordinates,
learning checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from planners.errors import PlanError
from pretrain.catalog import entry
from pretrain.checkpoint import load_encoder, save_encoder
from pretrain.encoders import encoder_of
from pretrain.method import PretrainMethod
from pretrain.optimise import build_optimizer, prepare_stage, update_averages
from pretrain.transfer import transfer
from tests.geometries import (
    GEOMETRIES,
    NAMES,
    batch_of,
    build,
    built,
    every_method,
    network_of,
    new,
    scans_of,
    stages_of,
    target_of,
)
from tests.shared import tiny_card
from tests.tiny import Array


def over(kinds: Iterable[str]) -> pytest.MarkDecorator:
    """Every method on every kind of scans whose dimensions it works on."""
    pairs = [(kind, name) for kind in kinds for name in NAMES if GEOMETRIES[kind].dims in entry(name).dims]
    return pytest.mark.parametrize(("kind", "name"), pairs)


every_geometry = over(GEOMETRIES)
different_geometries = over(["two channels", "anisotropic", "2d"])
LEARNS = {"meddinov3": "student.backbone"}
"""What learns, where its moving average is kept."""
SEES = {"pumit": "vit", "meddinov3": "patch_embed"}
"""The part of the encoder that is called, where that is not the encoder itself."""
LATE = {"pumit": 50, "meddinov3": 40}
"""Steps of methods that begin with an answer which is the same everywhere: the mean of all words, or any teacher's."""
LEAST = {"meddinov3": 0.04}
"""By how much of the loss one batch must lower it, where not 0.1: MedDINOv3's is mostly the entropy of a teacher's answers."""
CUTS_WHAT_IS_NOT_THERE = {"pcrl"}
"""Methods that refuse no scan for its size: their windows may reach over its border."""


@every_geometry
def test_every_geometry_works(kind: str, name: str) -> None:
    """None of these scans is refused; views fit the network, and every kernel of the encoder gets a gradient."""
    model, scans = new(name, kind), scans_of(kind)
    for parameter in model.parameters():
        if not parameter.any() and parameter.ndim == 1:  # nnU-Net begins with residual branches that give nothing
            nn.init.ones_(parameter)
    shapes = []
    export = model.export()
    encoder = export.module if export.scope == "encoder" else encoder_of(export.module)
    if name in LEARNS:
        encoder = model.get_submodule(LEARNS[name])
    seen = getattr(encoder, SEES.get(name, ""), encoder)
    hook = seen.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    learnable = [p for p in model.parameters() if p.requires_grad]
    for phase, step in stages_of(model):
        prepare_stage(model, phase.stage, learnable)
        batch = batch_of(model, scans, step)
        terms = model.backward(batch, step, lambda loss: loss.backward())
        assert torch.isfinite(terms["loss"])
        assert {term for term in terms if term.startswith("acc")} <= model.chance().keys()
    hook.remove()
    stride = target_of(name, kind).encoder.total_stride
    assert all(n % s == 0 and n >= 2 * s for shape in shapes for n, s in zip(shape[2:], stride, strict=True))
    assert {shape[1] for shape in shapes} == {GEOMETRIES[kind].channels}
    # A bias in front of a norm has no effect and so no gradient to speak of; kernels must all have one.
    kernels = [p for p in encoder.parameters() if p.ndim > 1 and p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in kernels)
    assert figure_has_content(model.eval().picture(batch))


def figure_has_content(figure: Any) -> bool:
    return len(figure.axes) > 1 and any(axis.has_data() for axis in figure.axes)


@every_method
def test_scans_that_are_too_small_are_refused_with_a_remedy(name: str) -> None:
    few_voxels = Array(np.random.default_rng(0).normal(size=(2, 2, 3, 3)), spacing=GEOMETRIES["two channels"].spacing)
    scans = {key: replace(few_voxels.info, id=key) for key in ("a", "b")}
    if name not in CUTS_WHAT_IS_NOT_THERE:
        with pytest.raises(PlanError, match="to fix"):
            build(name, target_of(name, "two channels"), list(scans.values()))
        return
    model = build(name, target_of(name, "two channels"), list(scans.values()))
    _, step = stages_of(model)[0]
    drawn = model.draw(model.spec, list(scans.values()), np.random.default_rng(0), step)
    samples = [model.sample(model.spec, few_voxels, view, np.random.default_rng(0)) for _, view in drawn]  # type: ignore[arg-type]
    assert torch.isfinite(model.loss(model.collate(samples), step)["loss"])


@every_method
def test_scans_of_nothing_give_a_loss_that_is_a_number(name: str) -> None:
    model = new(name, "two channels")
    air = {key: Array(0 * scan.voxels, key) for key, scan in scans_of("two channels").items()}
    for _, step in stages_of(model):
        terms = model.backward(batch_of(model, air, step), step, lambda loss: loss.backward())
        assert torch.isfinite(terms["loss"])
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@every_method
def test_measuring_changes_nothing_and_gives_the_same_twice(name: str) -> None:
    model, scans = built(name, "two channels").eval(), scans_of("two channels")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _, step in stages_of(model):
        batch = batch_of(model, scans, step)
        with torch.no_grad():
            first, second = (model.loss(batch, step) for _ in range(2))
            model.picture(batch)
        assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in second.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@cache
def learned(name: str, kind: str) -> tuple[PretrainMethod, list[list[float]]]:
    """The method after a few steps on one batch a stage, and the losses of each stage."""
    scans, model = scans_of(kind), new(name, kind)
    learnable = [p for p in model.parameters() if p.requires_grad]
    course = []
    for phase, first in stages_of(model):
        prepare_stage(model, phase.stage, learnable)
        optimizer = build_optimizer(phase.stage, model.parameter_groups(phase.stage))
        batch, losses = batch_of(model, scans, first), []
        for index in range(LATE.get(name, 15)):
            step = replace(first, index=index, global_index=first.global_index + index)
            optimizer.zero_grad()
            terms = model.backward(batch, step, lambda loss: loss.backward())
            optimizer.step()
            update_averages(model.momentum_pairs(), step)
            with torch.no_grad():
                model.after_step(batch, terms, step)
            losses.append(float(terms["loss"]))
        print(name, kind, phase.stage.name, [round(loss, 3) for loss in losses[::4]])
        course.append(losses)
    return model, course


@different_geometries
def test_one_batch_can_be_learned(kind: str, name: str) -> None:
    """Each stage lowers its loss on the batch it sees again and again."""
    for losses in learned(name, kind)[1]:
        assert np.mean(losses[-5:]) < np.mean(losses[:3]) - LEAST.get(name, 0.1) * abs(np.mean(losses[:3]))


@different_geometries
def test_what_was_learned_comes_back_in_the_segmentation_network(kind: str, name: str, tmp_path: Path) -> None:
    """Every kernel that is exported has learned, and the network of the plan gives the method's features."""
    target, model = target_of(name, kind), learned(name, kind)[0].eval()
    export, start = model.export(), new(name, kind).export().module.state_dict()
    save_encoder(tmp_path, export.module, tiny_card(dict(target.plan), scope=export.scope))
    tensors, _ = load_encoder(tmp_path)
    assert not [key for key, value in tensors.items() if value.ndim > 1 and torch.equal(value, start[key])]
    network = network_of(target).eval()
    whole = export.scope == "encoder+decoder"
    report = transfer(tensors, network if whole else encoder_of(network))
    assert report.encoder_share == 1
    assert not report.unused
    encoder = encoder_of(export.module) if whole else export.module
    image = torch.randn(1, target.encoder.channels, *(2 * s for s in target.encoder.total_stride))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(encoder_of(network)(image), encoder(image), strict=True))
