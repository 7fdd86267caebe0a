"""A tiny encoder where `autoseg pretrain` would leave it, and what tests of sharing look at."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch

from planners import paths
from planners.plans import plan_hash
from pretrain.checkpoint import EncoderCard, encoder_folder, save_encoder
from pretrain.encoders import build_segmentation_network, encoder_of
from tests.tiny import DATASET, dataset_json, tiny_plan


def tiny_card(plan: dict, **changes) -> EncoderCard:
    configuration, content = next(iter(plan["configurations"].items()))
    values = {
        "method": "voco", "version": "0.1.0", "dataset": plan["dataset_name"], "plan_name": plan["plans_name"],
        "plan_hash": plan_hash(plan, configuration), "configuration": configuration,
        "architecture": content["architecture"], "scope": "encoder", "spacing": content["spacing"],
        "patch_size": content["patch_size"], "DA": 1, "channels": ["MR0"], "intensity": ["ZScoreNormalization"],
        "steps_done": 10, "steps_asked": 10, "metrics": {"placement": {"value": 0.5, "chance": 0.25}},
        "cases": [f"{DATASET}/case_{index:02d}" for index in range(5)], "held_out": [f"{DATASET}/case_05"],
        "excluded_fold": None, "licence": "CC-BY-4.0", "citation": "Wu et al. 2024",
        "task": {"views": {"layout": {"grid": [1, 2, 3]}, "shift": 0.5}, "chance": {"placement": 0.25}},
    }  # fmt: skip
    return EncoderCard(**{**values, **changes})


def write_tiny_encoder(plan: dict | None = None, run: str | None = None, **changes) -> Path:
    """An encoder with seeded weights in the results folder; returns its folder."""
    plan = plan or tiny_plan()
    card = tiny_card(plan, **changes)
    torch.manual_seed(3)
    network = build_segmentation_network(
        plan, card.configuration, dataset_json(len(card.channels)), deep_supervision=False
    )
    folder = encoder_folder(card.dataset, card.plan_name, card.configuration, card.method, run)
    save_encoder(folder, encoder_of(network), card)
    return folder


def tree(root: Path) -> dict[str, int]:
    """Every file below a folder and its size."""
    return {p.relative_to(root).as_posix(): p.stat().st_size for p in sorted(root.rglob("*")) if p.is_file()}


def entries(archive: Path) -> dict[str, bytes]:
    """The files of a zip."""
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist()}


def manifest_of(archive: Path) -> dict:
    return json.loads(entries(archive)["manifest.json"])


def use(root: Path) -> Path:
    """Point all paths to another data root."""
    paths.configure(root)
    return root
