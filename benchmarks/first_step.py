"""A training command up to its first step, as `python -m benchmarks.first_step nnunet|autoseg ARGUMENTS`: for `startup.py`.

The process ends where the trainer is about to compute, and says of what shape its first batch is.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any


def main() -> None:
    side = sys.argv.pop(1)
    if side == "nnunet":
        from nnunetv2.run.run_training import run_training_entry as run
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    else:
        from planners.deferred import TRAINER, import_quickly

        import_quickly(TRAINER)
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        from autoseg.__main__ import main as run
    nnUNetTrainer.train_step = _stop
    run()


def _stop(trainer: Any, batch: dict[str, Any]) -> None:
    print("first step", tuple(batch["data"].shape), flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
