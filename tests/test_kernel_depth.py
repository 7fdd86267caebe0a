"""Kernels become shallower and deeper by one rule. Values: by hand (methods/pumit.md §2.3)."""

from __future__ import annotations

import pytest
import torch

from pretrain.kernel_depth import inflate_depth, pool_depth


def profile(*values: float) -> torch.Tensor:
    """A kernel whose slices have these values."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1, 1).expand(2, 3, -1, 2, 2)


def slices(kernel: torch.Tensor) -> list[float]:
    assert torch.equal(kernel, kernel[:1, :1, :, :1, :1].expand_as(kernel))
    return kernel[0, 0, :, 0, 0].tolist()


def test_neighbouring_slices_are_summed_or_averaged() -> None:
    assert slices(pool_depth(profile(1, 2, 3, 4), 2)) == [3, 7]
    assert slices(pool_depth(profile(1, 2, 3, 4), 1)) == [10]
    assert slices(pool_depth(profile(1, 2, 3), 1)) == [6]
    assert slices(pool_depth(profile(1, 2, 3, 4), 2, "mean")) == [1.5, 3.5]


def test_a_kernel_of_the_right_depth_is_not_touched() -> None:
    kernel = profile(1, 2, 3)
    assert pool_depth(kernel, 3) is kernel


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_sum_along_depth_stays(depth: int) -> None:
    kernel = torch.randn(3, 2, 16, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pooled = pool_depth(kernel, depth)
    assert pooled.shape == (3, 2, depth, 2, 5)
    assert torch.allclose(pooled.sum(2), kernel.sum(2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [0, 2, 6])
def test_groups_of_unequal_length_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"depth 3 has no {size} groups"):
        pool_depth(profile(1, 2, 3), size)


def test_inflated_kernels_keep_their_sum_and_repeated_ones_their_mean() -> None:
    assert slices(inflate_depth(profile(6), 3, "centre")) == [0, 6, 0]
    assert slices(inflate_depth(profile(6), 3, "average")) == [2, 2, 2]
    assert slices(inflate_depth(profile(6), 2, "repeat")) == [6, 6]


def test_kernels_without_a_centre_or_deeper_than_one_are_not_inflated() -> None:
    with pytest.raises(ValueError, match="4 slices have no centre"):
        inflate_depth(profile(1), 4, "centre")
    with pytest.raises(ValueError, match="not one of depth 2"):
        inflate_depth(profile(1, 2), 4, "average")
