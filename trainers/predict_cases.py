"""Scans to masks in one process: while the network is at one scan, the next is read and the last slabs become a mask.

Reading and exporting each have a thread of their own; the network stays in the calling one. At most one scan waits to be
predicted and one slab to be exported. NumPy, torch and ITK work without Python's lock, so the threads run beside each other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from planners.dataset import Case, original_labels
from planners.errors import AutosegError
from planners.files import replacing
from planners.intact import refuse_damaged
from planners.preprocessed_case import preprocess_case
from trainers.predictor import AutosegPredictor

logger = logging.getLogger("autoseg")


def predict_cases(
    predictor: AutosegPredictor, cases: Sequence[tuple[Case, Path]], *, save_probabilities: bool = False
) -> Iterator[str | None]:
    """Write the mask of each case, and yield, in their order, what went wrong with it or None.

    Args:
        cases: each with the path of its mask; probabilities lie beside that as `<case>.npz`.
    """
    reading, exporting = ThreadPoolExecutor(1, "reading"), ThreadPoolExecutor(1, "exporting")
    try:
        scans = [reading.submit(_read, predictor, case) for case, _ in cases[:1]]
        before: tuple[str | None, _Writing] | None = None
        for number, (case, mask_file) in enumerate(cases, start=1):
            scans += [reading.submit(_read, predictor, following) for following, _ in cases[number : number + 1]]
            writing = _Writing(exporting, predictor, case, mask_file, save_probabilities)
            problem = _attempt(case, _predict, predictor, scans.pop(0), writing)
            if before is not None:  # its mask was written meanwhile
                yield before[0] or before[1].problem()
            before = problem, writing
        if before is not None:
            yield before[0] or before[1].problem()
    finally:
        for thread in (reading, exporting):
            thread.shutdown(cancel_futures=True)


class _Writing:
    """One case in the exporting thread; at most one of its slabs waits there."""

    def __init__(
        self, thread: ThreadPoolExecutor, predictor: AutosegPredictor, case: Case, mask_file: Path, probabilities: bool
    ) -> None:
        self._thread, self._predictor, self._case, self._file = thread, predictor, case, mask_file
        self._probabilities = probabilities
        self._last: Future[None] | None = None

    def start(self, shape: Sequence[int], properties: dict) -> None:
        self._properties = properties
        self._export = self._predictor.export(shape, properties, probabilities=self._probabilities)

    def add(self, slab: Tensor) -> None:
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._export.add, slab)

    def finish(self) -> None:
        if self._last is not None:
            self._last.result()
        self._last = self._thread.submit(self._write)

    def problem(self) -> str | None:
        return None if self._last is None else _attempt(self._case, self._last.result)

    def _write(self) -> None:
        mask, probabilities = self._export.result()
        if probabilities is not None:
            with replacing(self._file.with_name(f"{self._case.name}.npz")) as temporary:
                np.savez_compressed(temporary, probabilities=probabilities)
        back = original_labels(self._predictor.dataset_json)
        if back is not None:
            lookup = np.arange(max([int(mask.max()), *back]) + 1)
            lookup[list(back)] = list(back.values())
            mask = lookup.astype(np.uint16 if lookup.max() > 255 else np.uint8)[mask]
        with replacing(self._file) as temporary:
            self._predictor.plans_manager.image_reader_writer_class().write_seg(mask, str(temporary), self._properties)


def _predict(predictor: AutosegPredictor, scan: Future[tuple[Tensor, dict]], writing: _Writing) -> None:
    image, properties = scan.result()
    writing.start(image.shape[1:], properties)
    for slab in predictor.logit_slabs(image):
        writing.add(slab)
    writing.finish()


def _read(predictor: AutosegPredictor, case: Case) -> tuple[Tensor, dict]:
    for file in case.images:
        refuse_damaged(file)
    image, _, properties = preprocess_case(
        case.images, None, predictor.plans_manager.plans, predictor.configuration_name, predictor.dataset_json
    )
    if not np.isfinite(image).all():
        raise ValueError("the scan holds values that are not finite")
    return torch.from_numpy(image.astype(np.float32, copy=False)), properties


def _attempt(case: Case, function: Callable[..., None], *arguments: Any) -> str | None:
    """What went wrong with the case, or None."""
    try:
        function(*arguments)
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return f"the device ran out of memory: {str(error).splitlines()[0]}"
    except (AutosegError, RuntimeError, ValueError, AssertionError, OSError, MemoryError) as error:
        logger.debug("%s failed", case.name, exc_info=True)
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None
