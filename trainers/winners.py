"""Which class wins, or which region is painted last, at the voxels of a block of logits and anywhere between them.

Between corners with one winner that class wins too, because linear interpolation is a convex combination of the corners.
Elsewhere, a class that wins at no corner is at most what the runners-up of the corners interpolate to. Where a winner of a
corner exceeds that, no other class needs a look; this holds nearly everywhere, so the cost hardly grows with the number of
classes. The remaining samples compare all classes. Nothing of this is an approximation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from planners.cells import Cells

_VOXELS_AT_ONCE = 2**16
"""A few float32 arrays of this length stay in a core's cache while the classes pass by."""
_SAMPLES_AT_ONCE = 2**14


class Winners(Protocol):
    """What wins in a block of logits (heads, z, y, x)."""

    labels: np.ndarray
    """Winners at the voxels (z, y, x), unsigned integers."""

    def between(self, corners: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Winners (k,) between `corners`, flat indices of voxels (n, k), in `shares` (n, k) float32 that sum to one."""
        ...


class Classes:
    """Of exclusive classes the one with the largest logit wins; of equals the lowest, as `argmax` has it."""

    def __init__(self, logits: Tensor) -> None:
        """logits: (classes, z, y, x) of any float type, on the CPU."""
        logits = logits.contiguous()
        self._logits = logits.view(-1)
        self._classes, self._voxels = len(logits), logits[0].numel()
        labels = np.zeros(self._voxels, _smallest_type(self._classes - 1))
        self._runner_up = np.full(self._voxels, -np.inf, np.float32)
        for part in _parts(self._voxels):
            _best_two(logits.view(self._classes, -1)[:, part], labels[part], self._runner_up[part])
        self.labels = labels.reshape(logits.shape[1:])

    def between(self, corners: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """See `Winners.between`; needs only logits of classes that can win."""
        candidates = np.sort(self.labels.reshape(-1)[corners], axis=0)
        best = candidates[0].copy()
        value = self._interpolated(best, corners, shares)
        for below, candidate in pairwise(candidates):
            new = np.flatnonzero(candidate != below)
            self._challenge(best, value, new, candidate[new], corners, shares)
        # All sums below round alike and in one order, so what is not larger in exact numbers is not larger here.
        unsure = np.flatnonzero(value <= _mix(self._runner_up[corners], shares))
        value[unsure] = -np.inf
        for label in range(self._classes if len(unsure) else 0):
            self._challenge(best, value, unsure, np.full(len(unsure), label, best.dtype), corners, shares)
        return best

    def _challenge(
        self,
        best: np.ndarray,
        value: np.ndarray,
        samples: np.ndarray,
        candidates: np.ndarray,
        corners: np.ndarray,
        shares: np.ndarray,
    ) -> None:
        """Put `candidates` in the place of the best classes of some samples where their logits are larger."""
        challenger = self._interpolated(candidates, corners.take(samples, axis=1), shares.take(samples, axis=1))
        larger = challenger > value[samples]
        best[samples[larger]] = candidates[larger]
        value[samples[larger]] = challenger[larger]

    def _interpolated(self, classes: np.ndarray, corners: np.ndarray, shares: np.ndarray) -> np.ndarray:
        indices = classes.astype(np.intp) * self._voxels + corners
        return _mix(_at(self._logits, indices), shares)


class Regions:
    """Overlapping regions, one after the other painted where their logit is positive; winners count from 1, 0 is none.

    The last region painted at all corners is so between them: its logit is positive there, and those of later ones are not.
    """

    def __init__(self, logits: Tensor) -> None:
        """logits: (regions, z, y, x) in the order of painting, of any float type, on the CPU."""
        self._logits = logits.contiguous().view(len(logits), -1)
        labels = np.zeros(logits[0].numel(), _smallest_type(len(logits)))
        for part in _parts(len(labels)):
            for region, values in enumerate(self._logits[:, part], start=1):
                np.copyto(labels[part], region, where=(values > 0).numpy())
        self.labels = labels.reshape(logits.shape[1:])

    def between(self, corners: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """See `Winners.between`."""
        last = np.zeros(corners.shape[1], self.labels.dtype)
        latest = self.labels.reshape(-1)[corners].max(axis=0)  # later ones are negative at all corners
        open_ = np.arange(len(last))
        for region in range(len(self._logits), 0, -1):
            asked = open_[latest[open_] >= region]
            values = _at(self._logits[region - 1], corners.take(asked, axis=1))
            last[asked[_mix(values, shares.take(asked, axis=1)) > 0]] = region
            open_ = open_[last[open_] == 0]
        return last


def resampled(winners: Winners, cells: Cells, first: int) -> np.ndarray:
    """Winners on the new grid of `cells`, whose old grid are the planes of the block from `first` on; (z, y, x)."""
    labels, mixed = cells.settle(winners.labels[first : first + cells.old[0]])
    flat = labels.reshape(-1)
    for start in range(0, len(mixed), _SAMPLES_AT_ONCE):
        samples = mixed[start : start + _SAMPLES_AT_ONCE]
        corners, shares = cells.corners(samples)
        used = shares.any(axis=1)  # an axis that keeps its samples has no upper corners
        corners = corners[used] + first * cells.old[1] * cells.old[2]
        flat[samples] = winners.between(corners, shares[used].astype(np.float32))
    return labels


def _best_two(logits: Tensor, labels: np.ndarray, runner_up: np.ndarray) -> None:
    """Write the argmax of logits (classes, k) into zeros, and the second largest logit into -inf.

    The running maximum over classes takes a tenth of the time and none of the memory of `argmax` and `topk`.
    """
    best = logits[0].float().numpy().copy()
    current = torch.empty(len(labels))
    values, smaller = current.numpy(), np.empty_like(best)
    better, label_if_better = np.empty(len(labels), bool), np.empty_like(labels)
    for label in range(1, len(logits)):
        current.copy_(logits[label])
        np.greater(values, best, out=better)
        np.multiply(better, labels.dtype.type(label), out=label_if_better)
        np.maximum(labels, label_if_better, out=labels)  # classes ascend
        np.minimum(values, best, out=smaller)
        np.maximum(runner_up, smaller, out=runner_up)
        np.maximum(best, values, out=best)


def _at(logits: Tensor, indices: np.ndarray) -> np.ndarray:
    """Logits (voxels,) at indices of any shape, float32."""
    chosen = logits.index_select(0, torch.from_numpy(indices.reshape(-1)))  # several times faster than logits[indices]
    return chosen.float().numpy().reshape(indices.shape)


def _mix(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weighted sums of values (n, k) float32, one corner after the other: `sum` orders them by the length of the arrays."""
    total = values[0] * shares[0]
    for value, share in zip(values[1:], shares[1:], strict=True):
        total += value * share
    return total


def _parts(length: int) -> Iterator[slice]:
    return (slice(start, start + _VOXELS_AT_ONCE) for start in range(0, length, _VOXELS_AT_ONCE))


def _smallest_type(largest: int) -> type[np.unsignedinteger]:
    return np.uint8 if largest <= 255 else np.uint16
