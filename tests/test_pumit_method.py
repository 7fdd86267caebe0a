"""PUMIT's two stages: what learns, what rests, what is seen, when a run stops, and what is left behind."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from planners.configurations import with_configuration
from planners.errors import AutosegError, PlanError, PretrainedMismatch, SettingsError
from planners.files import write_json
from planners.plans import plan_path
from pretrain.checkpoint import load_extras
from pretrain.encoders import build_segmentation_network, encoder_info
from pretrain.importers.pumit import read_tokenizer
from pretrain.loop import pretrain
from pretrain.method import Batch, Step, Target
from pretrain.methods.pumit.masking import masked_tokens
from pretrain.methods.pumit.method import PUMITPretraining
from pretrain.methods.pumit.settings import PUMITConfig, by_size
from pretrain.networks.sac import SACConvTranspose3d
from pretrain.optimise import build_optimizer, prepare_stage
from pretrain.settings import configure
from tests import layouts
from tests.stubs import PLAN, make_home
from tests.tiny import DATASET, Array, dataset_json, tiny_plan
from trainers.sources import find_source

CONFIGURATION = "3d_fullres_sac"
CONFIG = PUMITConfig(**{**PUMITPretraining.presets["cpu"], "mim_batch": 2, "tokenizer_batch": 2})
FIRST = {stage: Step(stage, 0, 1000, 0) for stage in ("tokenizer", "mim")}


@cache
def small_plan(channels: int = 1) -> dict:
    plan = tiny_plan(channels=channels) | {"autoseg": {"budget": "cpu", "gpu_memory_gb": 8, "labels": 3}}
    return with_configuration(plan, CONFIGURATION)


def scans(channels: int = 1, shape: tuple[int, int, int] = (32, 40, 50)) -> list[Array]:
    rng = np.random.default_rng(0)
    return [Array(rng.normal(size=(channels, *shape)), f"v{n}", spacing=(1.0, 1.0, 1.0)) for n in range(3)]


def model(channels: int = 1, config: PUMITConfig = CONFIG) -> PUMITPretraining:
    plan = small_plan(channels)
    target = Target(plan, CONFIGURATION, encoder_info(plan, CONFIGURATION, dataset_json(channels)))
    spec = PUMITPretraining.plan(target, [scan.info for scan in scans(channels)], config)
    torch.manual_seed(0)
    return PUMITPretraining(build_segmentation_network(plan, CONFIGURATION, dataset_json(channels)), spec, config)


def segmentation_network() -> Any:
    return build_segmentation_network(small_plan(), CONFIGURATION, dataset_json(1))


def batch_of(method: PUMITPretraining, stage: str, channels: int = 1, seed: int = 0) -> Batch:
    pool = {scan.info.id: scan for scan in scans(channels)}
    drawn = method.draw(method.spec, [s.info for s in pool.values()], np.random.default_rng(seed), FIRST[stage])
    return method.collate(
        [
            method.sample(method.spec, pool[case], parameters, np.random.default_rng(n))
            for n, (case, parameters) in enumerate(drawn)
        ]  # type: ignore[arg-type]
    )


def after_preparing(method: PUMITPretraining, stage: str) -> list[Tensor]:
    """What learns in a stage, as the loop prepares it."""
    (chosen,) = (s for s in method.stages() if s.name == stage)
    prepare_stage(method, chosen, list(method.parameters()))
    optimizer = build_optimizer(chosen, method.parameter_groups(chosen))
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_the_tokenizer_rests_while_its_tokens_are_predicted() -> None:
    method = model()
    learning = {id(p) for p in after_preparing(method, "mim")}
    assert not method.tokenizer.training
    assert method.encoder.training
    assert not learning & {id(p) for p in method.tokenizer.parameters()}
    method.loss(batch_of(method, "mim"), FIRST["mim"])["loss"].backward()
    assert all(p.grad is None for p in method.tokenizer.parameters())
    assert learning == {id(p) for p in method.parameters() if p.grad is not None}


def test_the_transformer_rests_while_the_tokenizer_learns() -> None:
    method = model()
    learning = {id(p) for p in after_preparing(method, "tokenizer")}
    method.loss(batch_of(method, "tokenizer"), FIRST["tokenizer"])["loss"].backward()
    assert learning == {id(p) for p in method.tokenizer.parameters()}
    assert all(p.grad is not None for p in method.tokenizer.parameters())
    assert all(p.grad is None for p in (*method.encoder.parameters(), *method.head.parameters()))


def test_only_matrices_decay() -> None:
    method = model()
    for stage in method.stages():
        matrices, others = method.parameter_groups(stage)
        assert others.weight_decay == 0
        assert matrices.weight_decay is None
        assert all(p.ndim > 1 for p in matrices.parameters)
    ids = {id(p) for p in others.parameters}
    vit = method.encoder.vit
    assert {id(method.mask_token), id(vit.cls_token), id(vit.pos_embed), id(vit.patch_embed["proj"].bias)} <= ids
    assert id(vit.patch_embed["proj"].weight) not in ids


def test_what_is_masked_is_not_seen() -> None:
    """Other voxels where a token is masked leave the answers as they are, elsewhere they do not."""
    method = model().eval()
    batch = batch_of(method, "mim")
    grid = [n // 16 for n in batch["image"].shape[2:]]
    hidden = masked_tokens(batch["visible"], int(np.prod(grid))).reshape(-1, 1, *grid)
    where = hidden.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    with torch.no_grad():
        answers = method.answers(batch)
        noise = torch.rand(batch["image"].shape)
        assert torch.equal(method.answers({**batch, "image": torch.where(where, noise, batch["image"])}), answers)
        assert not torch.allclose(
            method.answers({**batch, "image": torch.where(where, batch["image"], noise)}), answers
        )


def test_answers_where_tokens_are_seen_cost_nothing() -> None:
    method = model()
    batch = batch_of(method, "mim")
    answers = method.answers(batch).detach().requires_grad_()
    method.answers = lambda batch: answers  # type: ignore[method-assign]
    method.loss(batch, FIRST["mim"])["loss"].backward()
    assert answers.grad is not None
    hidden = masked_tokens(batch["visible"], answers.shape[1])
    assert torch.equal(answers.grad.abs().sum(-1) > 0, hidden & batch["inside"])


def test_padding_counts_in_neither_stage() -> None:
    """Other answers for tokens of padding, other tokens there: the same loss."""
    method = model()
    batch = batch_of(method, "mim")
    batch["inside"][:, 0] = False
    batch["visible"] = torch.arange(1, 1 + batch["visible"].shape[1]).expand(2, -1).clone()
    answers = method.answers(batch).detach()
    other = answers.clone()
    other[:, 0] += torch.randn(answers.shape[-1])
    losses = []
    for given in (answers, other):
        method.answers = lambda batch, given=given: given  # type: ignore[method-assign]
        losses.append(float(method.loss(batch, FIRST["mim"])["loss"]))
    assert losses[0] == losses[1]
    batch = batch_of(method, "tokenizer")
    whole = method.loss(batch, FIRST["tokenizer"])["sharpness"]
    batch["inside"][:, 1:] = False
    assert float(method.loss(batch, FIRST["tokenizer"])["sharpness"]) != float(whole)


def test_a_view_that_shows_nothing_changes_no_term() -> None:
    method = model().eval()
    for stage in ("tokenizer", "mim"):
        batch = batch_of(method, stage)
        batch["valid"][1] = False
        other = {**batch, "image": batch["image"].clone()}
        other["image"][1] = torch.rand(other["image"][1].shape)
        one, two = (method.loss(b, FIRST[stage]) for b in (batch, other))
        assert {k: float(v) for k, v in one.items()} == pytest.approx({k: float(v) for k, v in two.items()}, abs=1e-5)
        assert float(one["shown"]) == 0.5


def test_the_transformer_sees_one_channel_in_the_range_of_the_plan() -> None:
    method = model(channels=2).eval()
    kernel = method.encoder.vit.patch_embed["proj"].weight
    assert torch.equal(kernel[:, 0], kernel[:, 1])
    batch = batch_of(method, "mim", channels=2)
    seen: list[Tensor] = []
    method.encoder.vit.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.answers(batch)
    assert torch.equal(seen[0][:, 0], seen[0][:, 1])
    for view, low, high, image in zip(seen[0], batch["low"], batch["high"], batch["image"], strict=True):
        assert low < -2
        assert high > 2
        assert torch.allclose((view[:1] - low) / (high - low), image, atol=1e-5)


def test_a_token_of_all_slices_whatever_the_degree() -> None:
    """Two stages on thick slices: shapes agree, and the degree's own difference is reported."""
    method = model()
    thick = [Array(scan.voxels[:, ::4], scan.info.id, spacing=(4.0, 1.0, 1.0)) for scan in scans()]
    plain = replace(method.spec, crops={k: replace(c, zoom=0.0) for k, c in method.spec.crops.items()})
    drawn = method.draw(plain, [s.info for s in thick], np.random.default_rng(0), FIRST["tokenizer"])
    pool = {scan.info.id: scan for scan in thick}
    batch = method.collate([method.sample(plain, pool[c], p, np.random.default_rng(0)) for c, p in drawn])  # type: ignore[arg-type]
    assert batch["degree"] == 2
    assert batch["image"].shape[2] == 8
    terms = method.loss(batch, FIRST["tokenizer"])
    assert float(terms["l1_DA2"]) == float(terms["l1"])


# Collapse -------------------------------------------------------------------------------------------------------------


def after(method: PUMITPretraining, index: int, total: int, used: float = 1.0, shown: float = 1.0) -> None:
    terms = {"used": torch.tensor(used), "shown": torch.tensor(shown)}
    method.after_step({}, terms, Step("tokenizer", index, total, index))


def test_one_code_for_a_tenth_of_the_stage_ends_the_run() -> None:
    method = model()
    for index in range(1000, 1299):
        after(method, index, 3000)
    with pytest.raises(AutosegError, match=r"collapsed(.|\n)*300 steps in a row(.|\n)*pumit.diversity=0.15"):
        after(method, 1299, 3000)


def test_one_code_is_no_bad_sign_before_200_steps() -> None:
    method = model()
    for index in range(200):
        after(method, index, 300)
    with pytest.raises(AutosegError, match="collapsed"):
        after(method, 200, 300)


def test_a_second_code_starts_the_count_again() -> None:
    method = model()
    for index in range(1000, 1299):
        after(method, index, 3000)
    after(method, 1299, 3000, used=2.0)
    for index in range(1300, 1599):
        after(method, index, 3000)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, None),
        ({"explained": 0.01}, "restores 1%"),
        ({"used": 9.0}, "Only 9 of 64"),
        ({"choices": 20.0}, "among 20"),
    ],
)
def test_a_tokenizer_that_says_little_is_called_so_at_its_end(changed: dict[str, float], expected: str | None) -> None:
    method, recent = model(), {"explained": 0.3, "used": 40.0, "choices": 2.0} | changed
    said = method.diagnose(recent, Step("tokenizer", 95, 100, 95))
    assert said is None if expected is None else said is not None and expected in said
    assert method.diagnose(recent, Step("tokenizer", 5, 100, 5)) is None
    assert method.diagnose({"kl": 1.0}, Step("mim", 95, 100, 195)) is None


# Settings and what is left --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, CONFIGURATION), ("none", CONFIGURATION), ("B", CONFIGURATION + "_b"), ("official", CONFIGURATION + "_b")],
)
def test_the_size_names_the_configuration(size: str | None, expected: str) -> None:
    assert PUMITPretraining.configuration({} if size is None else {"size": size}) == expected


def test_a_size_and_another_configuration_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match=r"b and 3d_fullres_sac"):
        model(config=replace(CONFIG, size="b"))


def test_the_size_decides_what_is_left_open() -> None:
    """The tokenizers of methods/pumit.md §8 and §3.2, and the two rows of weights of §3.3."""

    def decided(**given: Any) -> tuple[Any, ...]:
        return astuple(by_size(configure(PUMITConfig, "pumit", given)))

    assert decided() == decided(size="s") == ((64, 128, 256), 512, (4, 8, 8), 0.1, 0.05)
    assert decided(size="B") == decided(size="l") == ((128, 256, 512), 1024, (5, 10, 10), 0.1, 0.05)
    assert decided(size="official") == ((128, 256, 512), 1024, (5, 10, 10), 0.03, 1.0)
    assert decided(size="b", codes=16)[1] == 16


def test_the_official_tokenizer_sums_slices_and_decides_from_the_start() -> None:
    official = replace(CONFIG, size="official", diversity=0.0, sharpness=1.0)
    method = model(config=CONFIG)
    other = PUMITPretraining(segmentation_network(), method.spec, official)
    for one, pool in ((method, "mean"), (other, "sum")):
        assert {m.transposed_pool for m in one.tokenizer.modules() if isinstance(m, SACConvTranspose3d)} == {pool}
    batch = batch_of(method, "tokenizer")
    other.tokenizer.load_state_dict(method.tokenizer.state_dict())
    terms = other.loss(batch, FIRST["tokenizer"])
    assert float(terms["loss"]) == pytest.approx(float(terms["l1"] + terms["mse"] - terms["sharpness"]), rel=1e-5)


def test_the_published_tokenizer_takes_the_place_of_its_stage(tmp_path: Path) -> None:
    torch.save(layouts.pumit_tokenizer(codes=10), tmp_path / "simple-soft.ckpt")
    config = replace(CONFIG, tokenizer=str(tmp_path / "simple-soft.ckpt"))
    method = PUMITPretraining(segmentation_network(), model().spec, config)
    assert [stage.name for stage in method.stages()] == ["mim"]
    found = read_tokenizer(tmp_path / "simple-soft.ckpt", gray=True).tensors
    assert all(torch.equal(value, found[name]) for name, value in method.tokenizer.state_dict().items())
    assert method.loss(batch_of(method, "mim"), FIRST["mim"])["loss"].isfinite()


def test_a_run_with_the_published_tokenizer_keeps_it(home: Path, tmp_path: Path) -> None:
    torch.save(layouts.pumit_tokenizer(codes=10), tmp_path / "simple-soft.ckpt")
    folder = run(steps=2, settings={"pumit.tokenizer": str(tmp_path / "simple-soft.ckpt")})
    kept = load_file(folder / "tokenizer.safetensors")
    found = read_tokenizer(tmp_path / "simple-soft.ckpt", gray=True).tensors
    assert all(torch.equal(value, found[name]) for name, value in kept.items())


def test_crops_are_no_larger_than_the_scans() -> None:
    """32 × 40 × 50 voxels are 2 × 3 × 4 tokens."""
    crops = model(config=replace(CONFIG, mim_crop=(4, 8, 8), tokenizer_crop=(2, 2, 2))).spec.crops
    assert crops["mim"].tokens == (2, 3, 4)
    assert crops["tokenizer"].tokens == (2, 2, 2)


def test_constant_scans_are_refused() -> None:
    plan = small_plan()
    target = Target(plan, CONFIGURATION, encoder_info(plan, CONFIGURATION, dataset_json(1)))
    with pytest.raises(PlanError, match="constant"):
        PUMITPretraining.plan(target, [Array(np.ones((1, 20, 20, 20))).info], CONFIG)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    root = make_home(tmp_path / "root")
    write_json(plan_path(DATASET, PLAN), small_plan())
    return root


def run(**options: Any) -> Path:
    given = {"plan": PLAN, "device": "cpu", "workers": 0, "settings": {"pumit.codes": "16"}, **options}
    return pretrain(DATASET, method="pumit", **given)


def test_a_tokenizer_is_used_again(home: Path) -> None:
    """`--stages mim --init EARLIER`: the tokenizer of the earlier run, in another run of the method."""
    with pytest.raises(SettingsError, match=r"needs a trained tokenizer(.|\n)*--init"):
        run(run="none", stages="mim", steps=2)
    first = run(steps=3)
    assert first.parent.name == f"{PLAN}__{CONFIGURATION}"
    second = run(run="again", init="pumit", stages="mim", steps=2)
    assert second.parent == first.parent
    files = [(folder / "tokenizer.safetensors").read_bytes() for folder in (first, second)]
    assert files[0] == files[1]
    with pytest.raises(PretrainedMismatch, match=r"does not fit the settings(.|\n)*settings.json"):
        run(run="other", init="pumit", stages="mim", steps=2, settings={"pumit.codes": "32"})


def test_a_run_that_leaves_the_transformer_alone_says_so(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "autoseg"):
        run(run="words", stages="tokenizer", steps=2)
        assert "does not train the encoder" in caplog.text
        assert "--init pumit-words" in caplog.text
        with pytest.raises(PretrainedMismatch, match="--init pumit-words"):
            find_source(DATASET, "pumit-words", None, None, "cpu")
        caplog.clear()
        run(run="all", init="pumit-words", stages="mim", steps=2)
    assert "does not train" not in caplog.text
    assert find_source(DATASET, "pumit-all", None, None, "cpu").weights.card.trained


def test_no_tokenizer_beside_the_weights_is_none(tmp_path: Path) -> None:
    assert load_extras(tmp_path, {"tokenizer": model().tokenizer}) == []
