"""Training cases as nnU-Net loads them, except that the properties beside a case are read without running code."""

from __future__ import annotations

import hashlib
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from planners.files import read_case_properties


class SafeDataset(nnUNetDatasetBlosc2):
    """nnU-Net's dataset of `.b2nd` files with the restricted reader for `.pkl`."""

    def load_case(self, identifier: str) -> tuple:
        """image (C, Z, Y, X), labels (1, Z, Y, X), None (no cascade), properties; voxels are read when sliced."""
        folder = Path(self.source_folder)
        image, labels = (
            blosc2.open(
                urlpath=str(folder / f"{identifier}{ending}"), mode="r", dparams={"nthreads": 1}, **self.mmap_kwargs
            )
            for ending in (".b2nd", "_seg.b2nd")
        )
        return image, labels, None, read_case_properties(folder / f"{identifier}.pkl")


def label_subset(cases: Sequence[str], fraction: float, seed: int) -> list[str]:
    """`fraction` of the cases, at least one, in the order given.

    Each seed has its own order of all cases and takes the first of them: with one seed a smaller share is a part of every
    larger one. The order is by hash, so it does not depend on the fold or on which other cases there are.
    """
    drawn = sorted(cases, key=lambda case: hashlib.sha256(f"{seed}/{case}".encode()).digest())
    chosen = set(drawn[: max(1, round(fraction * len(drawn)))])
    return [case for case in cases if case in chosen]


def loader_workers(device_type: str) -> int:
    """Processes that cut and augment patches: none beside a network that trains on the same cores, where they only
    contend with it, else one for each core left, at most nnU-Net's 12. `nnUNet_n_proc_DA` decides otherwise."""
    if "nnUNet_n_proc_DA" in os.environ:
        return int(os.environ["nnUNet_n_proc_DA"])
    if device_type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(12, cores - 1))


def in_processes(loader: Any, workers: int, *, ahead: int, pinned: bool) -> Iterator[dict]:
    """Batches of a loader, drawn by worker processes that keep up to `ahead` ready, or here when asked for without any.

    Args:
        pinned: put them where they can be copied to the GPU beside its work.
    """
    if workers == 0:
        return loader
    batches = NonDetMultiThreadedAugmenter(loader, None, workers, num_cached=ahead, pin_memory=pinned, wait_time=0.002)
    batches._start()  # now: processes forked in the midst of training would share its memory
    return batches


def seed_all(*key: int | str) -> None:
    """Seed Python's, numpy's and torch's generators from a key such as (seed, fold, epoch, iteration)."""
    numbers = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in key]
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable within the block: nnU-Net takes some options only from there."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
