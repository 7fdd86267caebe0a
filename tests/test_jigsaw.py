"""The jigsaw's permutations, views and answers (specification of the tile tasks, §2.3 and §5)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from planners.errors import PlanError
from pretrain import training
from pretrain.checkpoint import load_encoder
from pretrain.encoders import build_segmentation_network
from pretrain.loop import pretrain
from pretrain.method import Step
from pretrain.methods.jigsaw import Jigsaw, JigsawConfig, JigsawSpec, permutation_count, shuffled
from pretrain.methods.jigsaw_permutations import affine_permutations, choose_permutations, smallest_distance
from pretrain.methods.rotation import wake_residual_branches
from pretrain.tiles import BatchSize, TileGrid
from tests.stubs import PLAN, make_home
from tests.test_tiles import assert_the_encoder_learns, scans_of, thick_target, tiny_target
from tests.tiny import DATASET, Array, dataset_json, tiny_plan

STEP = Step("main", 0, 10, 0)


def spec_of(grid: tuple[int, ...], permutations: int = 12) -> JigsawSpec:
    dims = len(grid)
    tile_grid = TileGrid(grid, (4, 7, 7)[3 - dims :], (3, 6, 6)[3 - dims :], (4, 8, 8)[3 - dims :])
    return JigsawSpec(tile_grid, BatchSize(2, 1, 100), permutations, "greedy", 2)


def tiny_model(grid: tuple[int, ...] = (2, 2, 2), channels: int = 1, permutations: int = 12) -> Jigsaw:
    torch.manual_seed(0)
    dims = len(grid)
    plan = tiny_plan(dims=dims, channels=channels)
    network = build_segmentation_network(plan, "3d_fullres" if dims == 3 else "2d", dataset_json(channels))
    return Jigsaw(network, spec_of(grid, permutations), JigsawConfig(embedding=8, hidden=16))


def textured(channels: int = 1, seed: int = 0) -> Array:
    return Array(np.random.default_rng(seed).normal(size=(channels, 13, 24, 23)), f"v{seed}")


def batch_of(model: Jigsaw, channels: int = 1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return model.collate([model.sample(model.spec, textured(channels, i), None, rng) for i in range(2)])  # type: ignore[arg-type]


# Permutations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "count", "least", "mean"),
    [
        (27, 100, 24, 26.12),
        (27, 1000, 23, None),
        (18, 100, 15, None),
        (12, 50, 10, None),
        (9, 64, 7, None),
        (8, 50, 6, None),
        (8, 12, 7, None),
        (4, 12, 2, None),
    ],
)
def test_greedy_permutations_lie_far_apart(tiles: int, count: int, least: int, mean: float | None) -> None:
    """The specification's numbers for seed 0; the last two were computed with this function."""
    chosen = choose_permutations(tiles, count, "greedy")
    assert chosen.shape == (count, tiles)
    assert (np.sort(chosen, 1) == np.arange(tiles)).all()
    assert smallest_distance(chosen) == least
    if mean is not None:
        apart = (chosen[:, None] != chosen[None]).sum(2)
        assert apart.sum() / (count * (count - 1)) == pytest.approx(mean, abs=0.005)


@pytest.mark.parametrize(("tiles", "count", "least"), [(27, 702, 26), (9, 72, 8), (8, 56, 7), (4, 12, 3)])
def test_affine_permutations_lie_as_far_apart_as_can_be(tiles: int, count: int, least: int) -> None:
    chosen = affine_permutations(tiles, np.random.default_rng(0))
    assert chosen.shape == (count, tiles)
    assert (np.sort(chosen, 1) == np.arange(tiles)).all()
    assert smallest_distance(chosen) == least


@pytest.mark.parametrize("tiles", [3, 4, 6])
def test_no_greedy_permutation_is_taken_twice(tiles: int) -> None:
    every = choose_permutations(tiles, math.factorial(tiles), "greedy")
    assert len(np.unique(every, axis=0)) == math.factorial(tiles)
    with pytest.raises(ValueError, match="different ones"):
        choose_permutations(tiles, math.factorial(tiles) + 1, "greedy")


def test_affine_permutations_do_not_shift_the_grid() -> None:
    """Renamed, translations (a = 1) leave few pairs of neighbours beside each other."""
    chosen = affine_permutations(27, np.random.default_rng(0))[:27]
    kept = []
    for order in chosen:
        cube = order.reshape(3, 3, 3)
        kept += [(np.diff(cube, axis=axis) == 9 // 3**axis).mean() for axis in range(3)]
    assert np.mean(kept) < 0.15  # 1 for the identity, which is among them


def test_the_same_seed_gives_the_same_permutations() -> None:
    for choice in ("greedy", "affine"):
        first, second, other = (choose_permutations(9, 20, choice, seed) for seed in (0, 0, 1))
        assert np.array_equal(first, second)
        assert not np.array_equal(first, other)


def test_how_many_permutations() -> None:
    assert [permutation_count(tiles, 20, "greedy") for tiles in (27, 18, 9, 8, 4)] == [100, 100, 64, 50, 12]
    assert [permutation_count(tiles, 1000, "greedy") for tiles in (27, 18, 9)] == [1000, 1000, 64]
    assert [permutation_count(tiles, 1000, "affine") for tiles in (27, 9, 4)] == [702, 64, 12]


# Views and answers ----------------------------------------------------------------------------------------------------


def test_slots_show_the_tiles_of_the_order_and_can_be_put_back() -> None:
    tiles = torch.randn(2, 8, 1, 4, 4, 4)
    orders = torch.from_numpy(choose_permutations(8, 6, "greedy")).reshape(2, 3, 8)
    mixed = shuffled(tiles, orders)
    assert mixed.shape == (2, 3, 8, 1, 4, 4, 4)
    for v in range(2):
        for p in range(3):
            assert torch.equal(mixed[v, p, 0], tiles[v, orders[v, p, 0]])
            assert torch.equal(mixed[v, p][orders[v, p].argsort()], tiles[v])


def test_shuffling_vectors_is_shuffling_tiles() -> None:
    model = tiny_model().eval()
    batch = batch_of(model)
    expected = model.answers(batch)
    identity = torch.arange(8)
    for v in range(2):
        for p in range(2):
            order = model.permutations[batch["labels"][v, p]]
            mixed = {"tiles": batch["tiles"][v : v + 1, order], "labels": torch.zeros(1, 1, dtype=torch.long)}
            original = model.permutations[0].clone()
            model.permutations[0] = identity
            assert torch.allclose(model.answers(mixed)[0, 0], expected[v, p], atol=1e-5)
            model.permutations[0] = original


@pytest.mark.parametrize(
    ("grid", "permutations", "expected"),
    [((3, 3, 3), 100, 4.605170), ((2, 3, 3), 100, 4.605170), ((3, 3), 64, 4.158883)],
)
def test_the_loss_of_equal_answers(grid: tuple[int, ...], permutations: int, expected: float) -> None:
    model = tiny_model(grid, permutations=permutations)
    nn.init.zeros_(model.head[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model.head[-1].bias)  # type: ignore[arg-type]
    assert float(model.loss(batch_of(model), STEP)["loss"]) == pytest.approx(expected, abs=1e-5)
    assert model.chance() == {"acc": 1 / permutations}


def test_every_order_is_asked_for_equally_often() -> None:
    spec = dataclasses.replace(spec_of((2, 2)), puzzles=6000)
    labels = Jigsaw.sample(spec, textured(), None, np.random.default_rng(0))["labels"]  # type: ignore[arg-type]
    assert np.abs(np.bincount(labels, minlength=12) - 500).max() < 4 * math.sqrt(500 * 11 / 12)


def test_a_region_with_too_much_air_does_not_count() -> None:
    spec = spec_of((3, 3, 3))
    rng = np.random.default_rng(0)
    flat = Array(np.zeros((1, 13, 24, 23)))
    assert not Jigsaw.sample(spec, flat, None, rng)["valid"].any()  # type: ignore[arg-type]
    assert Jigsaw.sample(spec, textured(), None, rng)["valid"].all()  # type: ignore[arg-type]
    model = tiny_model((3, 3, 3))
    batch = batch_of(model)
    batch["valid"][:] = False
    terms = model.loss(batch, STEP)
    assert float(terms["loss"]) == 0
    terms["loss"].backward()


def test_a_region_of_air_is_drawn_again() -> None:
    """Most draws hit the half of the scan that is air: ten of them hardly ever find no other."""
    scan = textured()
    voxels = np.concatenate([np.full_like(scan.voxels, scan.voxels.min()), scan.voxels, textured(seed=1).voxels], 2)
    shown = [
        Jigsaw.sample(spec_of((3, 3, 3)), Array(voxels), None, np.random.default_rng(seed))["valid"]  # type: ignore[arg-type]
        for seed in range(40)
    ]
    assert np.mean(shown) > 0.9


@pytest.mark.parametrize(("air_tiles", "valid"), [(4, True), (5, False)])
def test_four_of_27_tiles_may_be_air(air_tiles: int, valid: bool) -> None:
    spec = spec_of((3, 3, 3))
    voxels = textured().voxels[:, :12, :21, :21].copy()  # just the region
    for index in range(air_tiles):
        z, y, x = np.unravel_index(index, (3, 3, 3))
        voxels[:, 4 * z : 4 * z + 4, 7 * y : 7 * y + 7, 7 * x : 7 * x + 7] = voxels.min()
    views = Jigsaw.sample(spec, Array(voxels), None, np.random.default_rng(0))  # type: ignore[arg-type]
    assert views["valid"].all() == valid


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 3, 3), (3, 3)])
def test_every_encoder_parameter_learns(grid: tuple[int, ...], channels: int) -> None:
    model = tiny_model(grid, channels)
    wake_residual_branches(model.encoder)  # which give nothing at first, and their kernels no gradient
    assert_the_encoder_learns(model, model.loss(batch_of(model, channels), STEP)["loss"])
    heads = [p for p in model.parameters() if p.ndim > 1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "grid", "permutations"), [(13, (3, 3, 3), 100), (8, (2, 3, 3), 100), (5, (1, 3, 3), 64)]
)
def test_thin_scans_have_fewer_levels(depth: int, grid: tuple[int, ...], permutations: int) -> None:
    """Stride 2 on the first axis: tiles of four voxels, cut from at least two, so cells of at least three."""
    pool = [Array(np.zeros((1, depth, 40, 40))).info]
    spec = Jigsaw.plan(tiny_target(), pool, JigsawConfig())
    assert (spec.grid.grid, spec.permutations) == (grid, permutations)


@pytest.mark.parametrize(
    ("scan", "grid", "native", "size", "permutations"),
    [
        ((20, 320, 256), (3, 3, 3), (4, 72, 72), (8, 128, 128), 100),  # the specification's
        ((12, 320, 256), (2, 3, 3), (4, 72, 72), (8, 128, 128), 100),
        ((20, 320, 60), (3, 3, 1), (5, 80, 60), (8, 128, 128), 64),
    ],
)
def test_the_specifications_thick_slices(
    scan: tuple, grid: tuple, native: tuple, size: tuple, permutations: int
) -> None:
    spec = Jigsaw.plan(thick_target(), scans_of(*scan), JigsawConfig())
    assert (spec.grid.grid, spec.grid.native, spec.grid.size) == (grid, native, size)
    assert spec.permutations == permutations


def test_a_plan_of_two_dimensions() -> None:
    spec = Jigsaw.plan(tiny_target(2), [textured().info], JigsawConfig())
    assert (spec.grid.grid, spec.permutations) == ((3, 3), 64)
    small = Jigsaw.plan(tiny_target(2), [textured().info], JigsawConfig(**Jigsaw.presets["cpu"]))
    assert (small.grid.grid, small.permutations) == ((2, 2), 12)


def test_orders_that_do_not_exist_are_refused() -> None:
    pool = [textured().info]
    with pytest.raises(PlanError, match="at most 24"):
        Jigsaw.plan(tiny_target(2), pool, JigsawConfig(tiles=2, permutations=25))
    with pytest.raises(PlanError, match=r"at most 72[\s\S]*jigsaw.permutations=72"):
        Jigsaw.plan(tiny_target(2), pool, JigsawConfig(permutations=73, choice="affine"))
    with pytest.raises(PlanError, match=r"16 tiles[\s\S]*greedy"):
        Jigsaw.plan(tiny_target(2), [Array(np.zeros((1, 3, 60, 60))).info], JigsawConfig(tiles=4, choice="affine"))


def test_a_thousand_scans_have_a_thousand_orders() -> None:
    spec = Jigsaw.plan(tiny_target(), [textured().info] * 1000, JigsawConfig())
    assert (spec.grid.tiles, spec.permutations) == (27, 1000)
    assert Jigsaw.plan(tiny_target(), [textured().info] * 1000, JigsawConfig(choice="affine")).permutations == 702


def test_fewer_tiles_are_the_remedy_only_where_they_have_room() -> None:
    """The smallest tile has four voxels and a cell of five: three of them in 15, two in 10."""
    for pixels, remedy in ((14, r"to fix\s+--set jigsaw.tiles=2; or"), (9, r"to fix\s+--method")):
        with pytest.raises(PlanError, match=remedy):
            Jigsaw.plan(tiny_target(2), [Array(np.zeros((1, 5, pixels, pixels))).info], JigsawConfig())


@pytest.mark.parametrize("grid", [(3, 3, 3), (2, 2, 2), (3, 3)])
def test_the_picture_shows_the_puzzle_and_its_solution(grid: tuple[int, ...]) -> None:
    model = tiny_model(grid)
    titles = [axis.get_title() for axis in model.picture(batch_of(model)).axes]
    assert titles.count("what it gets") == titles.count("as it was") == 2
    assert sum("for the true order" in title for title in titles) == 2


# Runs -----------------------------------------------------------------------------------------------------------------


def run(name: str, **settings: Any) -> Path:
    own = {f"jigsaw.{key}": value for key, value in {"steps": 4, "volumes": 1, **settings}.items()}
    return pretrain(DATASET, method="jigsaw", plan=PLAN, device="cpu", workers=0, run=name, settings=own)


def test_a_run_that_goes_on_keeps_its_permutations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the code would choose others by then."""
    make_home(tmp_path)
    straight = run("straight")
    with monkeypatch.context() as patch:
        asked: list[int] = []
        second = contextlib.nullcontext(lambda: asked.append(1) or (15 if len(asked) == 2 else 0))
        patch.setattr(training, "stop_signal", lambda: second)
        with pytest.raises(SystemExit):
            run("parts")
    monkeypatch.setattr(
        "pretrain.methods.jigsaw.choose_permutations", lambda *given: choose_permutations(*given, seed=1)
    )
    parts = run("parts")
    first, other = (torch.load(f / "state.pt", weights_only=True)["method"] for f in (straight, parts))
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert not torch.equal(tiny_model().permutations, first["permutations"])


def test_an_encoder_says_from_which_orders_it_learned(tmp_path: Path) -> None:
    make_home(tmp_path)
    cards = [load_encoder(run(choice, steps=1, choice=choice))[1] for choice in ("greedy", "affine")]
    for card, choice in zip(cards, ("greedy", "affine"), strict=True):
        views = card.task["views"]
        assert (views["grid"]["grid"], views["permutations"], views["choice"]) == ([2, 2, 2], 12, choice)
        assert card.task["chance"] == {"acc": 1 / 12}
