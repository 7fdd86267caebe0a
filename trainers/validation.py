"""The validation cases of a fold, predicted and measured in this process.

nnU-Net starts eight processes to write masks and eight more to measure them, which takes most of a small run. The result
is the same: masks and `summary.json` in the fold's `validation` folder. Repeating continues where it was.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from planners.errors import DatasetError
from planners.files import replacing
from planners.progress import track
from planners.quiet import nnunet_quiet
from trainers.label_names import class_names
from trainers.predictor import AutosegPredictor
from trainers.runs import FINAL

if TYPE_CHECKING:
    from trainers.base import AutosegTrainer

logger = logging.getLogger("autoseg")


def validate_fold(trainer: AutosegTrainer, *, save_probabilities: bool = False) -> dict:
    """Predict the fold's validation cases with the final weights, measure them, and write `validation/summary.json`.

    Masks newer than the final checkpoint are kept. Returns the content of the summary.
    """
    folder = Path(trainer.output_folder) / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    with nnunet_quiet():
        _, names = trainer.do_split()
    final = Path(trainer.output_folder) / FINAL
    trained_at = final.stat().st_mtime_ns if final.is_file() else 0
    ending = trainer.dataset_json["file_ending"]
    reader = trainer.plans_manager.image_reader_writer_class()
    labels = trainer.label_manager
    regions = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    references = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"

    trainer.set_deep_supervision_enabled(False)
    predictor = AutosegPredictor(trainer.device)
    with nnunet_quiet():
        predictor.manual_initialization(
            trainer.bare_network,
            trainer.plans_manager,
            trainer.configuration_manager,
            [trainer.bare_network.state_dict()],
            trainer.dataset_json,
            "nnUNetTrainer",
            trainer.inference_allowed_mirroring_axes,
        )
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, list(names))
    cases = []
    for name in track(sorted(names), "Validating"):
        mask_file, reference = folder / f"{name}{ending}", references / f"{name}{ending}"
        if not reference.is_file():
            raise DatasetError("The reference labels of a validation case are missing", where=reference)
        if not mask_file.is_file() or mask_file.stat().st_mtime_ns < trained_at:
            image, _, _, properties = dataset.load_case(name)
            mask, probabilities = predictor.predict_mask(
                torch.from_numpy(np.ascontiguousarray(image[:])), properties, probabilities=save_probabilities
            )
            if probabilities is not None:
                with replacing(folder / f"{name}.npz") as temporary:
                    np.savez_compressed(temporary, probabilities=probabilities)
            with replacing(mask_file) as temporary:
                reader.write_seg(mask, str(temporary), properties)
        cases.append(compute_metrics(str(reference), str(mask_file), reader, regions, labels.ignore_label))
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)

    summary = _summary(cases, regions)
    with replacing(folder / "summary.json") as temporary:
        save_summary_json(summary, str(temporary))
    dice = {
        name: summary["mean"][region]["Dice"]
        for name, region in zip(class_names(trainer.dataset_json), regions, strict=True)
    }
    trainer.say(
        f"Validation of {len(cases)} cases: Dice {summary['foreground_mean']['Dice']:.3f} ("
        + ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
        + f")  {folder / 'summary.json'}"
    )
    return summary


def _summary(cases: list[dict], regions: list) -> dict[str, Any]:
    """nnU-Net's layout: each case, the mean of each label over the cases that have it, and the mean of those."""
    metrics = list(cases[0]["metrics"][regions[0]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a label that no case has: its mean is NaN, as in nnU-Net
        means = {r: {m: np.nanmean([case["metrics"][r][m] for case in cases]) for m in metrics} for r in regions}
    summary = {
        "metric_per_case": cases,
        "mean": means,
        "foreground_mean": {m: np.mean([means[r][m] for r in regions if r != 0]) for m in metrics},
    }
    for part in (*cases, means, summary["foreground_mean"]):
        recursive_fix_for_json_export(part)
    return summary
