"""A folder of scans to a folder of masks with a network that costs next to nothing: nnU-Net's workers, our threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import nn

from benchmarks.measuring import Agreement, Duel, Scale
from benchmarks.scans import Scan, made_up, real_ct, write_image
from benchmarks.toy_model import CONFIGURATION, ToyNetwork, load_model, toy_plan
from planners.dataset import Case
from planners.quiet import nnunet_quiet
from trainers.predict_cases import predict_cases
from trainers.predictor import AutosegPredictor

_CLASSES = 14
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Model:
    """What both sides predict with, and how."""

    plan: dict
    network: nn.Module
    classes: int
    device: torch.device = _CPU
    mirroring: bool = False


@contextmanager
def folder(scale: Scale) -> Iterator[Duel]:
    """Two CT scans of 21.5 million voxels, 14 classes, no mirroring; nnU-Net has its default of three and three workers."""
    full = scale is Scale.full
    scan = real_ct(1.2) if full else made_up((40, 60, 50), 8, (1.2,) * 3)
    model = Model(toy_plan(1.5, (128,) * 3 if full else (24, 32, 32)), ToyNetwork(_CLASSES), _CLASSES)
    with TemporaryDirectory() as name:
        root = Path(name)
        cases = write_cases(scan, 2, root)
        yield Duel(
            by_nnunet(model, cases, root / "nnunet"),
            by_autoseg(model, cases, root / "autoseg"),
            lambda theirs, ours: _agreement(model, cases[0], theirs[0], ours[0]),
        )


def write_cases(scan: Scan, count: int, root: Path) -> list[Case]:
    """A CT as `count` files, each moved by a few voxels."""
    cases = []
    for number in range(count):
        case = Case(f"case_{number}", (root / f"case_{number}_0000.nii.gz",))
        write_image(np.roll(scan.image, 3 * number, axis=1).astype(np.int16), scan.spacing, case.images[0])
        cases.append(case)
    return cases


def by_nnunet(model: Model, cases: list[Case], output: Path) -> Callable[[], list[Path]]:
    """Predicts the cases as `nnUNetv2_predict` does; returns the masks' files."""

    def run() -> list[Path]:
        output.mkdir(exist_ok=True)
        with nnunet_quiet():
            predictor = nnUNetPredictor(use_mirroring=model.mirroring, device=model.device, allow_tqdm=False)
            load_model(predictor, model.plan, model.network, model.classes)
            files, masks = [[str(case.images[0])] for case in cases], [str(output / case.name) for case in cases]
            predictor.predict_from_files(
                files, masks, num_processes_preprocessing=3, num_processes_segmentation_export=3
            )
        return [Path(f"{mask}.nii.gz") for mask in masks]

    return run


def by_autoseg(model: Model, cases: list[Case], output: Path) -> Callable[[], list[Path]]:
    """Predicts the cases as `autoseg predict` does; returns the masks' files."""

    def run() -> list[Path]:
        masks = [output / f"{case.name}.nii.gz" for case in cases]
        predictor = AutosegPredictor(model.device, mirroring=model.mirroring)
        load_model(predictor, model.plan, model.network, model.classes)
        predictor.configuration_name = CONFIGURATION
        problems = list(predict_cases(predictor, list(zip(cases, masks, strict=True))))
        assert problems == [None] * len(cases), problems
        return masks

    return run


def _agreement(model: Model, case: Case, theirs: Path, ours: Path) -> Agreement:
    """Both beside nnU-Net's own computation in single precision, of which each rounds another part."""
    exact = _in_single_precision(model, case)
    apart = [float((exact != read_mask(file)).mean()) for file in (theirs, ours)]
    return Agreement(f"{apart[1]:.1e} of voxels differ from float32, of nnU-Net's {apart[0]:.1e}", apart[1] <= apart[0])


def read_mask(file: Path) -> np.ndarray:
    """Labels (z, y, x)."""
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


@torch.inference_mode()
def _in_single_precision(model: Model, case: Case) -> np.ndarray:
    """Mask (z, y, x) of a case by nnU-Net's steps, with float32 in place of its float16."""
    predictor = nnUNetPredictor(use_mirroring=False, device=_CPU, allow_tqdm=False)
    load_model(predictor, model.plan, model.network, model.classes)
    settings, manager = predictor.configuration_manager, predictor.plans_manager
    with nnunet_quiet():
        image, _, properties = settings.preprocessor_class(verbose=False).run_case(
            [str(case.images[0])], None, manager, settings, predictor.dataset_json
        )
    data, patch = torch.from_numpy(image), tuple(settings.patch_size)
    weights = compute_gaussian(patch, 1 / 8, 10, torch.float32, _CPU)
    total, weight_sum = torch.zeros((model.classes, *data.shape[1:])), torch.zeros(data.shape[1:])
    for window in predictor._internal_get_sliding_window_slicers(data.shape[1:]):
        total[window] += predictor.network(data[window][None])[0] * weights
        weight_sum[window[1:]] += weights
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        total / weight_sum, manager, settings, predictor.label_manager, properties, num_threads_torch=1
    )
