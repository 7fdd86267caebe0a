"""Spatially adaptive convolution (SAC): one set of weights for volumes of any slice thickness, and for single images.

A layer leaves the slices alone as long as they are thicker than the pixels: its kernel and stride shrink along depth, never
in the plane, by as many halvings as the plane is still ahead. How many these are, the degree of anisotropy (DA), follows from
the image's spacing and from how often the plane was halved before; both travel beside the image as a `Spacing`.

Source: PUMIT (arXiv:2312.07630) and its code (function2-llx/PUMIT:pumit/sac.py), which keeps the two numbers on a subclass of
Tensor. Here they are an argument: nothing can go stale, and checkpointing and compiling work as for any layer.

Axes are (N, C, z, y, x); z is the slice axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import conv3d, conv_transpose3d

from planners.anisotropy import degree_of_anisotropy
from planners.errors import PlanError
from pretrain.kernel_depth import pool_depth

# Kernel, stride and padding of the layers whose windows overlap in the plane; they become flat where slices are thick.
_OVERLAPPING = {
    ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((2, 3, 3), (2, 2, 2), (0, 1, 1)),
}


@dataclass(frozen=True)
class Spacing:
    """How thick the slices of a map are: what the image started with, and what has happened to the plane since."""

    da0: int
    """Degree of anisotropy of the image, from 0."""
    n: int = 0
    """In-plane halvings done so far, from 0."""

    def __post_init__(self) -> None:
        if self.da0 < 0 or self.n < 0:
            raise ValueError(f"DA and halvings count from 0, got {self.da0} and {self.n}")

    @classmethod
    def of(cls, spacing_mm: Sequence[float], stride: int) -> Spacing:
        """The spacing (z, y, x) or (y, x) of an image, in mm, for a network of in-plane stride `stride`.

        More than `degree_of_planes(stride)` makes no difference to such a network, so no DA is higher.
        """
        flat = degree_of_planes(stride)
        return cls(flat if len(spacing_mm) == 2 else min(degree_of_anisotropy(spacing_mm), flat))

    @property
    def degree(self) -> int:
        """DA of the map: halvings of the plane still to come before the slices are halved too."""
        return max(self.da0 - self.n, 0)

    def halved(self, times: int) -> Spacing:
        """After `times` more halvings of the plane; after doublings where it is negative."""
        return Spacing(self.da0, self.n + times)

    def stride(self, times: int) -> tuple[int, int, int]:
        """What `times` halvings of the plane, from here on, are as a stride (z, y, x)."""
        plane = 2**times
        return 2 ** max(times - self.degree, 0), plane, plane


def degree_of_planes(stride: int) -> int:
    """DA that stands for an image of one plane, in a network of in-plane stride `stride`: log2(stride) + 1.

    The lowest for which every kernel has depth 1, the 3³ kernels behind the last halving too.

    >>> degree_of_planes(16)
    5
    """
    if stride < 1 or stride & (stride - 1):
        raise ValueError(f"an in-plane stride is a power of 2, got {stride}")
    return stride.bit_length()


def require_multiple(size: Sequence[int], multiple: Sequence[int]) -> None:
    """Raise PlanError unless each of `size`, (z, y, x) or (y, x) in voxels, is a multiple of the number below it."""
    if any(voxels % number for voxels, number in zip(size, multiple, strict=True)):
        raise PlanError(
            "Voxels at the end of an image would be left out",
            found=f"{' × '.join(map(str, size))} voxels ({', '.join('zyx'[-len(size) :])})",
            expected=f"multiples of {' × '.join(map(str, multiple))}",
            remedy="pad the image at the end with background and crop the result",
        )


class TakesSpacing:
    """Marks modules that are called with a map and its spacing, and return both: `(x, spacing) -> (y, spacing)`."""


class SACSequential(TakesSpacing, nn.Sequential):
    """Layers one after the other; those that take the spacing are given it."""

    def forward(self, x: Tensor, spacing: Spacing) -> tuple[Tensor, Spacing]:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, TakesSpacing):
                x, spacing = layer(x, spacing)  # type: ignore[operator]
            else:
                x = layer(x)
        return x, spacing


class SACConv3d(TakesSpacing, nn.Conv3d):
    """A convolution whose kernel is summed along depth as far as the slices are thicker than the pixels.

    Stored as `weight` (out, in, z, y, x) and `bias` (out,). Layers there are, with k from 0:
    - kernel and stride 2ᵏ, no padding: depth 2^max(k - DA, 0);
    - kernel 3, padding 1, stride 1 or 2, and kernel (2, 3, 3), padding (0, 1, 1), stride 2: flat (depth 1, stride 1, no
      padding along depth) where DA > 0.

    Args:
        k3_rule: `promote` keeps a 3³ kernel of stride 1 whole where DA is 1 (function2-llx/SPAD, later work of PUMIT's author).

    Raises ValueError for any other kernel, stride or padding; called, PlanError where a map is not covered by windows that lie
    beside each other.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
        *,
        k3_rule: Literal["article", "promote"] = "article",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        overlapping = (self.kernel_size, self.stride, self.padding) in _OVERLAPPING
        if not overlapping and (self.kernel_size != self.stride or self.padding != (0, 0, 0)):
            raise ValueError(
                f"no adaptive convolution with kernel {self.kernel_size}, stride {self.stride}, padding {self.padding}: "
                "kernel and stride must be one power of 2 without padding, or 3³ with padding 1 and stride 1 or 2"
            )
        self.halvings = _power(self.stride)
        self.whole_up_to = None if not overlapping else int(k3_rule == "promote" and self.halvings == 0)
        """The highest DA at which an overlapping kernel keeps its depth; None where windows lie beside each other."""

    def forward(self, x: Tensor, spacing: Spacing) -> tuple[Tensor, Spacing]:  # type: ignore[override]
        """(N, in, z, y, x) → (N, out, z', y', x')."""
        stride = spacing.stride(self.halvings)
        if self.whole_up_to is None:
            depth, padding = stride[0], 0
        elif spacing.degree <= self.whole_up_to:
            depth, padding = self.kernel_size[0], int(self.padding[0])
        else:
            # The neighbouring slices are further away than those in the plane that the kernel sees: it takes none in.
            depth, padding = 1, 0
        weight = pool_depth(self.weight, depth)
        kernel = weight.shape[2:]
        require_multiple(x.shape[2:], [s if s == k else 1 for s, k in zip(stride, kernel, strict=True)])
        y = conv3d(x, weight, self.bias, stride, (padding, *self.padding[1:]))  # type: ignore[arg-type]
        return y, spacing.halved(self.halvings)


class SACConvTranspose3d(TakesSpacing, nn.ConvTranspose3d):
    """The mirror of the convolution with kernel and stride 2ᵏ: it doubles the plane k times, and the slices as often as the
    encoder halved them.

    Stored as `weight` (in, out, z, y, x) and `bias` (out,).

    Args:
        transposed_pool: how slices of the kernel become one. `sum` is PUMIT's and makes the layer the adjoint of `SACConv3d`.
            With `mean` a thick slice of the output is the average of the thin ones it stands for, so that a decoder answers at
            the same scale for every DA.

    Raises ValueError unless kernel and stride are one power of 2 without padding, or when called before as many halvings.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        transposed_pool: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        if self.kernel_size != self.stride or self.padding != (0, 0, 0):
            raise ValueError(
                f"no adaptive transposed convolution with kernel {self.kernel_size}, stride {self.stride}, padding "
                f"{self.padding}: kernel and stride must be one power of 2 without padding"
            )
        self.halvings = _power(self.stride)
        self.transposed_pool = transposed_pool

    def forward(self, x: Tensor, spacing: Spacing) -> tuple[Tensor, Spacing]:  # type: ignore[override]
        """(N, in, z, y, x) → (N, out, z', y', x')."""
        # How often the encoder halved the slices is n - DA0, so this many doublings are left to undo. The article prints
        # min(k, DA0 - DA), the halvings that the slices were spared: with it isotropic volumes would stay without depth,
        # and DA0 = 2 after two halvings would gain a depth that was never taken away.
        doublings = min(self.halvings, max(spacing.n - spacing.da0, 0))
        weight = pool_depth(self.weight, 2**doublings, self.transposed_pool)
        y = conv_transpose3d(x, weight, self.bias, (2**doublings, *self.stride[1:]))
        return y, spacing.halved(-self.halvings)


def _power(stride: tuple[int, ...]) -> int:
    """k of a stride (2ᵏ, 2ᵏ, 2ᵏ). Raises ValueError for any other."""
    if len(set(stride)) != 1 or stride[0] < 1 or stride[0] & (stride[0] - 1):
        raise ValueError(f"the stride of an adaptive convolution must be one power of 2 for all axes, got {stride}")
    return stride[0].bit_length() - 1
