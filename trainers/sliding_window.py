"""Logits of a volume from overlapping windows, handed on in slabs along z as soon as no window reaches them any more.

So the logits in memory are those of one window's depth, not of the volume. Windows form a grid and the Gaussian that weights
a window is a product of three profiles, so the sum of the weights is one too: nothing of the volume's size is needed for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.nn import functional

Answer = Callable[[int, Tensor], Iterable[Tensor]]
"""Of a fold's network (fold counted from 0) to windows (n, channels, *patch): n times logits (heads, *patch) float32."""


class Windows:
    """Windows that cover a volume, at nnU-Net's places and with its weights."""

    def __init__(self, shape: Sequence[int], patch: Sequence[int], step_size: float) -> None:
        """
        Args:
            shape: of the volume, (z, y, x), nowhere smaller than the patch.
            patch: (z, y, x), or (y, x) for windows of one slice.
            step_size: share of the patch by which the next window is moved at most.
        """
        self.flat = len(patch) == 2
        self.size = (1, *patch) if self.flat else tuple(patch)
        starts = compute_steps_for_sliding_window(tuple(shape)[-len(patch) :], tuple(patch), step_size)
        self.starts = [list(range(shape[0])), *starts] if self.flat else starts
        profiles = [_profile(length) for length in self.size]
        self.weights = torch.from_numpy(np.einsum("i,j,k->ijk", *profiles).astype(np.float32))
        self._sums = [np.zeros(length) for length in shape]
        for total, profile, places in zip(self._sums, profiles, self.starts, strict=True):
            for start in places:
                total[start : start + len(profile)] += profile

    def groups(self, together: int) -> list[list[int]]:
        """First planes of windows along z, as many in a group as make `together` windows, at least one."""
        count = max(1, together // (len(self.starts[1]) * len(self.starts[2])))
        return [self.starts[0][first : first + count] for first in range(0, len(self.starts[0]), count)]

    def weight_sum(self, start: int, stop: int) -> Tensor:
        """Sum of the weights of all windows at the planes `start` to `stop` (exclusive), (planes, y, x) float32."""
        planes, rows, columns = self._sums
        return torch.from_numpy(np.einsum("i,j,k->ijk", planes[start:stop], rows, columns).astype(np.float32))


def padded(data: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
    """A volume (channels, z, y, x), with zeros around it where it is smaller than the patch; its place in that, (z, y, x)."""
    sizes = data.shape[1:]
    missing = [max(0, least - size) for least, size in zip([1, *patch][-3:], sizes, strict=True)]
    inside = tuple(slice(more // 2, more // 2 + size) for more, size in zip(missing, sizes, strict=True))
    margins = [margin for more in reversed(missing) for margin in (more // 2, more - more // 2)]
    return functional.pad(data, margins) if any(missing) else data, inside


@torch.inference_mode()
def logits_in_slabs(
    data: Tensor, windows: Windows, answer: Answer, *, heads: int, folds: int, together: int, device: torch.device
) -> Iterator[Tensor]:
    """Mean of the windows' logits over windows and folds, in slabs (heads, planes, y, x) float32 on the CPU, the lowest first.

    Args:
        data: (channels, z, y, x) float32.
        together: windows in one call of `answer`.
        device: where the windows' logits are added up; the CPU where its memory is too small.
    """
    groups = windows.groups(together)
    depth = max(group[-1] - group[0] for group in groups) + windows.size[0]
    half = (depth + 1) // 2
    total = _zeros((heads, depth, *data.shape[2:]), device)
    weights = windows.weights.to(total.device)
    remembering = _RememberConstant(answer)
    for group, following in itertools.zip_longest(groups, groups[1:]):
        begin, end = group[0], following[0] if following else data.shape[1]
        places = [
            tuple(slice(start, start + length) for start, length in zip(place, windows.size, strict=True))
            for place in itertools.product(group, *windows.starts[1:])
        ]
        for fold, first in itertools.product(range(folds), range(0, len(places), together)):
            batch = places[first : first + together]
            images = torch.stack([data[:, z, y, x] for z, y, x in batch])
            answers = remembering(fold, images.squeeze(2) if windows.flat else images)
            for (z, y, x), logits in zip(batch, answers, strict=True):
                part = total[:, z.start - begin : z.stop - begin, y, x]
                part.addcmul_(logits.to(total.device).view_as(part), weights)
        for first in range(begin, end, half):  # the last windows finish all their planes at once
            stop = min(first + half, end)
            yield total[:, first - begin : stop - begin].cpu() / (windows.weight_sum(first, stop) * folds)
        for planes in total:  # one head after the other, because the planes move onto themselves
            planes[: depth - (end - begin)] = planes[end - begin :].clone()
            planes[depth - (end - begin) :] = 0


class _RememberConstant:
    """Asks each network only once what it says to a window of one value, such as the air around a patient."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._known: dict[int, tuple[list[float], Tensor]] = {}
        """Of each fold: the values (one a channel) of the last such window, and the logits."""

    def __call__(self, fold: int, images: Tensor) -> Iterable[Tensor]:
        values = images.flatten(2)[:, :, 0]
        constant = (images.flatten(2) == values[:, :, None]).flatten(1).all(dim=1).tolist()
        if not any(constant):
            return self._answer(fold, images)
        others = [index for index, same in enumerate(constant) if not same]
        answers = iter(self._answer(fold, images[others]) if others else ())
        return [
            self._known_answer(fold, image[None], value.tolist()) if same else next(answers)
            for image, value, same in zip(images, values, constant, strict=True)
        ]

    def _known_answer(self, fold: int, image: Tensor, values: list[float]) -> Tensor:
        if fold not in self._known or self._known[fold][0] != values:
            self._known[fold] = values, next(iter(self._answer(fold, image)))
        return self._known[fold][1]


def _profile(length: int) -> np.ndarray:
    """nnU-Net's Gaussian along one axis of a window, which its `compute_gaussian` has in half precision."""
    peak = np.zeros(length)
    peak[length // 2] = 1
    profile = gaussian_filter1d(peak, length / 8, mode="constant")
    return profile / profile.max()


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    try:
        return torch.zeros(shape, device=device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return torch.zeros(shape)
