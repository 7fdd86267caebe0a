"""Where the samples of a new grid lie between those of an old one, for linear interpolation with repeated edges.

Between corners that agree, a linear interpolation of indicators or of logits has the winner that the corners have, because
it is a convex combination of them. So only samples whose corners disagree, a few per cent of a volume, need more than a look
at one corner. Resampling of labels and the export of logits both rest on this; with it their cost does not grow with the
number of classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np


class Cells:
    """The samples of a grid of shape `new` (z, y, x) between those of a grid of shape `old` over the same extent.

    Sample i of an axis lies at (i + 0.5) * old / new - 0.5, as scikit-image's `resize` and nnU-Net have it.
    """

    def __init__(self, old: Sequence[int], new: Sequence[int]) -> None:
        self.old = tuple(int(n) for n in old)
        self.new = tuple(int(n) for n in new)
        self._lower: list[np.ndarray] = []
        """Of each axis: index of the corner below each sample, from 0 on an axis with its first value repeated in front."""
        self._weight: list[np.ndarray] = []
        """Of each axis: share of the corner above each sample, float64."""
        for n, m in zip(self.old, self.new, strict=True):
            # To the last bit as SciPy has it, so that sums of shares tie where its sums tie.
            position = np.clip(n / m * (np.arange(m) + 0.5) - 0.5, 0, n - 1)
            below = np.floor(position)
            self._lower.append(below.astype(np.intp) + 1)
            self._weight.append(position - below)
        self._moving = [axis for axis, (n, m) in enumerate(zip(self.old, self.new, strict=True)) if n != m]

    def ends(self, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each sample along an axis: index of the corner below, of the one above (edges repeated), and the latter's share.

        Where the share is zero, both are the same corner.
        """
        below, share, last = self._lower[axis] - 1, self._weight[axis], self.old[axis] - 1
        return np.clip(below, 0, last), np.clip(below + (share > 0), 0, last), share

    def ready(self, finished: int) -> int:
        """How many planes of the new grid, from the first on, need only the first `finished` planes of the old one."""
        return int(np.searchsorted(self.ends(0)[1], finished))

    def planes(self, start: int, stop: int) -> tuple[Cells, int]:
        """The cells of the planes `start` to `stop` (exclusive) of the new grid, and the first plane of the old one they need.

        The old grid of these cells is made of the planes that they need, and no others.
        """
        below, above, _ = self.ends(0)
        first, part = int(below[start]), copy.copy(self)
        part.old, part.new = (int(above[stop - 1]) + 1 - first, *self.old[1:]), (stop - start, *self.new[1:])
        part._lower = [self._lower[0][start:stop] - first, *self._lower[1:]]
        part._weight = [self._weight[0][start:stop], *self._weight[1:]]
        return part, first

    def settle(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels where all corners agree, and where they do not.

        Args:
            labels: of shape `old`, any integer type; its largest value marks disagreement, so a label of it counts as such.

        Returns:
            labels of shape `new`, arbitrary where corners disagree; flat indices of the samples whose corners disagree.
        """
        mixed = np.iinfo(labels.dtype).max
        low = high = np.pad(labels, [(int(axis in self._moving),) * 2 for axis in range(3)], mode="edge")
        for axis in self._moving:
            below = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
            above = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
            low, high = np.minimum(low[below], low[above]), np.maximum(high[below], high[above])
        settled = np.where(low == high, low, mixed)
        for axis in reversed(self._moving):  # the last axis first: later ones then copy whole rows
            settled = np.take(settled, self._lower[axis], axis=axis)
        return settled, np.flatnonzero(settled == mixed)

    def corners(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The eight corners around samples, (0, 0, 0) to (1, 1, 1) with x fastest.

        Args:
            samples: flat indices into a grid of shape `new`, length k.

        Returns:
            flat indices into a grid of shape `old` (8, k), edges repeated; their shares (8, k) float64, which sum to one.
        """
        z, rest = np.divmod(samples, self.new[1] * self.new[2])
        y, x = np.divmod(rest, self.new[2])
        strides = (self.old[1] * self.old[2], self.old[2], 1)
        ends, shares = [], []
        for axis, index in enumerate((z, y, x)):
            below, above, share = self.ends(axis)
            ends.append([below[index] * strides[axis], above[index] * strides[axis]])
            lower = 1 - share[index]
            shares.append([lower, 1 - lower])
        order = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        indices = np.stack([ends[0][a] + ends[1][b] + ends[2][c] for a, b, c in order])
        weights = np.stack([shares[0][a] * shares[1][b] * shares[2][c] for a, b, c in order])
        return indices, weights

    def nearest(self, samples: np.ndarray) -> np.ndarray:
        """Which of the eight corners (0 to 7) is nearest to each sample; the upper one half way, as SciPy rounds."""
        z, rest = np.divmod(samples, self.new[1] * self.new[2])
        y, x = np.divmod(rest, self.new[2])
        above = [self._weight[axis][index] >= 0.5 for axis, index in enumerate((z, y, x))]
        return above[0] * 4 + above[1] * 2 + above[2] * 1
