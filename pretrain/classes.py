"""Tasks whose answer is one of a few classes: loss, accuracy, and what to say when nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.method import Step, Terms

_SOON = 50  # steps, before which nothing can be said
_STALLED = 0.99  # of the loss of guessing
_NO_SKILL = 1.5  # times chance


def class_loss(logits: Tensor, labels: Tensor, valid: Tensor) -> Terms:
    """`loss`, the mean cross-entropy, and `acc` over the entries that are `valid`, and `shown`, their share.

    Without any the loss is 0, which has a gradient, and there is no `acc`.

    Args:
        logits: (…, classes); labels and valid: (…).
    """
    entropy = functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    counted = valid.flatten()
    right = logits.argmax(-1).flatten() == labels.flatten()
    number = counted.sum()
    terms = {"loss": (entropy * counted).sum() / number.clamp(min=1), "shown": counted.float().mean()}
    return terms | ({"acc": (right & counted).sum() / number} if number else {})


def still_guessing(recent: Mapping[str, float], step: Step, classes: int, advice: str) -> str | None:
    """A sentence for the user when loss and accuracy are those of guessing among `classes`, and some time has passed."""
    if step.index < _SOON or step.progress < 0.25 or "acc" not in recent:
        return None
    plateau = math.log(classes)
    if recent["loss"] < _STALLED * plateau or recent["acc"] > _NO_SKILL / classes:
        return None
    return (
        f"The answers are no better than guessing yet: loss {recent['loss']:.3f} (guessing {plateau:.3f}), "
        f"right {recent['acc']:.3f} (chance {1 / classes:.3f}). {advice}"
    )


@torch.no_grad()
def probabilities(logits: Tensor) -> Tensor:
    """(…, classes) → the same, float32 on the CPU, for pictures."""
    return logits.float().softmax(-1).cpu()
