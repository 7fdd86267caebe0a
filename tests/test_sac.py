"""Spatially adaptive convolution: what can be proved of it. Statements and numbers: methods/pumit.md §2 and §7."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d, conv_transpose3d

from planners.errors import PlanError
from pretrain.kernel_depth import inflate_depth, pool_depth
from pretrain.networks.sac import (
    SACConv3d,
    SACConvTranspose3d,
    SACSequential,
    Spacing,
    degree_of_planes,
    require_multiple,
)


def repeat(x: Tensor, times: int) -> Tensor:
    """Each slice `times` times."""
    return x.repeat_interleave(times, dim=2)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def down(k: int, inputs: int = 2, outputs: int = 3) -> SACConv3d:
    torch.manual_seed(k)
    return SACConv3d(inputs, outputs, 2**k, 2**k).double()


def three(stride: int = 1, **options: Any) -> SACConv3d:
    torch.manual_seed(3)
    return SACConv3d(2, 3, 3, stride, 1, **options).double()


def up(k: int, **options: Any) -> SACConvTranspose3d:
    torch.manual_seed(k)
    return SACConvTranspose3d(3, 2, 2**k, 2**k, **options).double()


# Spacing -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing_mm", "da0"),
    [
        ((5, 0.7, 0.7), 2),
        ((3, 0.8, 0.8), 1),
        ((1, 1, 1), 0),
        ((0.6, 0.6, 0.6), 0),
        ((10, 1.25, 1.25), 3),
        ((1.5, 0.5, 0.5), 1),
        ((1, 3, 3), 0),
        ((2, 0.5, 2), 2),
        ((4.9999995, 1.25, 1.25), 2),
        ((1e8, 1, 1), 5),
        ((0.3, 0.3), 5),
    ],
)
def test_the_degree_of_an_image_in_a_network_of_stride_16(spacing_mm: tuple[float, ...], da0: int) -> None:
    assert Spacing.of(spacing_mm, 16) == Spacing(da0, 0)


def test_planes_have_the_lowest_degree_that_keeps_every_kernel_flat() -> None:
    for stride, degree in ((1, 1), (2, 2), (16, 5), (32, 6)):
        assert degree_of_planes(stride) == degree
        assert Spacing(degree).halved(degree - 1).degree == 1  # so the deepest 3³ kernel is flat
    with pytest.raises(ValueError, match="power of 2"):
        degree_of_planes(12)


@pytest.mark.parametrize("spacing_mm", [(5, 0.7, 0.7), (10, 1.25, 1.25), (1, 1, 1), (24, 1, 1)])
def test_the_degree_is_that_of_the_spacing_every_map_has(spacing_mm: tuple[float, ...]) -> None:
    spacing, map_mm = Spacing.of(spacing_mm, 64), spacing_mm
    degrees = [spacing.degree]
    for _ in range(5):
        map_mm = tuple(mm * factor for mm, factor in zip(map_mm, spacing.stride(1), strict=True))
        spacing = spacing.halved(1)
        degrees.append(spacing.degree)
        assert Spacing.of(map_mm, 64).degree == spacing.degree
    assert degrees == sorted(degrees, reverse=True)


def test_impossible_spacings_are_refused() -> None:
    with pytest.raises(ValueError, match="count from 0"):
        Spacing(0, 1).halved(-2)
    with pytest.raises(ValueError, match="count from 0"):
        Spacing(-1)


# Down ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4])
def test_isotropic_images_meet_the_plain_convolution_bit_by_bit(k: int) -> None:
    layer, x = down(k).float(), random(2, 2, 32, 16, 16, dtype=torch.float32)
    y, spacing = layer(x, Spacing(0, 1))
    assert torch.equal(y, conv3d(x, layer.weight, layer.bias, 2**k))
    assert spacing == Spacing(0, 1 + k)


@pytest.mark.parametrize(("k", "d"), itertools.product([1, 2, 4], range(6)))
def test_thick_slices_give_what_thin_copies_of_them_give(k: int, d: int) -> None:
    """plain(rep_d(x)) = rep_{max(d - k, 0)}(SAC_{DA = d}(x)) at every position."""
    layer, x = down(k), random(1, 2, 3 * 2 ** max(k - d, 0), 2 * 2**k, 2**k)
    adaptive, _ = layer(x, Spacing(d))
    plain = conv3d(repeat(x, 2**d), layer.weight, layer.bias, 2**k)
    assert torch.allclose(plain, repeat(adaptive, 2 ** max(d - k, 0)), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("k", "d"), itertools.product([1, 2, 4], range(6)))
def test_weights_of_one_group_learn_alike(k: int, d: int) -> None:
    layer, group = down(k), 2 ** min(k, d)
    y, _ = layer(random(1, 2, 2 ** max(k - d, 0) * 2, 2**k, 2**k), Spacing(d))
    (y**2).sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    assert torch.equal(gradient, repeat(gradient[:, :, ::group], group))
    assert gradient.unique().numel() > 1


def test_a_patch_embedding_of_16_at_every_degree() -> None:
    depths = []
    for da0 in range(6):
        layer = SACConv3d(1, 2, 16, 16)
        depth = max(16 >> da0, 1)
        y, spacing = layer(random(1, 1, 2 * depth, 32, 32, dtype=torch.float32), Spacing(da0))
        assert y.shape == (1, 2, 2, 2, 2)
        assert spacing == Spacing(da0, 4)
        depths.append(depth)
    assert depths == [16, 8, 4, 2, 1, 1]


@pytest.mark.parametrize("da0", [4, 5])
def test_a_2d_kernel_spread_over_depth_answers_as_in_2d(da0: int) -> None:
    layer, flat = SACConv3d(3, 4, 16, 16), random(4, 3, 16, 16, dtype=torch.float32) / 64
    with torch.no_grad():
        layer.weight.copy_(inflate_depth(flat.unsqueeze(2), 16, "average"))
    x = random(2, 3, 3, 32, 48, seed=1, dtype=torch.float32)
    y, _ = layer(x, Spacing(da0))
    for z in range(3):
        assert torch.allclose(y[:, :, z], conv2d(x[:, :, z], flat, layer.bias, 16), atol=1e-6, rtol=0)


# Kernels whose windows overlap ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_3_kernels_are_plain_where_slices_are_thin_bit_by_bit(stride: int) -> None:
    layer, x = three(stride).float(), random(2, 2, 5, 7, 6, dtype=torch.float32)
    y, spacing = layer(x, Spacing(2, 2))
    assert torch.equal(y, conv3d(x, layer.weight, layer.bias, stride, 1))
    assert spacing == Spacing(2, 1 + stride)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_3_kernels_differ_from_thin_copies_only_where_slices_meet(d: int) -> None:
    """At the first copy of slice q by w₀·(x[q - 1] - x[q]), at the last by w₂·(x[q + 1] - x[q]); nowhere else."""
    layer, x, copies = three(), random(1, 2, 4, 6, 5), 2**d
    adaptive, _ = layer(x, Spacing(d))
    plain = conv3d(repeat(x, copies), layer.weight, layer.bias, 1, 1)
    residual = (plain - repeat(adaptive, copies)).unflatten(2, (4, copies))
    zero = torch.zeros_like(x[:, :, :1])
    before, after = torch.cat([zero, x[:, :, :-1]], 2), torch.cat([x[:, :, 1:], zero], 2)
    expected = torch.zeros_like(residual)
    expected[:, :, :, 0] = conv3d(before - x, layer.weight[:, :, :1], None, 1, (0, 1, 1))
    expected[:, :, :, -1] += conv3d(after - x, layer.weight[:, :, 2:], None, 1, (0, 1, 1))
    assert torch.allclose(residual, expected, atol=1e-12, rtol=0)
    assert residual[:, :, :, 1:-1].abs().sum() < 1e-11  # (R - 2) / R of the positions are equal
    assert (residual[:, :, :, [0, -1]].abs().amax((0, 1, 4, 5)) > 1e-3).all()  # so for d = 1 no position is


@pytest.mark.parametrize(("kernel", "padding"), [((3, 3, 3), (1, 1, 1)), ((2, 3, 3), (0, 1, 1))])
@pytest.mark.parametrize("da0", [0, 1, 3])
def test_strided_kernels_with_overlap_become_flat_too(
    kernel: tuple[int, int, int], padding: tuple[int, int, int], da0: int
) -> None:
    layer, x = SACConv3d(2, 3, kernel, 2, padding).double(), random(1, 2, 6, 8, 10)
    y, spacing = layer(x, Spacing(da0))
    flat = conv3d(x, layer.weight.sum(2, keepdim=True), layer.bias, (1, 2, 2), (0, 1, 1))
    assert torch.equal(y, flat if da0 else conv3d(x, layer.weight, layer.bias, 2, padding))
    assert spacing == Spacing(da0, 1)


def test_the_promoting_rule_keeps_3_kernels_whole_at_degree_1() -> None:
    layer, x = three(k3_rule="promote"), random(1, 2, 5, 6, 4)
    assert torch.equal(layer(x, Spacing(1))[0], layer(x, Spacing(0))[0])
    assert torch.equal(layer(x, Spacing(2))[0], three()(x, Spacing(2))[0])
    strided = three(2, k3_rule="promote")
    assert torch.equal(strided(x, Spacing(1))[0], three(2)(x, Spacing(1))[0])


@pytest.mark.parametrize("da0", [0, 2])
def test_kernels_of_one_voxel_never_change(da0: int) -> None:
    layer, x = SACConv3d(2, 3, 1).double(), random(1, 2, 3, 5, 4)
    y, spacing = layer(x, Spacing(da0, 1))
    assert torch.equal(y, conv3d(x, layer.weight, layer.bias))
    assert spacing == Spacing(da0, 1)


# Up ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_isotropic_maps_meet_the_plain_transposed_convolution_bit_by_bit(k: int, mode: str) -> None:
    layer, x = up(k, transposed_pool=mode).float(), random(2, 3, 2, 3, 4, dtype=torch.float32)
    y, spacing = layer(x, Spacing(0, 2))
    assert torch.equal(y, conv_transpose3d(x, layer.weight, layer.bias, 2**k))
    assert spacing == Spacing(0, 2 - k)


EVERY_STEP = list(itertools.product(range(7), range(5), range(1, 5)))


def depth_factor(layer: nn.Module, channels: int, spacing: Spacing, depth: int) -> float:
    plane = 2**layer.halvings
    y, _ = layer(torch.zeros(1, channels, depth, plane, plane), spacing)
    return y.shape[2] / depth


def test_every_step_up_undoes_the_step_down() -> None:
    for da0, n, k in EVERY_STEP:
        shrinks = depth_factor(SACConv3d(1, 1, 2**k, 2**k), 1, Spacing(da0, n), 16)
        grows = depth_factor(SACConvTranspose3d(1, 1, 2**k, 2**k), 1, Spacing(da0, n + k), 1)
        assert shrinks * grows == 1, (da0, n, k)
        assert 1 / shrinks == Spacing(da0, n).stride(k)[0]


def test_the_articles_exponent_would_not_undo_the_step_down() -> None:
    """min(k, DA0 - DA) gives isotropic volumes no depth back, and thick slices a depth that was never taken away."""

    def article(da0: int, n: int, k: int) -> int:
        return min(k, da0 - max(da0 - n, 0))

    for da0, n, k, wrong in ((0, 4, 2, 0), (2, 2, 2, 2)):
        ours = depth_factor(up(k).float(), 3, Spacing(da0, n), 1)
        assert ours == 1 / depth_factor(down(k).float(), 2, Spacing(da0, n - k), 16)
        assert article(da0, n, k) == wrong
        assert 2**wrong != ours


def test_up_is_the_adjoint_of_down() -> None:
    """⟨down(x), y⟩ = ⟨x, up(y)⟩ with one kernel, without bias, slices summed in both."""
    for da0, n, k in itertools.product(range(5), range(3), (1, 2)):
        encode, decode = SACConv3d(2, 3, 2**k, 2**k).double(), SACConvTranspose3d(3, 2, 2**k, 2**k).double()
        with torch.no_grad():
            encode.weight.copy_(random(*encode.weight.shape))
            decode.weight.copy_(encode.weight)
            for layer in (encode, decode):
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        x = random(1, 2, 8, 8, 4, seed=1)
        below, spacing = encode(x, Spacing(da0, n))
        y = random(*below.shape, seed=2)
        above, back = decode(y, spacing)
        assert back == Spacing(da0, n)
        assert float(((below * y).sum() - (x * above).sum()).detach().abs()) <= 1e-12 * x.numel()


@pytest.mark.parametrize(("da0", "n", "k"), [(0, 2, 2), (1, 2, 2), (2, 2, 2), (5, 4, 2), (3, 4, 1), (1, 1, 1)])
def test_averaged_slices_are_the_mean_of_the_thin_ones_they_stand_for(da0: int, n: int, k: int) -> None:
    layer, x = up(k, transposed_pool="mean"), random(2, 3, 3, 2, 4)
    thin, _ = layer(x, Spacing(0, n))
    thick, _ = layer(x, Spacing(da0, n))
    size = thick.shape[2] // 3  # slices for each of the input
    assert size == 2 ** min(k, max(n - da0, 0))
    averaged = thin.unflatten(2, (3, size, 2**k // size)).mean(4).flatten(2, 3)
    assert torch.allclose(thick, averaged, atol=1e-12, rtol=0)


def test_summed_slices_are_the_sum() -> None:
    layer, x = up(2), random(1, 3, 2, 3, 2)
    y, _ = layer(x, Spacing(2, 2))
    assert torch.equal(y, conv_transpose3d(x, pool_depth(layer.weight, 1), layer.bias, (1, 4, 4)))


# All -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: SACConv3d(1, 1, 4, 2),
        lambda: SACConv3d(1, 1, 3, 1),
        lambda: SACConv3d(1, 1, 3, 3),
        lambda: SACConv3d(1, 1, 1, 2),
        lambda: SACConv3d(1, 1, 5, 1, 2),
        lambda: SACConv3d(1, 1, 2, 2, 1),
        lambda: SACConv3d(1, 1, (1, 2, 2), (1, 2, 2)),
        lambda: SACConv3d(1, 1, (1, 3, 3), 1, (0, 1, 1)),
        lambda: SACConvTranspose3d(1, 1, 3, 1, 1),
        lambda: SACConvTranspose3d(1, 1, 4, 2, 1),
        lambda: SACConvTranspose3d(1, 1, 6, 6),
    ],
)
def test_other_kernels_are_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="adaptive"):
        make()


def test_images_that_windows_do_not_cover_are_refused() -> None:
    layer = down(2)
    with pytest.raises(PlanError, match="1 × 6 × 8 voxels") as caught:
        layer(random(1, 2, 1, 6, 8), Spacing(2))
    assert "1 × 4 × 4" in str(caught.value)
    with pytest.raises(PlanError, match="multiples of 4 × 4 × 4"):
        layer(random(1, 2, 1, 8, 8), Spacing(0))
    with pytest.raises(PlanError, match="multiples of 8 × 16 × 16"):
        require_multiple((8, 16, 24), Spacing(1).stride(4))
    require_multiple((8, 32, 16), Spacing(1).stride(4))


class Network(nn.Module):
    """All kinds of layers, down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = SACSequential(
            SACConv3d(1, 4, 4, 4), nn.GELU(), SACConv3d(4, 4, 3, 1, 1), SACSequential(SACConvTranspose3d(4, 1, 4, 4))
        )

    def forward(self, x: Tensor, spacing: Spacing) -> tuple[Tensor, Spacing]:
        return self.layers(x, spacing)


@pytest.mark.parametrize("da0", [0, 1, 5])
def test_a_sequence_hands_the_spacing_on(da0: int) -> None:
    x = torch.zeros(1, 1, 4, 8, 12)
    y, spacing = Network()(x, Spacing(da0))
    assert (y.shape, spacing) == (x.shape, Spacing(da0))


def test_a_compiled_network_is_one_graph_and_answers_the_same() -> None:
    torch.manual_seed(0)
    network, x = Network(), random(2, 1, 4, 8, 12, dtype=torch.float32)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for da0 in (0, 2):
        y, spacing = compiled(x, Spacing(da0))
        assert torch.allclose(y, network(x, Spacing(da0))[0], atol=1e-6)
        assert spacing == Spacing(da0)


def test_weights_are_plain_tensors_that_do_not_depend_on_the_image() -> None:
    layer = SACConv3d(2, 3, 4, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.ones(1, 2, 4, 4, 4), Spacing(5))
    assert {name: tuple(tensor.shape) for name, tensor in before.items()} == {"weight": (3, 2, 4, 4, 4), "bias": (3,)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
