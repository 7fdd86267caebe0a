"""The three stages, and what changes in the course of them.

Source: DINOv3 (arXiv:2508.10104), ricklisz/FlexiCT:configs.
"""

from __future__ import annotations

import math

from pretrain.method import Step

DINO, GRAM, HIGH = "dino", "gram", "high"
"""Names of the stages: from the start, with similarities kept, with larger crops."""
WARM_UP = 0.1
"""Share of stage dino."""
_FIRST_TEMPERATURE = 0.04
_LAST_LAYERS_REST = 0.1  # of the warm-up
_IN_GRAM, _IN_HIGH = 2.0, 1.5
_GRAM_RISE = 0.05  # of stage gram


def late_fall(done: float) -> float:
    """1, and in the last tenth linearly down to a tenth."""
    return min(1.0, 1.0 - 0.9 * (done - 0.9) / 0.1)


def slow_rise(done: float) -> float:
    """From 0 to 1 as half a cosine."""
    return 0.5 * (1 - math.cos(math.pi * done))


def gram_weight(step: Step) -> float:
    """From 0 to 2 as half a cosine in the first twentieth of stage gram; 1.5 in stage high."""
    if step.stage == HIGH:
        return _IN_HIGH
    return _IN_GRAM * slow_rise(min(1.0, step.progress / _GRAM_RISE))


def last_layer_scale(step: Step) -> float:
    """0 in the first tenth of the warm-up of stage dino, then 1: prototypes do not move before there is something to say."""
    return 0.0 if step.stage == DINO and step.progress < WARM_UP * _LAST_LAYERS_REST else 1.0


def teacher_temperature(step: Step, last: float) -> float:
    """From 0.04 to `last` during the warm-up of stage dino."""
    share = min(1.0, step.progress / WARM_UP) if step.stage == DINO else 1.0
    first = min(_FIRST_TEMPERATURE, last)
    return first + share * (last - first)
