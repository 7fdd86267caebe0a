"""RPL's classes, views and answers (specification of the tile tasks, §5)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from planners.errors import PlanError
from pretrain.encoders import build_segmentation_network
from pretrain.method import Step
from pretrain.methods.rotation import wake_residual_branches
from pretrain.methods.rpl import RPL, RPLConfig, RPLSpec, neighbour_index, neighbour_offset
from pretrain.tiles import BatchSize, TileGrid
from tests.test_tiles import assert_the_encoder_learns, coordinates, scans_of, thick_target, tiny_target
from tests.tiny import Array, dataset_json, tiny_plan

STEP = Step("main", 0, 10, 0)
CUBE, FLAT, PLANE = (3, 3, 3), (1, 3, 3), (3, 3)


def spec_of(grid: tuple[int, ...], neighbours: int = 4) -> RPLSpec:
    dims = len(grid)
    tile, size = (3, 6, 6)[3 - dims :], (4, 8, 8)[3 - dims :]
    cell = (4, 7, 7)[3 - dims :]
    return RPLSpec(TileGrid(grid, cell, tile, size), BatchSize(2, 1, 100), neighbours)


def tiny_model(grid: tuple[int, ...] = CUBE, channels: int = 1) -> RPL:
    torch.manual_seed(0)
    dims = len(grid)
    plan = tiny_plan(dims=dims, channels=channels)
    network = build_segmentation_network(plan, "3d_fullres" if dims == 3 else "2d", dataset_json(channels))
    return RPL(network, spec_of(grid), RPLConfig(embedding=8, hidden=16))


def textured(channels: int = 1, seed: int = 0) -> Array:
    return Array(np.random.default_rng(seed).normal(size=(channels, 13, 24, 23)), f"v{seed}")


def batch_of(model: RPL, channels: int = 1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    return model.collate([model.sample(model.spec, textured(channels, i), None, rng) for i in range(2)])  # type: ignore[arg-type]


def test_classes_and_offsets() -> None:
    offsets = [neighbour_offset(label, CUBE) for label in range(26)]
    assert set(offsets) == {(i - 1, j - 1, k - 1) for i, j, k in np.ndindex(3, 3, 3)} - {(0, 0, 0)}
    assert len(offsets) == 26
    expected = {0: (-1, -1, -1), 12: (0, 0, -1), 13: (0, 0, 1), 25: (1, 1, 1)}
    assert {label: offsets[label] for label in expected} == expected


@pytest.mark.parametrize("grid", [CUBE, FLAT, PLANE])
def test_swapping_the_tiles_gives_the_opposite_class(grid: tuple[int, ...]) -> None:
    last = math.prod(grid) - 2
    for label in range(last + 1):
        assert tuple(-o for o in neighbour_offset(label, grid)) == neighbour_offset(last - label, grid)


def test_class_counts_follow_the_grid() -> None:
    assert [spec_of(grid).classes for grid in (CUBE, FLAT, PLANE)] == [26, 8, 8]
    assert [spec_of(grid).centre for grid in (CUBE, FLAT, PLANE)] == [13, 4, 4]
    for grid, chance in ((CUBE, 1 / 26), (FLAT, 1 / 8), (PLANE, 1 / 8)):
        assert tiny_model(grid).chance() == {"acc": chance}


@pytest.mark.parametrize("grid", [CUBE, FLAT, PLANE])
def test_tiles_lie_where_their_class_says(grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a volume of coordinates: difference of the places = offset · cell ± slack, on each axis."""
    spec = spec_of(grid)
    monkeypatch.setattr("pretrain.methods.rpl.finish_tiles", lambda grid, tiles, info, rng: np.stack(tiles))
    slack = np.subtract(spec.grid.cell, spec.grid.native)
    for seed in range(50):
        views = RPL.sample(spec, coordinates((13, 24, 23)), None, np.random.default_rng(seed))  # type: ignore[arg-type]
        assert len(set(views["labels"].tolist())) == 4
        starts = views["tiles"].reshape(5, 3, -1)[:, 3 - len(grid) :, 0]
        for start, label in zip(starts[1:], views["labels"], strict=True):
            wanted = np.multiply(neighbour_offset(int(label), grid), spec.grid.cell)
            assert (np.abs(start - starts[0] - wanted) <= slack).all()


def test_every_class_is_drawn_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """26,000 draws of `sample`, without its reading: every class within four standard deviations of 1,000."""
    nothing: list[np.ndarray] = []
    monkeypatch.setattr("pretrain.methods.rpl.cut_tiles", lambda grid, source, which, rng: (nothing, np.zeros(5, bool)))
    monkeypatch.setattr("pretrain.methods.rpl.finish_tiles", lambda grid, tiles, info, rng: np.zeros(5))
    spec, volume = spec_of(CUBE), coordinates((13, 24, 23))
    counts = np.zeros(26, int)
    for seed in range(6500):
        labels = RPL.sample(spec, volume, None, np.random.default_rng(seed))["labels"]  # type: ignore[arg-type]
        counts += np.bincount(labels, minlength=26)
    assert counts.sum() == 26_000
    assert np.abs(counts - 1000).max() < 4 * math.sqrt(1000 * 25 / 26)


@pytest.mark.parametrize(("grid", "expected"), [(CUBE, 3.258097), (FLAT, 2.079442), (PLANE, 2.079442)])
def test_the_loss_of_equal_answers(grid: tuple[int, ...], expected: float) -> None:
    model = tiny_model(grid)
    nn.init.zeros_(model.head[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model.head[-1].bias)  # type: ignore[arg-type]
    assert float(model.loss(batch_of(model), STEP)["loss"]) == pytest.approx(expected, abs=1e-5)


def test_a_constant_volume_is_not_asked_for() -> None:
    flat = Array(np.full((1, 13, 24, 23), 7.0))
    views = RPL.sample(spec_of(CUBE), flat, None, np.random.default_rng(0))  # type: ignore[arg-type]
    assert not views["valid"].any()
    assert np.isfinite(views["tiles"]).all()
    model = tiny_model()
    batch = model.collate([views, views])
    terms = model.loss(batch, STEP)
    assert {name: float(value) for name, value in terms.items()} == {"loss": 0, "shown": 0}
    terms["loss"].backward()


def test_only_questions_with_air_are_left_out() -> None:
    """The last third of the volume is air: neighbours there are not asked for, others are."""
    voxels = textured().voxels.copy()
    voxels[..., 15:] = voxels.min()
    seen = []
    for seed in range(30):
        views = RPL.sample(spec_of(CUBE), Array(voxels), None, np.random.default_rng(seed))  # type: ignore[arg-type]
        seen += [(neighbour_offset(int(y), CUBE)[2], v) for y, v in zip(views["labels"], views["valid"], strict=True)]
    assert all(valid for offset, valid in seen if offset < 1)
    assert not all(valid for offset, valid in seen if offset == 1)


def test_neighbours_of_a_centre_of_air_are_not_asked_for() -> None:
    voxels = textured().voxels[:, :12, :21, :21].copy()  # just the region
    voxels[:, 4:8, 7:14, 7:14] = voxels.min()
    assert not RPL.sample(spec_of(CUBE), Array(voxels), None, np.random.default_rng(0))["valid"].any()  # type: ignore[arg-type]


def test_a_region_of_air_is_drawn_again() -> None:
    """The first half of the scan is air: ten draws hardly ever find no region with three valid questions of four."""
    scan = textured()
    voxels = np.concatenate([np.full_like(scan.voxels, scan.voxels.min()), scan.voxels], 2)
    asked = [RPL.sample(spec_of(CUBE), Array(voxels), None, np.random.default_rng(i))["valid"] for i in range(40)]  # type: ignore[arg-type]
    assert np.mean([valid.mean() >= 0.75 for valid in asked]) > 0.9


def test_questions_that_do_not_count_change_nothing() -> None:
    model = tiny_model().eval()
    batch = batch_of(model)
    batch["valid"][0, 1] = False
    before = model.loss(batch, STEP)
    batch["labels"][0, 1] = (batch["labels"][0, 1] + 5) % 26
    after = model.loss(batch, STEP)
    assert {k: float(v) for k, v in before.items()} == {k: float(v) for k, v in after.items()}


def test_the_order_of_the_two_tiles_matters() -> None:
    model = tiny_model().eval()
    batch = batch_of(model)
    batch["tiles"] = batch["tiles"][:, :2]
    forward = model.answers(batch)
    backward = model.answers({**batch, "tiles": batch["tiles"].flip(1)})
    assert not torch.allclose(forward, backward, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("grid", [CUBE, FLAT, PLANE])
def test_every_encoder_parameter_learns(grid: tuple[int, ...], channels: int) -> None:
    model = tiny_model(grid, channels)
    wake_residual_branches(model.encoder)  # which give nothing at first, and their kernels no gradient
    assert_the_encoder_learns(model, model.loss(batch_of(model, channels), STEP)["loss"])
    heads = [p for p in model.parameters() if p.ndim > 1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads)


@pytest.mark.parametrize("dims", [3, 2])
def test_a_plan_gives_a_grid(dims: int) -> None:
    pool = [textured(seed=i).info for i in range(3)]
    spec = RPL.plan(tiny_target(dims), pool, RPLConfig())
    assert (spec.grid.grid, spec.classes, spec.centre) == ((3,) * dims, 3**dims - 1, 3**dims // 2)
    assert all(
        s % r == 0 and s >= 2 * r for s, r in zip(spec.grid.size, tiny_target(dims).encoder.total_stride, strict=True)
    )
    drawn = RPL.draw(spec, pool, np.random.default_rng(0), STEP)
    assert len(drawn) == spec.batch.volumes


@pytest.mark.parametrize(
    ("scan", "grid", "native", "size", "zoom", "classes"),
    [
        ((20, 320, 256), (3, 3, 3), (4, 72, 72), (8, 128, 128), 1.78, 26),  # the specification's
        ((12, 320, 256), (1, 3, 3), (12, 72, 72), (12, 128, 128), 1.78, 8),
        ((20, 320, 60), (3, 3, 1), (5, 80, 60), (8, 128, 128), 1.6, 8),
    ],
)
def test_the_specifications_thick_slices(
    scan: tuple, grid: tuple, native: tuple, size: tuple, zoom: float, classes: int
) -> None:
    spec = RPL.plan(thick_target(), scans_of(*scan), RPLConfig())
    assert (spec.grid.grid, spec.grid.native, spec.grid.size) == (grid, native, size)
    assert spec.grid.size[1] / spec.grid.native[1] == pytest.approx(zoom, abs=0.005)
    assert (spec.classes, spec.centre) == (classes, (classes + 1) // 2)


def test_scans_that_are_too_small_on_two_axes_are_refused() -> None:
    with pytest.raises(PlanError, match=r"axis z[\s\S]*at least 15[\s\S]*--method rotation or exemplar"):
        RPL.plan(thick_target(), scans_of(12, 320, 60), RPLConfig())


def test_a_run_that_only_guesses_is_told() -> None:
    model = tiny_model()
    late = Step("main", 100, 200, 100)
    assert "guessing" in str(model.diagnose({"loss": 3.25, "acc": 0.04}, late))
    assert model.diagnose({"loss": 3.0, "acc": 0.04}, late) is None
    assert model.diagnose({"loss": 3.25, "acc": 0.1}, late) is None
    assert model.diagnose({"loss": 3.25, "acc": 0.04}, Step("main", 20, 200, 20)) is None
    assert model.diagnose({"shown": 0.0}, late) is None


@pytest.mark.parametrize("grid", [CUBE, FLAT, PLANE])
def test_the_picture_shows_questions_and_answers(grid: tuple[int, ...]) -> None:
    model = tiny_model(grid)
    titles = [axis.get_title() for axis in model.picture(batch_of(model)).axes]
    assert titles.count("which neighbour is this?") == 6
    assert sum("for the true place" in title for title in titles) == 6
    assert neighbour_index(np.array([12, 13]), 13).tolist() == [12, 14]
