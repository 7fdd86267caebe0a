"""How long and how fast a method learns: settings that methods with a single stage share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pretrain.method import Stage


@dataclass(frozen=True)
class Schedule:
    """Base of such a method's `Config`."""

    steps: Annotated[int, Field(ge=1)] = 50_000
    """Optimiser steps; the schedule ends with them."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Highest rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of AdamW."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the rate rises; after it a cosine to zero."""

    def stage(self, accumulate: int, clip_norm: float | None = 1.0) -> Stage:
        """The only stage of a run, with so many batches a step."""
        return Stage(
            "main",
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            warm_up=self.warm_up,
            clip_norm=clip_norm,
            accumulate=accumulate,
        )
