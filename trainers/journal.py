"""The record of a training: a line for the user, `progress.csv`, TensorBoard and nnU-Net's `progress.png`, once an epoch."""

from __future__ import annotations

import csv
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from planners.files import replacing
from planners.progress import duration

_LISTED_STRUCTURES = 4
_SECONDS_BETWEEN_PLOTS = 30.0  # nnU-Net's picture takes most of a second, as long as a short epoch


class Journal:
    """Writes into one fold's folder. After a resume it continues where the checkpoint was, whatever had been written."""

    def __init__(self, folder: Path, class_names: Sequence[str], *, first_epoch: int) -> None:
        self.folder = folder
        self.class_names = class_names
        self._first_epoch = first_epoch
        self._plotted = 0.0

    @functools.cached_property
    def _tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # takes half a second: not before the first iteration

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._first_epoch)

    def write(self, log: LocalLogger, *, is_last: bool) -> str:
        """Record the newest epoch of `log`; returns it as a line of text."""
        rows = self._rows(log.my_fantastic_logging)
        with replacing(self.folder / "progress.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        newest = rows[-1]
        for name, value in newest.items():
            if name != "epoch":
                self._tensorboard.add_scalar(name, value, int(newest["epoch"]) - 1)
        if is_last or time.monotonic() - self._plotted > _SECONDS_BETWEEN_PLOTS:
            with matplotlib.rc_context():  # nnU-Net's picture sets fonts for the whole process
                log.plot_progress_png(str(self.folder))
            self._plotted = time.monotonic()
        return (
            f"loss {newest['train_loss']:.3f}, validation loss {newest['validation_loss']:.3f}, "
            f"Dice of patches {newest['dice']:.3f} ({self._classes(newest)}), "
            f"rate {newest['lr']:.1e}, {duration(newest['seconds'])}"
        )

    def _classes(self, row: dict[str, float]) -> str:
        """Dice of each structure, or the range where a line would not hold them (`progress.csv` does)."""
        values = {name: row[f"dice_{name}"] for name in self.class_names}
        if len(values) > _LISTED_STRUCTURES:
            return f"{len(values)} structures from {min(values.values()):.2f} to {max(values.values()):.2f}"
        return ", ".join(f"{name} {value:.2f}" for name, value in values.items())

    def close(self) -> None:
        if "_tensorboard" in vars(self):
            self._tensorboard.close()

    def _rows(self, log: dict[str, list]) -> list[dict[str, float]]:
        return [
            {
                "epoch": epoch + 1,
                "train_loss": float(log["train_losses"][epoch]),
                "validation_loss": float(log["val_losses"][epoch]),
                "dice": float(log["mean_fg_dice"][epoch]),
                "dice_moving_average": float(log["ema_fg_dice"][epoch]),
                "lr": float(log["lrs"][epoch]),
                "seconds": float(log["epoch_end_timestamps"][epoch] - log["epoch_start_timestamps"][epoch]),
                **{
                    f"dice_{name}": float(value)
                    for name, value in zip(self.class_names, log["dice_per_class_or_region"][epoch], strict=True)
                },
            }
            for epoch in range(len(log["epoch_end_timestamps"]))
        ]
