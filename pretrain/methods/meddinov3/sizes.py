"""How large crops are in each stage, and how many slices a batch has with them.

Source: ricklisz/FlexiCT:configs (256 and 112 pixels, and five combinations at high resolution); DINOv3's Gram anchor sees
twice the resolution. All of it is scaled to the size of the large crops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.methods.meddinov3.settings import MedDINOv3Config
from pretrain.networks.dino_vit import TOKEN

_LARGEST_FACTOR = 4
"""Pixels of a crop for one of the slice, at most: more show nothing new."""
_DETAIL = 1.5
"""Pixels of the slice for one of a large crop, from which on twice the resolution shows more."""
_REFERENCE = 256
_HIGH = (
    (0.30, 384, 112, 512),
    (0.30, 512, 112, 768),
    (0.30, 512, 144, 768),
    (0.05, 512, 168, 768),
    (0.05, 512, 224, 768),
)
"""Share of the batches; large, small and fine crops, where stage dino has large ones of 256 pixels."""
_LEAST_BATCH = 4


@dataclass(frozen=True)
class Sizes:
    """Edges of the square crops of a batch, in pixels, all multiples of 16."""

    large: int
    small: int
    gram: int
    """What the anchor sees of a large crop."""
    batch: int
    """Slices."""
    share: float = 1.0
    """Of the batches of the stage."""


def crop_sizes(config: MedDINOv3Config, edge: float) -> dict[str, tuple[Sizes, ...]] | None:
    """The combinations of each stage for slices whose shorter side has `edge` pixels; None where crops of two patches a side
    would enlarge them too much."""
    if _LARGEST_FACTOR * edge < 2 * TOKEN:
        return None
    large = min(config.large, _multiple(_LARGEST_FACTOR * edge))
    small = _multiple(config.small * large / config.large)
    finer = 2.0 if edge >= _DETAIL * large else 1.5
    plain = Sizes(large, small, _multiple(finer * large), config.batch)
    high = []
    for share, *edges in _HIGH:
        wide, fine = (wanted * large / _REFERENCE for wanted in (edges[0], edges[2]))
        narrow = small * edges[1] / _HIGH[0][2]
        sizes = Sizes(_multiple(wide), _multiple(narrow), _multiple(fine), config.batch, share)
        fewer = config.batch * _tokens(plain, config.small_crops) / _tokens(sizes, config.small_crops)
        high.append(replace(sizes, batch=max(min(_LEAST_BATCH, config.batch), round(fewer))))
    return {"dino": (plain,), "gram": (plain,), "high": tuple(high)}


def _multiple(edge: float) -> int:
    """The nearest edge that is made of whole patches."""
    return max(TOKEN, TOKEN * round(edge / TOKEN))


def _tokens(sizes: Sizes, small_crops: int) -> int:
    return (2 * sizes.large**2 + small_crops * sizes.small**2) // TOKEN**2
