"""`autoseg demo`: the main job on phantoms, offline, in minutes: plan → pretrain → train → predict → evaluate."""

from __future__ import annotations

import logging
import resource
import time
from pathlib import Path

from autoseg import commands
from autoseg.console import print_plans
from autoseg.evaluation import print_evaluation
from autoseg.overlay import draw_overlay
from autoseg.phantoms import MADE_BY, made_by_demo, write_phantoms
from planners import paths
from planners.errors import DatasetError
from planners.progress import duration

logger = logging.getLogger("autoseg")

DATASET = "Dataset017_BTCV"
# Short, so that the whole demonstration stays below eight CPU minutes on two cores.
_PRETRAIN_STEPS = 200
_TRAIN = {"epochs": 12, "iterations": 50}


def run_demo(root: Path) -> Path:
    """Run every stage below `root` and return the overlay picture. Repeating continues where it was stopped.

    Raises DatasetError when `root` holds a Dataset017 that the demonstration did not make.
    """
    folders = paths.configure(root)
    started = time.monotonic()
    _refuse_foreign_dataset(folders.raw)
    raw = paths.raw(DATASET)
    _heading(1, "Phantoms of the abdomen: 12 labelled, 4 unlabelled, 3 to test on")
    write_phantoms(raw)
    logger.info("Wrote %s", raw)

    _heading(2, "autoseg plan_and_preprocess -d 17")
    pair = commands.plan_and_preprocess(17, on_planned=print_plans, root=root)
    plan = pair.cpu["plans_name"]

    setting = "voco.region=full"  # all phantoms show the same part of the body
    _heading(
        3, f"autoseg pretrain -d 17 --method voco --preset cpu --steps {_PRETRAIN_STEPS} --set {setting} -p {plan}"
    )
    commands.pretrain(
        17,
        method="voco",
        preset="cpu",
        steps=_PRETRAIN_STEPS,
        settings=dict([setting.split("=")]),
        plan=plan,
        device="cpu",
        root=root,
    )

    options = " ".join(f"--{name} {value}" for name, value in _TRAIN.items())
    _heading(4, f"autoseg train -d 17 --pretrained voco {options} -p {plan}")
    commands.train(17, pretrained="voco", settings=_TRAIN, plan=plan, device="cpu", root=root)

    masks = Path(root) / "masks"
    _heading(5, f"autoseg predict -i {raw / 'imagesTs'} -o {masks} -d 17")
    commands.predict(raw / "imagesTs", masks, dataset=17, plan=plan, run="voco", device="cpu", root=root)

    _heading(6, f"autoseg evaluate -i {masks} -r {raw / 'labelsTs'} -d 17")
    print_evaluation(commands.evaluate(masks, raw / "labelsTs", 17, root=root))

    picture = draw_overlay(raw / "imagesTs", masks, raw / "labelsTs", raw / "dataset.json", Path(root) / "overlay.png")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    logger.info(
        "\nDone in %s (%.1f CPU minutes). Picture: %s",
        duration(time.monotonic() - started),
        (usage.ru_utime + usage.ru_stime) / 60,
        picture,
    )
    logger.info("Training was cut to minutes, which the large organs need; small ones take a longer run (--epochs).")
    logger.info(
        "With your own scans:\n"
        "  autoseg convert folder --images SCANS --labels MASKS --channels CT -d 18 --name Mine\n"
        "  autoseg verify -d 18\n"
        "  autoseg plan_and_preprocess -d 18\n"
        "  autoseg pretrain -d 18 --method voco\n"
        "  autoseg train -d 18 --pretrained voco\n"
        "  autoseg predict -i NEW_SCANS -o OUT -d 18"
    )
    return picture


def _refuse_foreign_dataset(raw: Path) -> None:
    for folder in raw.glob("Dataset017_*"):
        if not made_by_demo(folder):
            raise DatasetError(
                "There is a Dataset017 here that the demonstration did not make",
                where=folder,
                expected=f"none, or one marked {MADE_BY!r}",
                remedy="give the demonstration a folder of its own: autoseg demo --root DIR",
            )


def _heading(number: int, text: str) -> None:
    logger.info("\n[%d/6] %s", number, text)
