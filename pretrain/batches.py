"""Whole batches made in worker processes. What is in batch t depends on the seed, t and the process alone: not on the number
of workers, nor on where a run was interrupted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.method import Batch, PretrainMethod, Step
from pretrain.volumes import Pool, Volumes

LEARNING, HELD_OUT = 0, 1  # streams of random numbers


class Batches(Dataset):
    """The batches of one stage by number; `accumulate` of them make a step."""

    def __init__(
        self,
        method: type[PretrainMethod],
        spec: Any,
        pool: Pool,
        *,
        seed: int,
        stream: int,
        rank: int,
        stage: str,
        first_step: int,
        steps: int,
        accumulate: int,
    ) -> None:
        self._method, self._spec, self._pool = method, spec, pool
        self._seed, self._accumulate = (seed, stream, rank), accumulate
        self._stage, self._first_step, self._steps = stage, first_step, steps
        self._volumes: Volumes | None = None  # opened where it is used: handles do not survive a fork or a pickle

    def __len__(self) -> int:
        return self._steps * self._accumulate

    def __getitem__(self, number: int) -> Batch:
        if self._volumes is None:
            self._volumes = Volumes(self._pool)
        index = number // self._accumulate
        step = Step(self._stage, index, self._steps, self._first_step + index)
        seed = [*self._seed, step.global_index, number % self._accumulate]
        drawn = self._method.draw(self._spec, self._pool.cases, np.random.default_rng(seed), step)
        samples = [
            self._method.sample(
                self._spec, self._volumes[case], parameters, np.random.default_rng([*seed, 1 + position])
            )
            for position, (case, parameters) in enumerate(drawn)
        ]
        return self._method.collate(samples)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_volumes": None}


def load(batches: Batches, first: int, *, workers: int, pin: bool) -> Iterator[Batch]:
    """All batches from number `first` on, in order."""
    loader: DataLoader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(first, len(batches)),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_ignore_stop_signals,
        pin_memory=pin,
    )
    return iter(loader)


def step_seed(seed: int, rank: int, step: Step, part: int) -> int:
    """Seed of torch's generator for one batch of a step, so that dropout and the like need no state to resume."""
    return int(np.random.SeedSequence([seed, rank, step.global_index, part]).generate_state(1, np.uint64)[0] >> 1)


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_stop_signals(worker: int) -> None:
    # The main process saves and then ends its workers; a terminal or a cluster sends the signal to all of them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
