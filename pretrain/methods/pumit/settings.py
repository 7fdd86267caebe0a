"""What `--set pumit.NAME=VALUE` can change, and what the size decides where it is left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from pydantic import Field

from pretrain.settings import ANY_CASE

OFFICIAL = "official"


@dataclass(frozen=True)
class PUMITConfig:
    """What `--set pumit.NAME=VALUE` can change."""

    steps: Annotated[int, Field(ge=2)] = 60_000
    """Optimiser steps of both stages."""
    tokenizer_share: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    """Share of the steps that train the tokenizer, if both stages run."""
    size: Annotated[Literal["s", "b", "l", "official"], ANY_CASE] | None = None
    """s, b or l: the configuration 3d_fullres_sac_SIZE and a tokenizer to match; official: b, and a tokenizer as the authors
    train it; none: 3d_fullres_sac, as small as the plan asks."""
    tokenizer: str | None = None
    """The authors' simple-soft.ckpt instead of stage tokenizer; its size is the file's."""
    channels: tuple[int, int, int] | None = None
    """Of the tokenizer's three stages, multiples of 8; none: by size, 64,128,256 or from b on 128,256,512."""
    codes: Annotated[int, Field(ge=2)] | None = None
    """Words of the vocabulary; none: by size, 512 or from b on 1024."""
    tokenizer_crop: tuple[int, int, int] = (4, 8, 8)
    """Tokens (z, y, x) of a crop in stage tokenizer: 16 voxels each in the plane; fewer where the scans are smaller."""
    mim_crop: tuple[int, int, int] | None = None
    """The same in stage mim; none: by size, 4,8,8 or from b on 5,10,10."""
    tokenizer_batch: Annotated[int, Field(ge=1)] = 8
    """Crops of a batch in stage tokenizer."""
    mim_batch: Annotated[int, Field(ge=1)] = 8
    """Crops of a batch in stage mim."""
    masked: Annotated[float, Field(gt=0, lt=1)] = 0.55
    """Share of the tokens that are hidden from the transformer."""
    diversity: Annotated[float, Field(ge=0)] | None = None
    """Weight of using all codes alike; none: 0.1, official 0.03."""
    sharpness: Annotated[float, Field(ge=0)] | None = None
    """Weight of deciding for one code at each place, from 70 % of the stage on, 0 until 30 %; none: 0.05. Official: 1,
    throughout."""
    zoom: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of another zoom in the plane, 0.75 to 2; along slices that are hardly thicker 0.6 times as often."""
    rotate: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Probability of turning a crop."""
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of mirroring a crop, for each axis."""
    intensity: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Probability of another gamma; of another brightness and another contrast half of it each."""
    tokenizer_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Highest rate of AdamW in stage tokenizer."""
    tokenizer_schedule: Literal["cosine", "constant"] = "cosine"
    """Of that rate, after the warm-up."""
    mim_rate: Annotated[float, Field(gt=0)] | None = None
    """Highest rate in stage mim; none: 1.5e-4 · √(batch / 256), at least 5e-5."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """Of matrices; biases, norms, codes and positions have none."""


@dataclass(frozen=True)
class Scale:
    """What the size decides where the settings of these names do not."""

    channels: tuple[int, int, int]
    codes: int
    mim_crop: tuple[int, int, int]
    diversity: float = 0.1
    sharpness: float = 0.05


_SMALL = Scale((64, 128, 256), 512, (4, 8, 8))
_BASE = Scale((128, 256, 512), 1024, (5, 10, 10))
_SCALES: Mapping[str | None, Scale] = {
    None: _SMALL,
    "s": _SMALL,
    "b": _BASE,
    "l": _BASE,
    # The weights of the authors' command line.
    OFFICIAL: replace(_BASE, diversity=0.03, sharpness=1.0),
}


def by_size(config: PUMITConfig) -> Scale:
    """The scale of the size, with what the settings say instead."""
    given = {field.name: getattr(config, field.name) for field in fields(Scale)}
    return replace(_SCALES[config.size], **{name: value for name, value in given.items() if value is not None})
