"""Which patches of which crops are masked: an exact number for each crop of a batch, in blocks.

Source: DINOv2 and DINOv3 (arXiv:2304.07193, 2508.10104; facebookresearch/dinov3:dinov3/data/masking.py, collate.py); the blocks
are BEiT's (arXiv:2106.08254).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_SMALLEST_BLOCK = 4
_LARGEST_SHARE = 0.5
_FLATTEST = 0.3
_TRIES = 10


def masked_counts(
    crops: int,
    patches: int,
    rng: np.random.Generator,
    *,
    share: float = 0.5,
    ratios: tuple[float, float] = (0.1, 0.5),
) -> list[int]:
    """How many of its `patches` each of the `crops` of a batch has masked; only the order is random.

    Args:
        share: of the crops that have masks, rounded down.
        ratios: the masked share of a crop's patches rises in equal steps from above the first to the second.
    """
    masked = int(share * crops)
    # Rounding noise must not turn 49.0 into 48.
    steps = [int(patches * ratio + 1e-6) for ratio in np.linspace(*ratios, masked + 1)[1:]]
    return rng.permutation(steps + [0] * (crops - masked)).tolist()


def block_mask(grid: Sequence[int], count: int, rng: np.random.Generator) -> np.ndarray:
    """A mask (y, x), bool, with exactly `count` true patches, in rectangles as far as they fit, the rest wherever."""
    height, width = grid
    mask = np.zeros((height, width), bool)
    largest = _LARGEST_SHARE * mask.size
    while (left := count - int(mask.sum())) > 0:
        if not any(_add_block(mask, left, min(left, largest), rng) for _ in range(_TRIES)):
            free = np.flatnonzero(~mask)
            mask.flat[rng.choice(free, left, replace=False)] = True
    return mask


def _add_block(mask: np.ndarray, left: int, largest: float, rng: np.random.Generator) -> bool:
    """Mask one rectangle, if the one drawn lies within the grid and brings 1 to `left` new patches."""
    area = _SMALLEST_BLOCK + (largest - _SMALLEST_BLOCK) * rng.random()
    aspect = math.exp(rng.uniform(math.log(_FLATTEST), -math.log(_FLATTEST)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height >= mask.shape[0] or width >= mask.shape[1]:
        return False
    top, start = rng.integers(mask.shape[0] - height + 1), rng.integers(mask.shape[1] - width + 1)
    block = mask[top : top + height, start : start + width]
    if not 1 <= block.size - int(block.sum()) <= left:
        return False
    block[:] = True
    return True
