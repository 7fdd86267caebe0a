"""The contract between a pretraining method and the loop.

A method is one class: what it cuts from the scans (`plan`, `draw`, `sample`, `collate`: numpy, no weights, run in worker
processes) and what it learns from that (`__init__`, `loss` and a few optional hooks: torch). The loop owns cases, workers,
seeds, device, precision, accumulation, optimisers, schedules, momentum copies, several processes, resume, logging, pictures,
held-out metrics and export; it knows no method by name. `docs/contract.md` says which of nine published methods needs what.

`autoseg methods` lists the methods there are; `pretrain/catalog.py` is the table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from planners.plans import resolved
from pretrain.encoders import EncoderInfo
from pretrain.volumes import CaseInfo, Volume

Batch = dict[str, Any]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """Where a run is. Indices count optimiser steps from 0."""

    stage: str
    index: int
    """Within the stage."""
    total: int
    """Steps of the stage."""
    global_index: int
    """Within the run, over all stages."""

    @property
    def progress(self) -> float:
        """Share of the stage that is done, in [0, 1)."""
        return self.index / self.total


@dataclass(frozen=True)
class Stage:
    """One phase of training with an optimiser and a schedule of its own. Its modules are the method's."""

    name: str
    share: float = 1.0
    """Of the run's steps, in proportion to the shares of the other stages."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam; SGD takes the first as its momentum (Nesterov)."""
    amsgrad: bool = False
    warm_up: float = 0.02
    """Share of the stage in which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "constant"] | Callable[[float], float] = "cosine"
    """After the warm-up: cosine to zero, as it is, or times a function of how much of the rest is done, in [0, 1)."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient of all parameters together."""
    clip_apart: tuple[str, ...] = ()
    """Submodules (by name) whose gradients are clipped each on its own instead; what is in none of them is not clipped."""
    accumulate: int = 1
    """Batches for one optimiser step; their gradients are averaged."""
    frozen: tuple[str, ...] = ()
    """Submodules (by name) that do not learn in this stage and run in eval mode."""
    goes_on: bool = False
    """Whether it makes no sense on new weights: those of a stage before it are needed, or of `--init`."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a rate."""

    parameters: Sequence[nn.Parameter]
    scale: float | Callable[[Step], float] = 1.0
    """Multiplies the learning rate of the stage; a function of the step for a layer that starts late."""
    weight_decay: float | None = None
    """Instead of the stage's."""


@dataclass(frozen=True)
class MomentumPair:
    """`average` follows `online` after each optimiser step: average = m average + (1 - m) online."""

    online: nn.Module
    average: nn.Module
    """A deep copy made in `__init__` and kept as a submodule; the loop freezes it and keeps it in eval mode."""
    momentum: Callable[[Step], float]
    copy_buffers: bool = True
    """Whether buffers are copied from `online`, or left alone."""


@dataclass(frozen=True)
class Export:
    """What a run leaves behind."""

    module: nn.Module
    scope: Literal["encoder", "encoder+decoder"]
    """`encoder`: the module is an encoder; `encoder+decoder`: a whole network of the plan."""
    extras: Mapping[str, nn.Module] = field(default_factory=dict)
    """Submodules of the method by name, written as `NAME.safetensors` beside the encoder. `--init` with such a folder fills
    them too, so that a run may leave out the stage that trains them. What is filled in an average, is in its online module."""


@dataclass(frozen=True)
class Target:
    """The network that is pretrained: one configuration of a plan."""

    plan: Mapping[str, Any]
    configuration: str
    encoder: EncoderInfo
    initialised: bool = False
    """Whether its weights come from `--init`."""
    settings: dict[str, Any] = field(init=False)
    """The configuration with `inherits_from` followed."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", resolved(dict(self.plan), self.configuration))

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels, (z, y, x) or (y, x)."""
        return tuple(int(n) for n in self.settings["patch_size"])

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm, (z, y, x) or (y, x)."""
        return tuple(float(s) for s in self.settings["spacing"])


class PretrainMethod(nn.Module, ABC):
    """Base of all methods. `Config` is a frozen dataclass with a docstring for each field and at least `steps`."""

    Config: ClassVar[type]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]
    """`default` and `cpu`: what each changes in `Config`."""
    citation: ClassVar[str]
    own_grid: ClassVar[bool] = False
    """Whether scans from other datasets and folders keep their voxels and channels: cases differ in spacing and channels then,
    and a 2D image is a case of one slice."""

    gather: Callable[[Tensor], Tensor]
    """Concatenates a tensor (n, …) of every process to (processes · n, …), differentiably. With a loss term computed from
    gathered tensors, and identical on all processes, the averaged gradient is that of the joint batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = _itself

    # What is cut: no weights, no state -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: Any) -> Any:
        """Decide sizes, classes and batch: the method's own frozen dataclass, which is pickled to the workers.

        It is written into `encoder.json`, which is shared: plain values, all that makes the task, no names of cases, no paths.

        Raises PlanError with the remedy when the method cannot work on these cases.
        """

    @classmethod
    def configuration(cls, settings: Mapping[str, Any]) -> str | None:
        """The configuration the method works on if the user names none; None: the plan's first choice.

        Args:
            settings: what the user gave, by name, as text or value.
        """
        return None

    @classmethod
    def data_configuration(cls, target: Target) -> str:
        """The configuration of the plan whose preprocessed scans are read."""
        return target.configuration

    @staticmethod
    @abstractmethod
    def draw(spec: Any, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, Any]]:
        """The cases of one batch, each with the parameters of its view. No voxels are read.

        What a whole batch must share (a degree of anisotropy, a crop size, a budget of masks) is decided here.
        """

    @staticmethod
    @abstractmethod
    def sample(spec: Any, case: Volume, parameters: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The views of one case. After ten tries the best one is returned and marked, and `loss` masks it."""

    @staticmethod
    def collate(samples: list[dict[str, np.ndarray]]) -> Batch:
        """A batch from samples: arrays of the same key are stacked."""
        return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}

    # What is learned -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch, step: Step) -> Terms:
        """`"loss"` is minimised. Other scalars are logged; other tensors only reach `after_step`. No side effects.

        A metric that a batch says nothing about is left out. `"shown"` is the share of the batch that counts: where it is 0,
        means leave out the batch's loss, which must be a number with a gradient all the same, and all other terms.
        A metric named `acc…` is reported beside its value in `chance`.
        """

    def stages(self) -> Sequence[Stage]:
        """The phases, in order."""
        return [Stage("main")]

    def parameter_groups(self, stage: Stage) -> Sequence[ParameterGroup]:
        """What learns in `stage`; the loop leaves out what is frozen."""
        return [ParameterGroup(list(self.parameters()))]

    def backward(self, batch: Batch, step: Step, run: Callable[[Tensor], None]) -> Terms:
        """Compute the terms and the gradients; `run(part)` backpropagates one scalar and may be called several times.

        Override it where a single graph would be too large. Gradients that `run` left in a leaf are scaled already: send
        them further with `torch.autograd.backward(tensors, gradients)`.
        """
        terms = self.loss(batch, step)
        run(terms["loss"])
        return terms

    def momentum_pairs(self) -> Sequence[MomentumPair]:
        """Modules that follow others by moving average."""
        return []

    def after_step(self, batch: Batch, terms: Terms, step: Step) -> None:
        """Change queues, centres and running statistics (buffers), after the optimiser and the moving averages.

        Called for each batch of the step, and never for held-out batches. An AutosegError raised here ends a run without
        hope; raise it on all processes.
        """

    def chance(self) -> Mapping[str, float]:
        """Value of a metric that guessing reaches."""
        return {}

    def diagnose(self, recent: Mapping[str, float], step: Step) -> str | None:
        """What looks wrong, from moving averages of the terms; shown to the user once."""
        return None

    @abstractmethod
    def picture(self, batch: Batch) -> Any:
        """A matplotlib Figure that shows the task and how well it is solved on a held-out batch."""

    @abstractmethod
    def export(self) -> Export:
        """What is kept."""


def _itself(tensor: Tensor) -> Tensor:
    return tensor
