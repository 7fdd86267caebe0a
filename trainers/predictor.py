"""A trained model in memory: from one preprocessed case to logits, and from logits to a mask on the grid of the scan.

Differs from nnU-Net's predictor in how, not in what: weights are read without running code, the network's class comes
from the exact table, mirrored copies of a patch go through the network together, and logits are summed in float32 where
nnU-Net uses float16 (its rounding changes about one voxel in 10,000).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from planners.device import cpu_has_bfloat16, has_compiler
from planners.errors import DatasetError, PlanError, SettingsError
from planners.files import read_json
from planners.quiet import nnunet_quiet
from pretrain.networks.registry import build_network
from pretrain.transfer import distinct
from trainers.checkpoint import load_checkpoint
from trainers.export import Export, export_of_case
from trainers.runs import FINAL, finished_folds
from trainers.sliding_window import Windows, logits_in_slabs, padded

logger = logging.getLogger("autoseg")

_VOXELS_PER_FORWARD = {"cpu": 2**18, "cuda": 2**24, "mps": 2**22}
"""Patches go through the network together up to this size; more gains nothing and costs memory."""


class AutosegPredictor(nnUNetPredictor):
    """One model, all asked folds averaged."""

    folds: tuple[int | str, ...] = ()
    configuration_name: str = ""
    _fold: int | None = None
    """Whose weights the network has, counted from 0."""
    _run: Any = None
    """The compiled network, if it is to be compiled; its weights are those of `network`."""

    def __init__(
        self,
        device: torch.device,
        *,
        step_size: float = 0.5,
        mirroring: bool = True,
        precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        """
        Args:
            step_size: of the window, as a share of its size.
            mirroring: average over the mirrored copies that the model was trained with.
            precision: of the network on a CPU: float32, or bfloat16, which changes a few voxels of a mask.
            compiled: compile the network, which takes tens of seconds a model and pays for many scans.
        """
        _refuse_impossible(device, precision, compiled)
        self._reduced, self._compiled = precision == "bfloat16", compiled
        with nnunet_quiet():
            super().__init__(
                tile_step_size=step_size,
                use_mirroring=mirroring,
                perform_everything_on_device=device.type == "cuda",
                device=device,
                allow_tqdm=False,
            )

    def initialize_from_trained_model_folder(
        self,
        model_training_output_dir: str | Path,
        use_folds: Sequence[int | str] | None = None,
        checkpoint_name: str = FINAL,
    ) -> None:
        """Load a model folder of autoseg or stock nnU-Net; all finished folds, unless some are named.

        Raises DatasetError for missing files, UnsafeFile for a plan or checkpoint that asks for code, PlanError for a
        network that the plan does not describe.
        """
        folder = Path(model_training_output_dir)
        missing = [name for name in ("plans.json", "dataset.json") if not (folder / name).is_file()]
        folds = tuple(use_folds or [f for f in finished_folds(folder) if f != "all"] or finished_folds(folder))
        missing += [
            f"fold_{f}/{checkpoint_name}" for f in folds if not (folder / f"fold_{f}" / checkpoint_name).is_file()
        ]
        if missing or not folds:
            raise DatasetError(
                "Not a model folder with a finished training",
                where=folder,
                found=f"no {', no '.join(missing)}" if missing else f"no fold with a {checkpoint_name}",
                expected=f"plans.json, dataset.json, fold_0/{checkpoint_name}",
            )
        plan = read_json(folder / "plans.json")
        dataset_json = read_json(folder / "dataset.json")
        checkpoints = [load_checkpoint(folder / f"fold_{fold}" / checkpoint_name) for fold in folds]
        self.initialize_from_parts(plan, dataset_json, checkpoints)
        self.folds = folds

    def initialize_from_parts(self, plan: dict, dataset_json: dict, checkpoints: Sequence[dict]) -> None:
        """Build the network of a plan and take the weights of one or several checkpoints (one a fold)."""
        first = checkpoints[0]
        manager = PlansManager(plan)
        settings = manager.get_configuration(first["init_args"]["configuration"])
        if settings.previous_stage_name is not None:
            raise PlanError(
                "Models of a cascade need the masks of the stage before, which cannot be made here yet",
                remedy="predict both stages with nnUNetv2_predict",
            )
        heads = manager.get_label_manager(dataset_json).num_segmentation_heads
        channels = determine_num_input_channels(manager, settings, dataset_json)
        network = build_network(
            settings.configuration["architecture"], channels, heads, deep_supervision=False, initialise=False
        )
        weights = [checkpoint["network_weights"] for checkpoint in checkpoints]
        try:
            for state in reversed(weights):
                network.load_state_dict(state)
        except RuntimeError as error:
            raise PlanError(
                "The plan does not describe the network whose weights these are",
                found=f"{str(error).splitlines()[1].strip()} (trained with {first.get('trainer_name')})",
                remedy="predict with nnUNetv2_predict where that trainer is installed",
            ) from error
        self.configuration_name = first["init_args"]["configuration"]
        mirroring = first.get("inference_allowed_mirroring_axes")
        with nnunet_quiet():
            self.manual_initialization(
                network.to(self.device).eval(), manager, settings, weights, dataset_json, "nnUNetTrainer", mirroring
            )

    def weights_hash(self) -> str:
        """SHA-256 (hex) over the weights of all folds: equal for equal models, wherever they lie."""
        digest = hashlib.sha256()
        for state in self.list_of_parameters:
            for names in distinct(state.items()):
                digest.update(state[names[0]].detach().cpu().contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()

    def logit_slabs(self, data: Tensor) -> Iterator[Tensor]:
        """(C, Z, Y, X) float32 -> logits (heads, planes, Y, X) float32 on the CPU, mean over the folds, slab by slab along Z.

        A slab comes as soon as no window reaches it any more; the logits in memory are those of one window's depth.
        """
        self.network.to(self.device).eval()
        if self._compiled and (self._run is None or self._run._orig_mod is not self.network):
            self._run = torch.compile(self.network)
        self._fold = None
        patch = tuple(self.configuration_manager.patch_size)
        data, inside = padded(data, patch)
        # Small windows, as those of one slice, go through the network several at once, beside their mirrored copies.
        copies = len(self._flips(len(patch))) * int(np.prod(patch))
        slabs = logits_in_slabs(
            data.to(self.device),
            Windows(data.shape[1:], patch, self.tile_step_size),
            self._answer,
            heads=self.label_manager.num_segmentation_heads,
            folds=len(self.list_of_parameters),
            together=max(1, _VOXELS_PER_FORWARD[self.device.type] // copies),
            device=self.device,
        )
        start = 0
        for slab in slabs:
            left, right = (min(max(end - start, 0), slab.shape[1]) for end in (inside[0].start, inside[0].stop))
            start += slab.shape[1]
            if left < right:
                yield slab[:, left:right, inside[1], inside[2]]

    @torch.inference_mode()
    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """(C, Z, Y, X) float32 -> logits (heads, Z, Y, X) float32 on the CPU, the mean over the folds."""
        return torch.cat(list(self.logit_slabs(data)), dim=1)

    def predict_mask(
        self, data: Tensor, properties: dict, *, probabilities: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Mask (z, y, x) on the grid of the scan the case was preprocessed from, and probabilities if asked for.

        Args:
            data: (C, Z, Y, X) float32, as `planners.preprocessed_case.preprocess_case` gives it.
            properties: what it gives beside.
        """
        export = self.export(data.shape[1:], properties, probabilities=probabilities)
        for slab in self.logit_slabs(data):
            export.add(slab)
        return export.result()

    def export(self, shape: Sequence[int], properties: dict, *, probabilities: bool = False) -> Export:
        """Takes the slabs of logits of a case whose image has `shape` (z, y, x), and gives its mask on the grid of the scan."""
        return export_of_case(
            shape,
            properties,
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            probabilities=probabilities,
        )

    def mask_from_logits(
        self, logits: Tensor, properties: dict, *, probabilities: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Mask and probabilities on the grid of the scan from logits on the grid of the plan."""
        case = self.export(logits.shape[1:], properties, probabilities=probabilities)
        case.add(logits)
        return case.result()

    def _answer(self, fold: int, images: Tensor) -> Tensor:
        if len(self.list_of_parameters) > 1 and fold != self._fold:
            self.network.load_state_dict(self.list_of_parameters[fold])
            self._fold = fold
        return self._internal_maybe_mirror_and_predict(images.to(self.device))

    def _flips(self, dimensions: int) -> list[tuple[int, ...]]:
        """Axes of (N, C, *patch) that are mirrored together, for each copy of a window."""
        axes = [a + 2 for a in (self.allowed_mirroring_axes or ()) if a < dimensions] if self.use_mirroring else []
        return [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]

    @torch.inference_mode()
    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        """(N, C, *patch) -> mean logits (N, heads, *patch) float32 over all mirrored copies."""
        flips = self._flips(x.ndim - 2)
        together = max(1, min(len(flips), _VOXELS_PER_FORWARD[self.device.type] // x[0, 0].numel()))
        total: Tensor | None = None
        for start in range(0, len(flips), together):
            chunk = flips[start : start + together]
            outputs = self._forward(torch.cat([torch.flip(x, flip) for flip in chunk]))
            for output, flip in zip(outputs.split(len(x)), chunk, strict=True):
                logits = (torch.flip(output, flip) if flip else output).float()
                total = logits if total is None else total.add_(logits)
        if total is None:
            raise RuntimeError("no flip at all")
        return total.div_(len(flips)) if len(flips) > 1 else total

    def _forward(self, x: Tensor) -> Tensor:
        """The network on a batch, in halves where the device's memory does not hold it."""
        try:
            with self._lower_precision():
                return (self.network if self._run is None else self._run)(x)
        except torch.cuda.OutOfMemoryError:
            if len(x) == 1:
                raise
            torch.cuda.empty_cache()
        half = len(x) // 2
        return torch.cat([self._forward(x[:half]), self._forward(x[half:])])

    def _lower_precision(self) -> contextlib.AbstractContextManager:
        if self._reduced:
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext()


def _refuse_impossible(device: torch.device, precision: str, compiled: bool) -> None:
    if precision not in ("float32", "bfloat16"):
        raise SettingsError("No such precision", found=precision, expected="float32 or bfloat16")
    if precision == "bfloat16" and not (device.type == "cpu" and cpu_has_bfloat16()):
        raise SettingsError(
            "bfloat16 is for CPUs with instructions for it (AVX512-BF16 or AMX); a GPU uses half precision anyway",
            found=f"device {device}" if device.type != "cpu" else "a CPU without them, where it would be slower",
            remedy="leave --precision out",
        )
    if compiled and device.type == "cpu" and not has_compiler():
        raise SettingsError(
            "Compiling the network needs a C++ compiler", found="none", remedy="install g++, or leave --compile out"
        )
