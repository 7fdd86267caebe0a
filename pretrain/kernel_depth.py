"""Kernels of another depth: the one rule that spatially adaptive convolution and the transfer of weights share.

A kernel that meets g equal slices gives what the sum of its g weights gives for one of them. So slices of a kernel are summed
to make it shallower, and a kernel is made deeper by adding weights whose sum is the old one: then the response to a volume
that is constant along the slices stays. Up-sampling kernels lie the other way round, their slices beside each other in the
output: there the mean and repeating keep the response.

Source: the pooling of weights in PUMIT (arXiv:2312.07630), the two ways to inflate of I3D (arXiv:1705.07750).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


def pool_depth(weight: Tensor, size: int, mode: Literal["sum", "mean"] = "sum") -> Tensor:
    """Sum or average neighbouring slices of a kernel, in groups of one length that do not overlap.

    (a, b, depth, y, x) → (a, b, size, y, x), of `Conv3d` and `ConvTranspose3d` alike; the tensor itself where the depth is
    `size` already. Raises ValueError where the depth is not a multiple of `size`.
    """
    depth = weight.shape[2]
    if depth == size:
        return weight
    if size < 1 or depth % size:
        raise ValueError(f"a kernel of depth {depth} has no {size} groups of equal length")
    groups = weight.unflatten(2, (size, depth // size))
    return groups.sum(3) if mode == "sum" else groups.mean(3)


def inflate_depth(weight: Tensor, size: int, mode: Literal["centre", "average", "repeat"]) -> Tensor:
    """Give a kernel of depth 1 more slices: (a, b, 1, y, x) → (a, b, size, y, x).

    Args:
        mode: `centre` puts it between zeros (`size` must be odd), `average` spreads it evenly: both keep the sum. `repeat`
            copies it, which keeps the mean.

    Raises ValueError where the kernel is deeper than 1 or has no centre.
    """
    if weight.shape[2] != 1:
        raise ValueError(f"only a kernel of depth 1 can be inflated, not one of depth {weight.shape[2]}")
    if mode == "centre":
        if size % 2 == 0:
            raise ValueError(f"{size} slices have no centre")
        return nn.functional.pad(weight, (0, 0, 0, 0, size // 2, size // 2))
    repeated = weight.expand(-1, -1, size, -1, -1)
    return repeated / size if mode == "average" else repeated
