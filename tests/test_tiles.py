"""The grid of tiles: sizes against the specification's table (§1.2), places against coordinates, views, air, batches."""

from __future__ import annotations

import dataclasses
import logging
import re

import numpy as np
import pytest
import torch

from planners.errors import PlanError
from pretrain.crops import is_air, other_scanner, volume_or_plane
from pretrain.encoders import EncoderInfo, build_segmentation_network, encoder_info, encoder_of
from pretrain.method import PretrainMethod, Target
from pretrain.tiles import (
    TileGrid,
    batch_size,
    check_pool,
    choose_grid,
    cut_tiles,
    draw_cases,
    encode_tiles,
    finish_tiles,
    tile_features,
    typical_shape,
)
from pretrain.volumes import CaseInfo
from tests.tiny import Array, dataset_json, tiny_plan

HIPPOCAMPUS = ((8, 8, 8), (40, 56, 40), (36, 50, 36))
THICK_SLICES = ((4, 64, 64), (20, 320, 256), (20, 320, 256))


def tiny_target(dims: int = 3) -> Target:
    plan = tiny_plan(dims=dims)
    configuration = "3d_fullres" if dims == 3 else "2d"
    return Target(plan, configuration, encoder_info(plan, configuration, dataset_json()))


def thick_target() -> Target:
    """The specification's plan of thick slices: 20×320×256 voxels of 5×0.6×0.6 mm, halved 2, 6 and 6 times."""
    plan = tiny_plan()
    plan["configurations"]["3d_fullres"] |= {"patch_size": [20, 320, 256], "spacing": [5.0, 0.6, 0.6]}
    strides = ((1, 1, 1), *[(1, 2, 2)] * 4, *[(2, 2, 2)] * 2)
    return Target(plan, "3d_fullres", EncoderInfo(1, (32, 64, 128, 256, 320, 320, 320), strides, (4, 64, 64), 3))


def scans_of(*shape: int) -> list[CaseInfo]:
    """What is known of three scans of `shape` voxels."""
    info = Array(np.zeros((1, 2, 2, 2))).info
    return [dataclasses.replace(info, id=f"scan{i}", shape=shape) for i in range(3)]


def assert_the_encoder_learns(method: PretrainMethod, loss: torch.Tensor) -> None:
    """Every parameter of the encoder gets a finite gradient that is not zero, but for biases that a norm takes off again."""
    loss.backward()
    encoder = method.export().module
    norms = [module for module in encoder.modules() if "Norm" in type(module).__name__]
    weights = [p for p in encoder.parameters() if p.ndim > 1] + [p for norm in norms for p in norm.parameters()]
    assert len(norms) > 2
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in weights)


def coordinates(shape: tuple[int, ...]) -> Array:
    """A volume whose channels hold the place of each voxel on each axis."""
    return Array(np.stack(np.meshgrid(*[np.arange(n, dtype=float) for n in shape], indexing="ij")))


def starts_of(tiles: list[np.ndarray]) -> np.ndarray:
    """First voxel of each tile of a volume of coordinates, (tiles, axes)."""
    return np.array([tile.reshape(len(tile), -1)[:, 0] for tile in tiles]).astype(int)


# Geometry -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "cell", "native", "size", "zoom"),
    [
        (HIPPOCAMPUS, (12, 16, 12), (10, 10, 10), (16, 16, 16), 1.6),
        (((32,) * 3, (128,) * 3, (200, 400, 400)), (66, 75, 75), (56,) * 3, (64,) * 3, 1.14),
        (((32,) * 3, (128,) * 3, (128,) * 3), (42,) * 3, (35,) * 3, (64,) * 3, 1.83),
        (THICK_SLICES, (6, 106, 85), (4, 72, 72), (8, 128, 128), 1.78),
    ],
)
def test_the_table_of_the_specification(case: tuple, cell: tuple, native: tuple, size: tuple, zoom: float) -> None:
    stride, patch, shape = case
    found = choose_grid((3, 3, 3), stride, patch, shape)
    assert (found.grid, found.cell, found.native, found.size) == ((3, 3, 3), cell, native, size)
    in_plane = zip(found.size[1:], found.native[1:], strict=True)
    assert max(s / n for s, n in in_plane) == pytest.approx(zoom, abs=0.005)


@pytest.mark.parametrize("seed", range(40))
def test_every_tile_can_be_encoded(seed: int) -> None:
    """Multiples of the stride, at least two voxels of the deepest map on each axis, or a refusal."""
    rng = np.random.default_rng(seed)
    stride = 2 ** rng.integers(1, 6, 3)
    patch, shape = stride * rng.integers(1, 9, 3), stride * rng.integers(1, 12, 3) + rng.integers(0, 5)
    try:
        found = choose_grid((3, 3, 3), stride, patch, shape)
    except PlanError:
        return
    assert all(s % r == 0 and s >= 2 * r for s, r in zip(found.size, stride, strict=True))
    assert all(
        0 < t <= c and n * c <= v for t, c, n, v in zip(found.native, found.cell, found.grid, shape, strict=True)
    )
    assert found.fits(shape)
    # Enlarged at most 2.5 times, but for the rounding of what is cut.
    assert all(s / 2.5 - t <= 0.5 for s, t in zip(found.size, found.native, strict=True))


def test_an_axis_that_is_never_halved_enlarges_no_other() -> None:
    """Twelve thin slices: tiles of two, where the specification's cells of two voxels would hold a single one."""
    found = choose_grid((3, 3, 3), (1, 64, 64), (7, 256, 256), (12, 512, 512))
    assert (found.cell, found.native, found.size) == ((3, 150, 150), (2, 127, 127), (2, 128, 128))


def test_an_axis_with_too_few_voxels_gets_one_tile() -> None:
    stride, patch = (8, 8, 8), (16, 40, 40)
    found = choose_grid((3, 3, 3), stride, patch, (17, 40, 40))
    assert (found.grid, found.native[0], found.size[0]) == ((1, 3, 3), 16, 16)  # not enlarged on that axis
    assert choose_grid((3, 3, 3), stride, patch, (18, 40, 40), one_by_one=True).grid == (2, 3, 3)
    assert choose_grid((3, 3, 3), stride, patch, (12, 40, 40), one_by_one=True).grid == (1, 3, 3)


def test_a_thin_axis_is_enlarged_to_what_the_encoder_needs() -> None:
    found = choose_grid((3, 3, 3), (8, 8, 8), (16, 40, 40), (10, 40, 40))
    assert (found.grid, found.native[0], found.size[0]) == ((1, 3, 3), 10, 16)
    with pytest.raises(PlanError, match="axis z"):
        choose_grid((3, 3, 3), (8, 8, 8), (16, 40, 40), (6, 40, 40))


def test_what_cannot_be_tiled_is_refused_with_the_axis_and_a_way_out() -> None:
    with pytest.raises(PlanError, match=r"axis x[\s\S]*rotation or exemplar"):
        choose_grid((3, 3, 3), (32, 32, 32), (64, 64, 64), (20, 200, 22))
    with pytest.raises(PlanError, match="axis y"):
        choose_grid((3, 3), (32, 32), (64, 64), (22, 200))  # a plane has no axis to spare
    with pytest.raises(PlanError, match="axis y"):
        choose_grid((3, 4, 3), (8, 32, 8), (64, 64, 64), (100, 30, 100), fixed_axis=1)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [2, 4, 8, 16, 32, 64])
def test_a_scan_of_the_stated_size_has_room_and_a_smaller_one_has_not(stride: int, tiles: int) -> None:
    def chosen(length: int) -> TileGrid:
        return choose_grid((tiles, 3), (stride, 2), (4 * stride, 8), (length, 100))

    with pytest.raises(PlanError) as refused:
        chosen(1)
    stated = int(re.findall(r"at least (\d+) voxels", str(refused.value))[0])
    assert chosen(stated).fits((stated, 100))
    with pytest.raises(PlanError, match=f"at least {stated} voxels"):
        chosen(stated - 1)


def test_the_size_that_nine_in_ten_scans_have() -> None:
    pool = [Array(np.zeros((1, n, 20, 2 * n))).info for n in range(10, 21)]
    assert typical_shape(pool, 3) == (11, 20, 22)
    assert typical_shape(pool, 2) == (20, 22)


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slack", "margin"), [(2, 0), (5, 1), (9, 2)])
def test_gaps_between_neighbours(slack: int, margin: int) -> None:
    """In [2m, 2(s − m)] over a thousand draws, both ends reached; no two tiles share a voxel."""
    grid = TileGrid((3, 3, 3), (4 + slack,) * 3, (4, 4, 4), (4, 4, 4))
    volume = coordinates(tuple(3 * c + 2 for c in grid.cell))
    gaps = []
    for seed in range(1000):
        tiles, _ = cut_tiles(grid, volume, range(27), np.random.default_rng(seed))  # type: ignore[arg-type]
        starts = starts_of(tiles).reshape(3, 3, 3, 3)
        for axis in range(3):
            gaps.append(np.diff(starts[..., axis], axis=axis) - 4)
    found = np.concatenate([g.ravel() for g in gaps])
    assert (found.min(), found.max()) == (2 * margin, 2 * (slack - margin))
    assert found.mean() == pytest.approx(slack, abs=0.1)


def test_tiles_lie_in_their_cells_and_all_of_the_scan_is_reached() -> None:
    grid = TileGrid((2, 3, 3), (5, 7, 6), (4, 5, 5), (4, 6, 6))
    volume = coordinates((13, 24, 20))
    least, most = np.full(3, 99), np.zeros(3, int)
    for seed in range(300):
        tiles, air = cut_tiles(grid, volume, range(18), np.random.default_rng(seed))  # type: ignore[arg-type]
        starts = starts_of(tiles)
        assert tiles[0].shape == (3, 4, 5, 5)
        assert not air.any()
        places = np.stack(np.unravel_index(np.arange(18), grid.grid), 1)
        corner = starts - places * grid.cell
        assert (np.ptp(corner, axis=0) <= np.subtract(grid.cell, grid.native)).all()
        least, most = np.minimum(least, starts.min(0)), np.maximum(most, starts.max(0))
    assert least.tolist() == [0, 0, 0]
    assert most.tolist() == [13 - 4, 24 - 5, 20 - 5]


def test_only_the_tiles_that_are_asked_for_are_cut() -> None:
    grid = TileGrid((3, 3, 3), (4, 4, 4), (4, 4, 4), (4, 4, 4))
    tiles, _ = cut_tiles(grid, coordinates((12, 12, 12)), [13, 0, 26], np.random.default_rng(0))  # type: ignore[arg-type]
    assert starts_of(tiles).tolist() == [[4, 4, 4], [0, 0, 0], [8, 8, 8]]


def test_a_scan_between_the_sizes_gets_smaller_gaps_and_a_smaller_one_smaller_tiles() -> None:
    grid = TileGrid((1, 3, 3), (4, 8, 8), (4, 6, 6), (4, 8, 8))
    tiles, _ = cut_tiles(grid, coordinates((4, 19, 18)), range(9), np.random.default_rng(0))  # type: ignore[arg-type]
    assert tiles[0].shape == (3, 4, 6, 6)
    assert grid.fits((4, 19, 18))
    assert not grid.fits((4, 19, 17))
    tiles, _ = cut_tiles(grid, coordinates((3, 15, 18)), range(9), np.random.default_rng(0))  # type: ignore[arg-type]
    assert tiles[0].shape == (3, 3, 5, 6)


def test_tiles_of_two_dimensions_come_from_slices_of_the_foreground() -> None:
    volume = coordinates((9, 12, 12))
    volume.info = dataclasses.replace(volume.info, foreground_box=((3, 5), (0, 12), (0, 12)))
    grid = TileGrid((3, 3), (4, 4), (3, 3), (4, 4))
    seen = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        tiles, _ = cut_tiles(grid, volume_or_plane(volume, 2, rng), range(9), rng)  # type: ignore[arg-type]
        assert tiles[0].shape == (3, 3, 3)
        seen |= {float(tile[0, 0, 0]) for tile in tiles}
    assert seen == {3.0, 4.0}


# Views ----------------------------------------------------------------------------------------------------------------


def test_each_tile_is_standardised() -> None:
    grid = TileGrid((1, 1, 3), (6, 6, 6), (5, 5, 5), (8, 8, 8))
    volume = Array(np.random.default_rng(0).normal(40, 7, (2, 6, 6, 18)) * np.linspace(1, 9, 18))
    tiles, _ = cut_tiles(grid, volume, range(3), np.random.default_rng(1))  # type: ignore[arg-type]
    views = finish_tiles(grid, tiles, volume.info, None)
    assert views.shape == (3, 2, 8, 8, 8)
    assert views.dtype == np.float32
    assert np.abs(views.mean((2, 3, 4))).max() < 1e-4
    assert np.abs(views.std((2, 3, 4)) - 1).max() < 1e-3


def test_a_flat_tile_is_not_blown_up() -> None:
    grid = TileGrid((1, 1), (4, 4), (4, 4), (4, 4))
    info = Array(np.random.default_rng(0).normal(0, 100, (1, 8, 8))).info
    views = finish_tiles(grid, [np.random.default_rng(0).normal(5, 1e-4, (1, 4, 4)).astype(np.float32)], info, None)
    assert np.abs(views).max() < 0.01
    nothing = Array(np.zeros((1, 8, 8))).info
    assert not finish_tiles(grid, [np.zeros((1, 4, 4), np.float32)], nothing, None).any()


def test_gain_offset_and_noise_differ_from_tile_to_tile() -> None:
    grid = TileGrid((1, 2), (16, 16), (16, 16), (16, 16))
    tile = np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32)
    info = Array(tile).info
    plain = finish_tiles(grid, [tile] * 2, info, None)
    rng = np.random.default_rng(1)
    differences, offsets, noises = [], [], []
    for _ in range(50):
        views = finish_tiles(grid, [tile] * 2, info, rng)
        gain = [np.polyfit(p.ravel(), v.ravel(), 1)[0] for p, v in zip(plain, views, strict=True)]
        differences.append(abs(gain[0] - gain[1]))
        assert 0.78 < min(gain) < max(gain) < 1.27
        assert np.abs(views.mean((1, 2, 3))).max() < 0.11
        offsets += [float(view.mean()) for view in views]
        noises += [float((v - g * p).std()) for v, g, p in zip(views, gain, plain, strict=True)]
    assert np.mean(differences) > 0.1
    assert np.std(offsets) > 0.04  # of a uniform number in ±0.1: 0.058
    assert 0.015 < np.mean(noises) < max(noises) < 0.055


def test_another_scanner_changes_each_channel_around_its_mean() -> None:
    image = np.random.default_rng(0).normal(0, 1, (2, 40, 40, 40)) * [[[[2.0]]], [[[50.0]]]] + [
        [[[10.0]]],
        [[[-300.0]]],
    ]
    mean, spread = image.mean((1, 2, 3), keepdims=True), image.std((1, 2, 3), keepdims=True)
    rng = np.random.default_rng(1)
    changed = np.stack([other_scanner(image, mean, spread, rng) for _ in range(60)])
    gain = (changed.std((2, 3, 4)) / spread.ravel()).T  # (channels, draws)
    offset = ((changed.mean((2, 3, 4)) - mean.ravel()) / spread.ravel()).T
    assert 0.79 < gain.min() < 0.86
    assert 1.18 < gain.max() < 1.26
    assert 0.08 < np.abs(offset).max() < 0.101
    assert abs(np.corrcoef(gain)[0, 1]) < 0.4
    assert abs(np.corrcoef(offset)[0, 1]) < 0.4


def test_air() -> None:
    rng = np.random.default_rng(0)
    voxels = np.where(np.arange(40) < 20, 0, 100)[None, None] + rng.normal(0, 0.5, (1, 40, 40))
    info = Array(voxels).info
    assert is_air(voxels[:, :, :20], info)
    assert is_air(voxels[:, :, :21], info)  # one column in 21
    assert not is_air(voxels[:, :, :24], info)
    assert is_air(np.full((1, 8, 8), 60.0), info)  # flat
    assert is_air(np.zeros((1, 8, 8)), Array(np.zeros((1, 8, 8))).info)


def test_air_outside_a_mask_is_air_although_it_is_not_the_lowest() -> None:
    """Z-scores inside a mask, 0 outside (`use_mask_for_norm`): flat tiles, and those with less than a tenth of tissue."""
    voxels = np.random.default_rng(0).normal(0, 1, (1, 10, 10, 60))
    voxels[..., :30] = 0
    info = Array(voxels).info
    assert info.intensity_range[0] < -1
    tissue = [is_air(voxels[..., first : first + 25], info) for first in (5, 7, 8, 30)]
    assert tissue == [True, True, False, False]  # 0, 2, 3 and 25 of 25 columns


# Pools and batches ----------------------------------------------------------------------------------------------------


def test_small_scans_are_left_out_and_too_many_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    grid = TileGrid((1, 3, 3), (4, 8, 8), (4, 6, 6), (8, 16, 16))
    good = [Array(np.zeros((1, 4, 18, 18)), f"good{i}").info for i in range(9)]
    bad = [Array(np.zeros((1, 4, 18, 17)), f"bad{i}").info for i in range(3)]
    with caplog.at_level(logging.WARNING, "autoseg"):
        check_pool(grid, [*good, bad[0]])
    assert "1 of 10 scans" in caplog.text
    with pytest.raises(PlanError, match=r"3 of 13: bad0, bad1, bad2[\s\S]*4×18×18"):
        check_pool(grid, [*good, good[0], *bad])  # 23 %
    rng = np.random.default_rng(0)
    drawn = [name for _ in range(20) for name in draw_cases(grid, [*good, *bad], 5, rng)]
    assert set(drawn) == {case.id for case in good}
    assert len(set(draw_cases(grid, good, 9, rng))) == 9
    assert len(draw_cases(grid, good[:2], 5, rng)) == 5
    assert set(draw_cases(grid, bad, 3, rng)) == {case.id for case in bad}
    with pytest.raises(PlanError, match=r"thin \(1×4×2 voxels\)[\s\S]*--seed"):
        draw_cases(grid, [Array(np.zeros((1, 1, 4, 2)), "thin").info], 3, rng)


def test_as_many_tiles_as_the_plan_leaves_memory_for() -> None:
    """1.5 batches of the plan: 2 · 8 · 24 · 20 · 1.5 = 11520 voxels; a tile of 8³ has 512, so 22 at once."""
    target, grid = tiny_target(), TileGrid((3, 3, 3), (8, 8, 8), (7, 7, 7), (8, 8, 8))
    found = batch_size(target, grid, encoded=5, volumes=None)
    assert (found.volumes, found.accumulate, found.at_once) == (4, 1, 22)
    found = batch_size(target, grid, encoded=27, volumes=None)
    assert (found.volumes, found.accumulate, found.at_once) == (1, 4, 22)
    assert batch_size(target, grid, encoded=27, volumes=None, least=2).accumulate == 2
    assert batch_size(target, grid, encoded=27, volumes=3).volumes == 3
    assert batch_size(target, TileGrid((3,) * 3, (1,) * 3, (1,) * 3, (1,) * 3), 1, None).volumes == 64


def test_norms_that_start_at_zero_learn_from_the_first_step() -> None:
    """nnU-Net begins with residual branches that give nothing: their kernels have to wait for them, and nothing else."""
    torch.manual_seed(0)
    encoder = encoder_of(build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json()))
    vectors = encode_tiles(encoder, torch.randn(2, 5, 1, 4, 8, 8), 100)
    (vectors * torch.randn_like(vectors)).sum().backward()
    norms = [module.weight for module in encoder.modules() if isinstance(module, torch.nn.InstanceNorm3d)]
    sleeping = [weight for weight in norms if not weight.any()]
    assert 0 < len(sleeping) < len(norms)
    assert all(torch.isfinite(weight.grad).all() and weight.grad.abs().sum() > 0 for weight in sleeping)


def test_encoding_in_parts_gives_the_same_vectors_and_gradients() -> None:
    torch.manual_seed(0)
    encoder = encoder_of(build_segmentation_network(tiny_plan(), "3d_fullres", dataset_json()))
    tiles = torch.randn(2, 5, 1, 4, 8, 8)
    results = []
    passes: list[int] = []
    encoder.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    for at_once in (100, 3):
        encoder.zero_grad()
        passes.clear()
        vectors = encode_tiles(encoder, tiles, at_once)
        vectors.square().sum().backward()
        results.append((vectors.detach(), [p.grad.clone() for p in encoder.parameters()]))
    assert sorted(passes) == sorted(2 * [3, 3, 3, 1])  # each part once more for the gradient
    (whole, whole_gradients), (parts, parts_gradients) = results
    assert whole.shape == (2, 5, 32 * 2 * 2 * 2)
    assert tile_features(encoder, TileGrid((1, 1, 5), (4, 8, 8), (4, 8, 8), (4, 8, 8))) == 32 * 2 * 2 * 2
    assert torch.allclose(whole, parts, atol=1e-6)
    for a, b in zip(whole_gradients, parts_gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    alone = encode_tiles(encoder, tiles[1:, 3:4], 100)
    assert torch.allclose(alone[0, 0], whole[1, 3], atol=1e-6)
