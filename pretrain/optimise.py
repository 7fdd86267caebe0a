"""What an optimiser step consists of, apart from the loss: phases, rates, optimisers and moving averages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from planners.errors import SettingsError
from pretrain.method import MomentumPair, ParameterGroup, PretrainMethod, Stage, Step
from pretrain.optimisers import SGD, Adam, AdamW


@dataclass(frozen=True)
class Phase:
    """A stage and the steps it gets."""

    stage: Stage
    first_step: int
    steps: int


def phases(stages: Sequence[Stage], steps: int, chosen: Sequence[str] | None = None) -> list[Phase]:
    """Share `steps` out among the stages, or among the `chosen` ones (names, or numbers from 1)."""
    names = [stage.name for stage in stages]
    if chosen is not None:
        numbered = {str(number): name for number, name in enumerate(names, start=1)}
        wanted = [numbered.get(text, text) for text in chosen]
        unknown = [text for text in wanted if text not in names]
        if unknown or not wanted:
            raise SettingsError("No such stage", found=", ".join(unknown) or "none", expected=", ".join(names))
        stages = [stage for stage in stages if stage.name in wanted]
    if steps < len(stages):
        raise SettingsError("Fewer steps than stages", found=steps, expected=f"at least {len(stages)}")
    total = sum(stage.share for stage in stages)
    ends = [0]
    for number in range(1, len(stages) + 1):
        later = len(stages) - number  # each of them needs a step
        share = sum(s.share for s in stages[:number]) / total
        ends.append(min(max(round(share * steps), ends[-1] + 1), steps - later))
    return [Phase(stage, a, b - a) for stage, (a, b) in zip(stages, itertools.pairwise(ends), strict=True)]


def rate_factor(stage: Stage, step: Step) -> float:
    """Share of the stage's learning rate at a step: a linear rise, then the stage's schedule."""
    warm_up = round(stage.warm_up * step.total)
    if step.index < warm_up:
        return (step.index + 1) / warm_up
    if stage.schedule == "constant":
        return 1.0
    done = (step.index - warm_up) / (step.total - warm_up)
    return stage.schedule(done) if callable(stage.schedule) else 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(stage: Stage, groups: Sequence[ParameterGroup]) -> Optimizer:
    """The optimiser of a stage over the parameters of `groups` that can learn; groups keep their order."""
    listed = [
        {
            "params": [parameter for parameter in group.parameters if parameter.requires_grad],
            "weight_decay": stage.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
    ]
    if stage.optimizer == "sgd":
        momentum = stage.betas[0]
        return SGD(listed, lr=stage.learning_rate, momentum=momentum, nesterov=momentum > 0)
    kind = AdamW if stage.optimizer == "adamw" else Adam
    return kind(listed, lr=stage.learning_rate, betas=stage.betas, amsgrad=stage.amsgrad)


def set_rates(optimizer: Optimizer, stage: Stage, groups: Sequence[ParameterGroup], step: Step) -> float:
    """Set every group's learning rate for a step; returns the stage's."""
    rate = stage.learning_rate * rate_factor(stage, step)
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["lr"] = rate * (group.scale(step) if callable(group.scale) else group.scale)
    return rate


def prepare_stage(method: PretrainMethod, stage: Stage, learnable: Sequence[nn.Parameter]) -> None:
    """Freeze what the stage freezes, let the rest of `learnable` learn, and set the modes."""
    for parameter in learnable:
        parameter.requires_grad_(True)
    for name in stage.frozen:
        method.get_submodule(name).requires_grad_(False)
    set_training_mode(method, stage)


def set_training_mode(method: PretrainMethod, stage: Stage) -> None:
    """Training mode, but for averages and frozen modules."""
    method.train()
    for pair in method.momentum_pairs():
        pair.average.eval()
    for name in stage.frozen:
        method.get_submodule(name).eval()


@torch.no_grad()
def update_averages(pairs: Sequence[MomentumPair], step: Step) -> None:
    """Move every average towards its online module, which the optimiser has just changed."""
    for pair in pairs:
        momentum = pair.momentum(step)
        for average, online in zip(pair.average.parameters(), pair.online.parameters(), strict=True):
            average.mul_(momentum).add_(online, alpha=1 - momentum)
        if pair.copy_buffers:
            for held, given in zip(pair.average.buffers(), pair.online.buffers(), strict=True):
                held.copy_(given)
