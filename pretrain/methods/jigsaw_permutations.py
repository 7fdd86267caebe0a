"""Sets of permutations for jigsaw puzzles that differ from one another at as many places as possible. Pure numpy.

Noroozi and Favaro, arXiv:1603.09246, choose theirs by Hamming distance; Taleb et al., arXiv:2006.03829, say so too, while
their code (HealthML/self-supervised-3d-tasks) draws them at random.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

_POOL = 20_000
# Number of tiles: characteristic and modulus of a finite field of that size, lowest coefficient first: x³ = x - 1 over GF(3),
# x² = -1 over GF(3), x³ = x + 1 over GF(2), x² = x + 1 over GF(2).
_FIELDS = {27: (3, (1, 2, 0)), 9: (3, (1, 0)), 8: (2, (1, 1, 0)), 4: (2, (1, 1))}

FIELD_SIZES = tuple(sorted(_FIELDS))
"""Numbers of tiles that have an affine set."""


def most_permutations(tiles: int, choice: Literal["greedy", "affine"]) -> int:
    """How many different ones `choose_permutations` has: greedy at most half its pool, in which some may be equal."""
    return tiles * (tiles - 1) if choice == "affine" else min(math.factorial(tiles), _POOL // 2)


def choose_permutations(tiles: int, count: int, choice: Literal["greedy", "affine"], seed: int = 0) -> np.ndarray:
    """`count` permutations of `tiles` numbers, (count, tiles) int64; the same for the same arguments.

    Args:
        choice: greedy takes from 20,000 random ones, again and again, the one whose smallest Hamming distance to those taken
            is largest. affine takes maps x ↦ a·x + b of a finite field, of which two agree in one place at most, so that the
            smallest distance is the largest possible, tiles - 1; for 4, 8, 9 or 27 tiles.
    """
    rng = np.random.default_rng(seed)
    if choice == "affine":
        return affine_permutations(tiles, rng)[rng.permutation(most_permutations(tiles, choice))[:count]]
    pool = np.stack([rng.permutation(tiles) for _ in range(_POOL)])
    nearest = np.full(_POOL, tiles + 1)
    chosen = [0]
    while len(chosen) < count:
        nearest = np.minimum(nearest, (pool != pool[chosen[-1]]).sum(1))
        if not nearest.any():
            raise ValueError(f"{_POOL} random orders of {tiles} tiles hold {len(chosen)} different ones, not {count}")
        chosen.append(int(nearest.argmax()))
    return pool[chosen]


def affine_permutations(tiles: int, rng: np.random.Generator) -> np.ndarray:
    """All (tiles · (tiles - 1), tiles) affine maps, a ≠ 0, under a random renaming of the tiles.

    Unrenamed, those with a = 1 would only shift the grid, and most neighbours would stay neighbours.
    """
    characteristic, modulus = _FIELDS[tiles]
    degree = len(modulus)
    digits = np.array([[(x // characteristic**d) % characteristic for d in range(degree)] for x in range(tiles)])
    weights = characteristic ** np.arange(degree)

    def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = np.zeros(2 * degree - 1, int)
        for d in range(degree):
            product[d : d + degree] += a[d] * b
        for d in range(2 * degree - 2, degree - 1, -1):  # x^degree = -modulus
            product[d - degree : d] -= product[d] * np.array(modulus)
        return product[:degree] % characteristic

    multiples = np.array([[times(a, x) for x in digits] for a in digits[1:]])  # (a, x, degree)
    maps = ((multiples[:, None] + digits[None, :, None]) % characteristic) @ weights  # (a, b, x)
    names = rng.permutation(tiles)
    renamed = np.empty((tiles * (tiles - 1), tiles), int)
    renamed[:, names] = names[maps.reshape(-1, tiles)]
    return renamed


def smallest_distance(permutations: np.ndarray) -> int:
    """The smallest number of places at which two of them differ."""
    return min(int((permutations[i + 1 :] != permutations[i]).sum(1).min()) for i in range(len(permutations) - 1))
