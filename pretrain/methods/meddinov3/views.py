"""Cutting a slice's crops: which part of it, how large, and other intensities.

Source: DINOv3's multi-crop (facebookresearch/dinov3:dinov3/data/augmentations.py) with the intensities of ricklisz/FlexiCT
instead of those for photographs; colours mean nothing here. Values stay as the plan normalised them, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.nn.functional import interpolate

from pretrain.volumes import CaseInfo

_TRIES = 10
_NOISE, _BLUR, _CONTRAST, _COARSE, _GAMMA, _WINDOW, _DROPPED = 0.1, 0.2, 0.15, 0.25, 0.1, 0.5, 0.2  # probabilities


@dataclass(frozen=True)
class Box:
    """A part of a slice, in pixels (y, x)."""

    start: tuple[int, int]
    size: tuple[int, int]


def draw_box(shape: Sequence[int], area: tuple[float, float], rng: np.random.Generator) -> Box:
    """A random part: a share of the slice's area within `area`, its sides in a ratio of 3:4 to 4:3, log-uniform."""
    for _ in range(_TRIES):
        wanted = rng.uniform(*area) * shape[0] * shape[1]
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        size = max(1, round(math.sqrt(wanted / ratio))), max(1, round(math.sqrt(wanted * ratio)))
        if size[0] <= shape[0] and size[1] <= shape[1]:
            break
    else:  # no such part of a long slice: a square as large as it can be
        size = (min(shape), min(shape))
    start = [int(rng.integers(n - s + 1)) for n, s in zip(shape, size, strict=True)]
    return Box((start[0], start[1]), size)


def cut(plane: np.ndarray, box: Box, edge: int) -> np.ndarray:
    """A part of a slice (channels, y, x) as a square of `edge` pixels: bicubic, filtered where it shrinks, and nothing brighter
    or darker than what was there."""
    (y, x), (height, width) = box.start, box.size
    part = plane[:, y : y + height, x : x + width]
    tensor = torch.from_numpy(np.ascontiguousarray(part))[None]
    made = interpolate(tensor, (edge, edge), mode="bicubic", antialias=True)[0].numpy()
    return np.clip(made, part.min((1, 2), keepdims=True), part.max((1, 2), keepdims=True))


def distorted(
    image: np.ndarray, info: CaseInfo, unitless: Sequence[bool], amount: float, rng: np.random.Generator
) -> np.ndarray:
    """Other intensities of (channels, y, x), each change with a probability of its own for each channel.

    Noise (deviation up to 0.1), blur (0.5 to 1 pixels), contrast (±25 %), a lower resolution (to a half), gamma (0.7 to 1.5
    of what lies between the scan's extremes). Of several channels one is left out at times.

    Args:
        unitless: the channels whose numbers have no unit (MR): they are scaled (0.7 to 1.3) and shifted (±0.3) too.
        amount: multiplies the probabilities.
    """

    def happens(probability: float) -> bool:
        return rng.random() < amount * probability

    made = np.array(image, np.float32)
    unit = info.intensity_std
    for channel, (low, high) in enumerate(info.channel_ranges):
        plane = made[channel]
        if unitless[channel] and happens(_WINDOW):
            mean = plane.mean()
            plane = mean + (plane - mean) * rng.uniform(0.7, 1.3) + unit * rng.uniform(-0.3, 0.3)
        if happens(_NOISE):
            plane = plane + unit * rng.uniform(0, 0.1) * rng.standard_normal(plane.shape)
        if happens(_BLUR):
            plane = gaussian_filter(plane, rng.uniform(0.5, 1.0))
        if happens(_CONTRAST):
            mean = plane.mean()
            plane = mean + (plane - mean) * rng.uniform(0.75, 1.25)
        if happens(_COARSE):
            plane = _coarser(plane, rng.uniform(0.5, 1.0))
        if happens(_GAMMA) and high > low:
            share = (plane - low) / (high - low)
            plane = np.where(
                (share > 0) & (share < 1), low + (high - low) * share.clip(0, 1) ** rng.uniform(0.7, 1.5), plane
            )
        made[channel] = plane
    if len(made) > 1 and happens(_DROPPED):
        dropped = rng.integers(len(made))
        made[dropped] = made[dropped].mean()
    return made


def _coarser(plane: np.ndarray, zoom: float) -> np.ndarray:
    """As if acquired with larger pixels."""
    size = [max(1, round(zoom * n)) for n in plane.shape]
    small = interpolate(torch.from_numpy(np.ascontiguousarray(plane, np.float32))[None, None], size, mode="nearest")
    return interpolate(small, plane.shape, mode="bicubic")[0, 0].numpy()
