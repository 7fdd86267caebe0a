"""A dataset ready for pretraining, and the smallest method there can be; tests change one thing of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from planners import paths
from pretrain import loop
from pretrain.catalog import Entry
from pretrain.crops import read_window
from pretrain.encoders import encoder_of
from pretrain.heads import pooled_stages
from pretrain.method import Batch, Export, PretrainMethod, Stage, Step, Target, Terms
from pretrain.volumes import CaseInfo, Volume
from tests.tiny import DATASET, tiny_plan, write_tiny_dataset

PLAN = "tinyPlans"


def make_home(root: Path, *, channels: int = 1, dims: int = 3, cases: int = 6) -> Path:
    """A raw tiny dataset and its plan below `root`."""
    write_tiny_dataset(root, cases=cases, channels=channels)
    folder = paths.preprocessed(DATASET)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{PLAN}.json").write_text(json.dumps(tiny_plan(dims=dims, channels=channels)))
    return root


def copy_home(source: Path, target: Path) -> Path:
    """A copy of what `make_home` made, with its data preprocessed if they were, and all paths there."""
    shutil.copytree(source, target)  # keeps times, so nothing is preprocessed again
    paths.configure(target)
    return target


@dataclass(frozen=True)
class StubConfig:
    steps: int = 4
    """Optimiser steps."""
    learning_rate: float = 0.01
    """Of SGD: Adam would turn rounding errors of gradients that are zero into whole steps."""


class Stub(PretrainMethod):
    """Predict the mean intensity of a crop from the pooled features."""

    Config = StubConfig
    presets: Mapping[str, Mapping[str, Any]] = {"default": {}, "cpu": {}}
    citation = "none"

    @classmethod
    def plan(cls, target: Target, pool: Sequence[CaseInfo], config: StubConfig) -> Any:
        return tuple(2 * s for s in target.encoder.total_stride)

    @staticmethod
    def draw(spec: Any, pool: Sequence[CaseInfo], rng: np.random.Generator, step: Step) -> list[tuple[str, Any]]:
        return [(pool[i].id, spec) for i in rng.choice(len(pool), min(2, len(pool)), replace=False)]

    @staticmethod
    def sample(spec: Any, case: Volume, parameters: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        start = [int(rng.integers(0, max(1, n - s + 1))) for n, s in zip(case.info.shape, parameters, strict=True)]
        crop, _ = read_window(case, start, parameters)
        return {"crop": crop, "mean": crop.mean(dtype=np.float32)}

    def __init__(self, network: nn.Module, spec: Any, config: StubConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder_of(network)
        self.head = nn.Linear(sum(self.encoder.output_channels), 1)

    def stages(self) -> Sequence[Stage]:
        return [Stage("main", optimizer="sgd", learning_rate=self.config.learning_rate)]

    def predict(self, crops: torch.Tensor) -> torch.Tensor:
        return self.head(pooled_stages(self.encoder, crops))[:, 0]

    def loss(self, batch: Batch, step: Step) -> Terms:
        return {"loss": ((self.predict(batch["crop"]) - batch["mean"]) ** 2).mean()}

    def picture(self, batch: Batch) -> Figure:
        return Figure(figsize=(1, 1))

    def export(self) -> Export:
        return Export(self.encoder, "encoder")


def use_method(monkeypatch: pytest.MonkeyPatch, method: type[PretrainMethod]) -> None:
    """Let the loop find `method` under the name `stub`."""
    entry = Entry("nowhere", "", (2, 3), ("ResidualEncoderUNet",), "")
    monkeypatch.setattr(loop, "load_method", lambda name: method)
    monkeypatch.setattr(loop, "entry", lambda name: entry)


def run_stub(**options: Any) -> Path:
    """Pretrain with the method of `use_method` on the tiny dataset, in this process."""
    return loop.pretrain(DATASET, method="stub", plan=PLAN, device="cpu", **{"workers": 0, **options})
