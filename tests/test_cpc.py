"""CPC's sequences, loss and views (specification of the tile tasks, §2.1 and §5)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from planners.errors import PlanError
from pretrain.encoders import build_segmentation_network
from pretrain.method import Step
from pretrain.methods.cpc import CPC, CPCConfig, CPCSpec, choose_row_axis, context_sequences, row_loss
from pretrain.methods.rotation import wake_residual_branches
from pretrain.tiles import BatchSize, TileGrid
from tests.test_tiles import (
    assert_the_encoder_learns,
    coordinates,
    scans_of,
    starts_of,
    thick_target,
    tiny_target,
)
from tests.tiny import Array, dataset_json, tiny_plan

STEP = Step("main", 0, 10, 0)


def spec_of(dims: int = 3, row_axis: int = 1, levels: int = 3) -> CPCSpec:
    grid = [levels, 3, 3][3 - dims :]
    grid[row_axis] = 4
    tile_grid = TileGrid(tuple(grid), (4, 6, 7)[3 - dims :], (3, 5, 6)[3 - dims :], (4, 8, 8)[3 - dims :])
    return CPCSpec(tile_grid, BatchSize(2, 1, 100), row_axis)


def tiny_model(dims: int = 3, channels: int = 1, row_axis: int = 1, levels: int = 3) -> CPC:
    torch.manual_seed(0)
    plan = tiny_plan(dims=dims, channels=channels)
    network = build_segmentation_network(plan, "3d_fullres" if dims == 3 else "2d", dataset_json(channels))
    return CPC(network, spec_of(dims, row_axis, levels), CPCConfig(embedding=8, context=16))


def textured(channels: int = 1, seed: int = 0) -> Array:
    return Array(np.random.default_rng(seed).normal(size=(channels, 13, 26, 23)), f"v{seed}")


def batch_of(model: CPC, channels: int = 1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return model.collate([model.sample(model.spec, textured(channels, i), None, rng) for i in range(2)])  # type: ignore[arg-type]


def constant(volumes: int = 2, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.ones(volumes, rows, 9, 4),
        torch.ones(volumes, rows, 9, 4),
        torch.ones(volumes, rows, 9, dtype=torch.bool),
    )


# Loss -----------------------------------------------------------------------------------------------------------------


def test_the_loss_of_equal_scores() -> None:
    """ln(1 + negatives): 18 candidates for two volumes of nine columns."""
    loss = row_loss(*constant(), 0.1)["loss"]
    assert float(loss) == pytest.approx(2.890372, abs=1e-6)
    assert tiny_model().chance() == {"acc": pytest.approx(1 / 18)}


@pytest.mark.parametrize("masked", [1, 5])
def test_masked_tiles_are_neither_asked_for_nor_offered(masked: int) -> None:
    predicted, true, valid = constant()
    valid[0, :, :masked] = False
    predicted[0, :, :masked] = torch.randn(masked, 4)
    true[0, :, :masked] = torch.randn(masked, 4)
    assert float(row_loss(predicted, true, valid, 0.1)["loss"]) == pytest.approx(math.log(18 - masked), abs=1e-5)


def test_the_loss_of_certain_answers() -> None:
    """Orthonormal vectors, temperature 0.1, 17 negatives: ln(1 + 17 e^-10)."""
    vectors = torch.eye(18).reshape(2, 9, 18)[:, None].expand(2, 2, 9, 18)
    terms = row_loss(3 * vectors, vectors, torch.ones(2, 2, 9, dtype=torch.bool), 0.1)
    assert float(terms["loss"]) == pytest.approx(7.715e-4, abs=1e-6)
    assert float(terms["acc"]) == float(terms["shown"]) == 1


def test_nothing_to_ask_gives_no_loss_but_a_gradient() -> None:
    model = tiny_model()
    batch = batch_of(model)
    batch["valid"][:] = False
    terms = model.loss(batch, STEP)
    assert {name: float(value) for name, value in terms.items()} == {"loss": 0, "shown": 0}
    terms["loss"].backward()


def test_a_tile_that_is_alone_in_its_row_is_not_asked_for() -> None:
    """It could not be mistaken: the other row decides, whose two tiles are alike."""
    predicted, true, valid = constant(volumes=1)
    valid[:, 0, 1:] = False
    valid[:, 1, 2:] = False
    predicted[:, 0] = torch.randn(9, 4)
    terms = row_loss(predicted, true, valid, 0.1)
    assert float(terms["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert {name: float(terms[name]) for name in ("acc", "shown")} == {"acc": 0.5, "shown": pytest.approx(2 / 18)}


def test_targets_learn_too() -> None:
    predicted, true = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4, requires_grad=True)
    row_loss(predicted, true, torch.ones(2, 2, 9, dtype=torch.bool), 0.1)["loss"].backward()
    assert (true.grad.abs().sum(-1) > 0).all()


# Contexts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "row", "length"), [((3, 3), 1, 10), ((3, 3), 2, 35), ((3,), 1, 4), ((3,), 2, 9), ((1, 3), 1, 4)]
)
def test_lengths_of_sequences(columns: tuple[int, ...], row: int, length: int) -> None:
    assert context_sequences(columns, row).shape == (math.prod(columns), length)


def test_the_pyramid_above_a_tile() -> None:
    table = context_sequences((3, 3), 1)
    assert sorted(table[4]) == [*range(9), 13]  # the middle column: every tile above once, then its own
    assert table[4][-1] == 13
    assert table[0].tolist() == [4, 3, 4, 1, 0, 1, 4, 3, 4, 9]  # a corner: four tiles, seen again beyond the border
    assert len(set(table[0][:-1])) == 4
    deep = context_sequences((3, 3), 2)
    assert (deep[:, :25] < 9).all()  # the farthest row first
    assert ((deep[:, 25:34] >= 9) & (deep[:, 25:34] < 18)).all()
    assert deep[:, 34].tolist() == list(range(18, 27))


@pytest.mark.parametrize(("dims", "row_axis"), [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)])
def test_what_lies_below_never_reaches_the_context(dims: int, row_axis: int) -> None:
    model = tiny_model(dims, row_axis=row_axis).eval()
    batch = batch_of(model)
    width = math.prod(model.spec.columns)
    with torch.no_grad():
        before = model.contexts(model.embed(batch))
        below = {**batch, "tiles": batch["tiles"].clone()}
        below["tiles"][:, 2 * width :] = torch.randn_like(below["tiles"][:, 2 * width :])
        assert torch.equal(model.contexts(model.embed(below)), before)
        current = {**batch, "tiles": batch["tiles"].clone()}
        current["tiles"][:, width] = torch.randn_like(current["tiles"][:, width])  # the first tile of the second row
        after = model.contexts(model.embed(current))
    assert not torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 1:], before[:, 1:])


# Views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "row_axis"), [(3, 0), (3, 1), (3, 2), (2, 0), (2, 1)])
def test_rows_come_first_and_tiles_are_disjoint(dims: int, row_axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(dims, row_axis)
    monkeypatch.setattr("pretrain.methods.cpc.finish_tiles", lambda grid, tiles, info, rng: np.stack(tiles))
    for seed in range(20):
        views = CPC.sample(spec, coordinates((17, 32, 29)), None, np.random.default_rng(seed))  # type: ignore[arg-type]
        starts = starts_of(list(views["tiles"]))[:, 3 - dims :]
        rows = starts[:, row_axis].reshape(spec.rows, -1)
        assert (np.diff(rows.min(1)) > 0).all()
        assert (rows[1:].min(1) >= rows[:-1].max(1) + spec.grid.native[row_axis]).all()
        apart = np.abs(starts[:, None] - starts[None]) >= spec.grid.native
        assert (apart.any(2) | np.eye(len(starts), dtype=bool)).all()


def test_tiles_of_air_are_marked() -> None:
    voxels = textured().voxels.copy()
    voxels[:, :, :, 14:] = voxels.min()
    views = CPC.sample(spec_of(), Array(voxels), None, np.random.default_rng(0))  # type: ignore[arg-type]
    marked = ~views["valid"].reshape(4, 3, 3)  # rows (y), then z and x
    assert marked[..., 2].any()
    assert not marked[..., 0].any()


def test_the_mask_is_that_of_the_rows_below() -> None:
    model = tiny_model()
    batch = batch_of(model)
    batch["valid"][:, :18] = False  # the rows that are known
    assert model.predict(batch)[2].all()
    batch["valid"] = ~batch["valid"]
    assert not model.predict(batch)[2].any()


def test_the_temperature_is_the_users() -> None:
    model = tiny_model().eval()
    batch = batch_of(model)
    expected = row_loss(*model.predict(batch), 0.5)["loss"]
    model.config = dataclasses.replace(model.config, temperature=0.5)
    assert float(model.loss(batch, STEP)["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) != pytest.approx(float(row_loss(*model.predict(batch), 1.0)["loss"]), rel=1e-3)


def test_a_region_of_air_is_drawn_again() -> None:
    """The lower half of the scan is air: with ten tries rarely a region has more of it than may be."""
    scan = textured()
    voxels = np.concatenate([scan.voxels, np.full_like(scan.voxels, scan.voxels.min())], 2)
    shown = [
        CPC.sample(spec_of(), Array(voxels), None, np.random.default_rng(seed))["valid"].mean()  # type: ignore[arg-type]
        for seed in range(20)
    ]
    assert np.mean(shown) > 0.9


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "stride", "spacing", "axis"),
    [
        ((36, 50, 36), (8, 8, 8), (1, 1, 1), 1),
        ((90, 50, 36), (8, 8, 8), (1, 1, 1), 0),
        ((20, 320, 256), (4, 64, 64), (5, 0.6, 0.6), 1),
        ((40, 64, 160), (4, 8, 8), (1, 1, 1), 2),
        ((90, 50, 36), (8, 8, 8), (2, 1, 1), 1),
        ((50, 90), (8, 8), (1, 1), 1),
    ],
)
def test_rows_lie_where_the_scan_is_longest_and_never_across_thick_slices(
    shape: tuple, stride: tuple, spacing: tuple, axis: int
) -> None:
    assert choose_row_axis(shape, stride, spacing) == axis


@pytest.mark.parametrize(
    ("rows", "scan", "grid", "native", "zoom"),
    [
        (3, (20, 320, 256), (3, 3, 3), (4, 72, 72), 1.78),  # the specification's
        (4, (20, 320, 256), (3, 4, 3), (4, 68, 68), 1.88),
        (4, (12, 320, 256), (1, 4, 3), (12, 68, 68), 1.88),
    ],
)
def test_the_specifications_thick_slices(rows: int, scan: tuple, grid: tuple, native: tuple, zoom: float) -> None:
    spec = CPC.plan(thick_target(), scans_of(*scan), CPCConfig(rows=rows))
    assert (spec.grid.grid, spec.grid.native, spec.row_axis) == (grid, native, 1)
    assert spec.grid.size == ((8, 128, 128) if grid[0] == 3 else (12, 128, 128))
    assert spec.grid.size[1] / spec.grid.native[1] == pytest.approx(zoom, abs=0.005)


def test_plans_of_three_and_two_dimensions() -> None:
    pool = [Array(np.zeros((1, 13, 30, 24)), f"v{i}").info for i in range(3)]
    spec = CPC.plan(tiny_target(), pool, CPCConfig())
    assert (spec.grid.grid, spec.row_axis, spec.columns, spec.known) == ((3, 4, 3), 1, (3, 3), 2)
    assert spec.batch.volumes >= 2
    thin = [Array(np.zeros((1, 5, 30, 24)), f"v{i}").info for i in range(3)]
    assert CPC.plan(tiny_target(), thin, CPCConfig()).grid.grid == (1, 4, 3)
    plane = CPC.plan(tiny_target(2), pool, CPCConfig())
    assert (plane.grid.grid, plane.row_axis, plane.columns) == ((4, 3), 0, (3,))
    with pytest.raises(PlanError, match=r"grid of 4×3 tiles[\s\S]*to fix\s+--set cpc.rows=3; or"):
        CPC.plan(tiny_target(2), [Array(np.zeros((1, 5, 15, 15))).info], CPCConfig())
    with pytest.raises(PlanError, match="too small for tiles"):
        CPC.plan(tiny_target(2), [Array(np.zeros((1, 13, 10, 9))).info], CPCConfig())


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("dims", "levels"), [(3, 3), (3, 1), (2, 1)])
def test_every_encoder_parameter_learns(dims: int, levels: int, channels: int) -> None:
    model = tiny_model(dims, channels, row_axis=0 if dims == 2 else 1, levels=levels)
    wake_residual_branches(model.encoder)  # which give nothing at first, and their kernels no gradient
    assert_the_encoder_learns(model, model.loss(batch_of(model, channels), STEP)["loss"])
    heads = [p for p in model.parameters() if p.ndim > 1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)


def test_tiles_of_other_processes_are_candidates_too() -> None:
    """With a gather that appends another volume, the loss is that of the joint batch."""
    model = tiny_model().eval()
    batch = batch_of(model)
    joint = float(model.loss(batch, STEP)["loss"])
    halves = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    others = [iter(model.predict(halves[1 - i])) for i in range(2)]
    for i in range(2):
        other = others[i]

        def with_the_other(tensor: torch.Tensor, i: int = i, other: object = other) -> torch.Tensor:
            parts = [tensor, next(other).to(tensor.dtype)]  # type: ignore[call-overload]
            return torch.cat(parts if i == 0 else parts[::-1])

        model.gather = with_the_other
        assert float(model.loss(halves[i], STEP)["loss"]) == pytest.approx(joint, rel=1e-5)


@pytest.mark.parametrize(("dims", "row_axis"), [(3, 1), (3, 0), (2, 0)])
def test_the_picture_shows_what_is_expected(dims: int, row_axis: int) -> None:
    model = tiny_model(dims, row_axis=row_axis)
    titles = [axis.get_title() for axis in model.picture(batch_of(model)).axes]
    asked = 2 * math.prod(model.spec.columns)
    assert sum(f"of {asked} right" in title for title in titles) == 2


def test_a_picture_needs_no_other_process() -> None:
    """Only the first of several processes draws: waiting for the others would never end."""

    def fails(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("gathered")

    model = tiny_model()
    model.gather = fails
    model.picture(batch_of(model))
