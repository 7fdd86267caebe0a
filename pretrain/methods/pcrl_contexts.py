"""PCRL's diverse contexts: flips and quarter turns of a target, and the vector that tells the decoder which.

A context is a code of one entry an axis (1: mirrored) and four for the quarter turns (one-hot): 7 numbers in 3D, 6 in
2D. The mirrors come first, then the turn in the plane of the two axes of smallest spacing, as numpy's rot90. Two codes
may stand for one symmetry (two mirrors are half a turn); the authors' code (Luchixiang/PCRL) has them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_EQUAL_SPACING = 0.01
_TURNS = 4


@dataclass(frozen=True)
class Contexts:
    """The symmetries that targets of one patch may undergo."""

    axes: int
    plane: tuple[int, int]
    """The axes that a turn exchanges."""
    turns: tuple[int, ...]
    """Quarter turns that keep shape and spacing: (0, 1, 2, 3) or (0, 2)."""
    identity: float
    """Extra probability of leaving the target as it is."""

    @property
    def length(self) -> int:
        """Numbers of a code."""
        return self.axes + _TURNS

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """A random code (length,): each mirror with probability 1/2, the turns evenly."""
        if rng.random() < self.identity:
            return code((0,) * self.axes, 0)
        return code(rng.integers(0, 2, self.axes).tolist(), int(rng.choice(self.turns)))

    def apply(self, images: Tensor, codes: Tensor) -> Tensor:
        """Each image of (B, channels, *space) in its own context, codes (B, length)."""
        return torch.stack([self._one(image, one) for image, one in zip(images, codes.tolist(), strict=True)])

    def _one(self, image: Tensor, one: Sequence[float]) -> Tensor:
        mirrored = [1 + axis for axis in range(self.axes) if one[axis] > 0.5]
        turns = int(np.argmax(one[self.axes :]))
        if mirrored:
            image = image.flip(mirrored)
        return image.rot90(turns, (1 + self.plane[0], 1 + self.plane[1])) if turns else image

    def name(self, one: Sequence[float]) -> str:
        """For people: `as it is`, `mirrored z, turned 90°`."""
        names = "zyx"[-self.axes :]
        words = [f"mirrored {names[axis]}" for axis in range(self.axes) if one[axis] > 0.5]
        turns = int(np.argmax(one[self.axes :]))
        return ", ".join([*words, *([f"turned {90 * turns}°"] if turns else [])]) or "as it is"


def contexts_of(patch: Sequence[int], spacing: Sequence[float], identity: float) -> Contexts:
    """Turns lie in the plane of the two axes of smallest spacing; quarter turns only where both are equal in size and
    spacing."""
    first, second = sorted(sorted(range(len(patch)), key=lambda axis: (spacing[axis], -axis))[:2])
    equal = patch[first] == patch[second] and (
        abs(spacing[first] - spacing[second]) <= _EQUAL_SPACING * spacing[second]
    )
    return Contexts(len(patch), (first, second), (0, 1, 2, 3) if equal else (0, 2), identity)


def code(mirrors: Sequence[int], turns: int) -> np.ndarray:
    """The vector of a context: float32 (axes + 4,)."""
    onehot = np.eye(_TURNS, dtype=np.float32)[turns]
    return np.concatenate([np.asarray(mirrors, np.float32), onehot])
