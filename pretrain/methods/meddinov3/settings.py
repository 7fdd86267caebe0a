"""What `--set meddinov3.NAME=VALUE` can change, and what the size decides where it is left open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from pydantic import Field

from pretrain.settings import ANY_CASE


@dataclass(frozen=True)
class MedDINOv3Config:
    """What `--set meddinov3.NAME=VALUE` can change."""

    steps: Annotated[int, Field(ge=3)] = 20_000
    """Optimiser steps of all stages."""
    gram_share: Annotated[float, Field(gt=0)] = 0.1
    """Steps of stage gram for one of stage dino."""
    high_share: Annotated[float, Field(gt=0)] = 0.05
    """Steps of stage high for one of stage dino."""
    size: Annotated[Literal["tiny", "small", "base"], ANY_CASE] | None = None
    """The configuration 2d_vit_SIZE and heads to match; none: 2d_vit, as large as the plan has it."""
    batch: Annotated[int, Field(ge=2)] = 64
    """Slices of a batch; fewer in stage high, whose crops are larger."""
    large: Annotated[int, Field(ge=32, multiple_of=16)] = 256
    """Edge of the two large crops of a slice, in pixels; smaller where slices are small. In stage high 1.5 and 2 times that."""
    small: Annotated[int, Field(ge=16, multiple_of=16)] = 112
    """Edge of the small crops, in pixels; in stage high up to twice that."""
    small_crops: Annotated[int, Field(ge=1)] = 8
    """Small crops of a slice."""
    codes: Annotated[int, Field(ge=2)] | None = None
    """Prototypes of each head; none: by size 65536, 16384 or 4096, but at most 8 for each slice."""
    hidden: Annotated[int, Field(ge=1)] | None = None
    """Width of the heads; none: by size 2048, 1024 or 512."""
    bottleneck: Annotated[int, Field(ge=1)] | None = None
    """Length of the vector that is compared with the prototypes; none: by size 256, 192 or 128."""
    centering: Literal["sinkhorn", "softmax"] | None = None
    """How the teacher is kept from always answering the same: sinkhorn within a batch; softmax by a running mean, for small
    batches. None: softmax below 32 slices."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """Of the teacher's answers after the warm-up, before it from 0.04 on; lower is more decided. The student's is 0.1."""
    momentum: Annotated[float, Field(ge=0, le=1)] | None = None
    """Of the teacher in stage dino: it keeps this share of itself at each step; none: 0.994, with few slices 0.996."""
    late_momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """The same in stages gram and high."""
    rate: Annotated[float, Field(gt=0)] = 2e-4
    """Highest rate of AdamW in stage dino for 64 slices; half of it in stage gram, a quarter at the end of stage high. It goes
    with the square root of the batch, and is a quarter where few slices meet weights that were trained before."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Each block's rate is this share of that of the block after it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Of matrices; biases, norms, scales and tokens have none."""
    koleo: Annotated[float, Field(ge=0)] | None = None
    """Weight of keeping the slices of a batch apart; none: 0.1, with few slices 0."""
    gram_from: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of stage dino after which the teacher is kept as the anchor of the later stages."""
    gram_refresh: Annotated[int, Field(ge=1)] | None = None
    """Steps of stage gram after which the anchor is the teacher again, three times at most; none: never."""
    mirror: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of mirroring a crop left to right, but for stage high."""
    distort: Annotated[float, Field(ge=0)] = 1.0
    """Multiplies the probabilities of noise, blur, contrast, a lower resolution and gamma."""


@dataclass(frozen=True)
class Heads:
    """What the size decides where the settings of these names do not."""

    codes: int
    hidden: int
    bottleneck: int


_HEADS: Mapping[int, Heads] = {
    192: Heads(4096, 512, 128),
    384: Heads(16_384, 1024, 192),
    768: Heads(65_536, 2048, 256),
}
_CODES_PER_SLICE, _LEAST_CODES = 8, 64


def heads_of(config: MedDINOv3Config, width: int, slices: int) -> Heads:
    """The heads for a transformer of so many features and a pool of so many slices, with what the settings say instead."""
    heads = _HEADS[min(_HEADS, key=lambda known: abs(known - width))]
    heads = replace(heads, codes=max(_LEAST_CODES, min(heads.codes, _CODES_PER_SLICE * slices)))
    given = {field.name: getattr(config, field.name) for field in fields(Heads)}
    return replace(heads, **{name: value for name, value in given.items() if value is not None})
