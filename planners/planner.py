"""The planner: nnU-Net's ResEnc rules for spacing, patch, batch and topology, with DA, intensities from the voxels, an own
data identifier, and two plans on one set of preprocessed data (DESIGN: full and cpu).

Extension points: nnU-Net calls small hooks from one long procedure (MIC-DKFZ/nnUNet:nnunetv2/experiment_planning/
experiment_planners/resencUNet_planner.py); only hooks are overridden here, and the dictionary is completed in `save_plans`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.resencUNet_planner import ResEncUNetPlanner
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from planners.anisotropy import anisotropy_facts, degree_of_anisotropy
from planners.budget import CPU, DEFAULT_GPU_MEMORY_GB, FULL, MIN_EDGE, Budget, feature_map_elements
from planners.configurations import carried_over
from planners.dataset import Dataset
from planners.decisions import explain
from planners.errors import PlanError
from planners.files import content_hash, write_json
from planners.intensity import IntensityScheme, infer_scheme
from planners.plans import CPU_SUFFIX, FULL_PLAN, load_plan, plan_hash, plan_path, trained_from
from planners.quiet import nnunet_quiet


@dataclass(frozen=True)
class Overrides:
    """What the user decides instead of the rules; None leaves it to the rule."""

    spacing: tuple[float, float, float] | None = None
    """Target spacing in mm, (z, y, x) as the image files are read."""
    patch_size: tuple[int, ...] | None = None
    """Patch of 3d_fullres (three numbers) or 2d (two), axes as in the plan."""
    gpu_memory_gb: float = DEFAULT_GPU_MEMORY_GB
    """Memory the full plan may use while training."""
    intensity: tuple[IntensityScheme, ...] | None = None
    """One scheme a channel."""
    origin: str | None = None
    """Why this spacing, where it was not asked for on the command line."""


@dataclass(frozen=True)
class PlannedPair:
    """The two plans of a dataset, and the names of those that were not there before."""

    full: dict
    cpu: dict
    written: list[str]


def plan_dataset(
    dataset: Dataset, fingerprint: Mapping, overrides: Overrides | None = None, *, tag: str | None = None
) -> PlannedPair:
    """Make and write both plans of `dataset`.

    A plan something was trained from is immutable: planning the same again leaves the file as it is, planning differently
    raises PlanError asking for another `tag` (`--plan-name`). Configurations that were added later stay in a plan, see
    `planners.configurations.carried_over`.
    """
    full, cpu = draft_plans(dataset, fingerprint, overrides or Overrides(), tag=tag)
    changed = [plan for plan in (full, cpu) if differs_from_file(plan)]
    for plan in changed:
        write_json(plan_path(dataset.name, plan["plans_name"]), plan)
    return PlannedPair(full, cpu, [plan["plans_name"] for plan in changed])


def draft_plans(
    dataset: Dataset, fingerprint: Mapping, overrides: Overrides, *, tag: str | None = None
) -> tuple[dict, dict]:
    """The full and the cpu plan that `plan_dataset` would write. Nothing is written."""
    name = FULL_PLAN if tag is None else f"{FULL_PLAN}_{checked_tag(tag)}"
    with nnunet_quiet():
        planner = AutosegPlanner(dataset, fingerprint, overrides, name)
        plans = planner.plan(FULL, name), planner.plan(CPU, name + CPU_SUFFIX)
    for plan in plans:
        if plan_path(dataset.name, plan["plans_name"]).is_file():
            plan["configurations"].update(carried_over(load_plan(dataset.name, plan["plans_name"]), plan))
    return plans


def checked_tag(tag: str) -> str:
    """A `--plan-name`: letters, digits, dots, single underscores; nnU-Net splits folder names on `__`."""
    if not tag or "__" in tag or not all(c.isalnum() or c in "._-" for c in tag) or tag.endswith("cpu"):
        raise PlanError(
            "Not usable as a plan name",
            found=tag,
            expected="letters, digits, '.', '-' and single '_'; not ending in 'cpu'",
        )
    return tag


class AutosegPlanner(ResEncUNetPlanner):
    """nnU-Net's ResEnc planner with the hooks of autoseg.

    Use `plan_dataset`; the class is named in plans as `experiment_planner_used`.
    """

    def __init__(self, dataset: Dataset, fingerprint: Mapping, overrides: Overrides, plan_name: str) -> None:
        super().__init__(
            dataset.name,
            gpu_memory_target_in_gb=overrides.gpu_memory_gb,
            plans_name=plan_name,
            overwrite_target_spacing=[float(s) for s in overrides.spacing] if overrides.spacing else None,
        )
        self.dataset_fingerprint = copy.deepcopy(dict(fingerprint))
        self.overrides = overrides
        self.channel_names = dataset.channel_names
        self.label_names = tuple(dataset.labels)
        self.budget = FULL
        self.schemes = self._choose_schemes()

    def plan(self, budget: Budget, plan_name: str) -> dict:
        """One complete plan under a budget; nothing is written."""
        planner = copy.copy(self)
        planner.budget = budget
        planner.plans_identifier = plan_name
        planner.UNet_base_num_features = budget.base_features
        planner.UNet_blocks_per_stage_encoder = budget.blocks_encoder
        if budget.max_voxels_3d is not None and budget.max_voxels_2d is not None:
            # `static_estimate_VRAM_usage` then counts patch voxels, so nnU-Net's own loop shrinks the patch to the limit.
            planner.UNet_reference_val_3d = budget.max_voxels_3d
            planner.UNet_reference_val_2d = budget.max_voxels_2d
            planner.UNet_vram_target_GB = planner.UNet_reference_val_corresp_GB
            planner.lowres_creation_threshold = 0
            planner.static_estimate_VRAM_usage = _patch_voxels  # type: ignore[assignment, method-assign]
        return planner.plan_experiment()

    # Hooks that nnU-Net's procedure calls --------------------------------------------------------------------------------

    @staticmethod
    def static_estimate_VRAM_usage(  # noqa: N802
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: Sequence[str],
    ) -> int:
        """Unlike nnU-Net's version this does not set torch's thread count (which crashes when nnUNet_n_proc_DA is 0)."""
        return feature_map_elements(
            patch_size, input_channels, output_channels, arch_class_name, arch_kwargs, arch_kwargs_req_import
        )

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        """One stock class name and mask flag a channel, from the schemes."""
        return [s.normalization for s in self.schemes], [s.uses_mask for s in self.schemes]

    def generate_data_identifier(self, configuration_name: str) -> str:
        """`autoseg_<hash of spacing, intensities, resampling and axes>_<configuration>`.

        Both plans of a dataset get the same; stock nnU-Net's data never do (its preprocessor deletes the folder it writes).
        """
        content = {
            "spacing": [round(float(s), 6) for s in self._target_spacing(configuration_name)],
            "intensity": [
                [scheme.normalization, scheme.uses_mask, scheme.stock_properties(self._measured(channel))]
                for channel, scheme in enumerate(self.schemes)
            ],
            "resampling": [str(part) for part in self._resampling_names()],
            "transpose": [int(axis) for axis in self.determine_transpose()[0]],
        }
        return f"autoseg_{content_hash(content)[:8]}_{configuration_name}"

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict,
    ) -> dict:
        """nnU-Net's plan of one configuration, with the budget's limits and the user's patch."""
        plan = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        wanted = self._wanted_patch(len(spacing), data_identifier)
        if wanted is not None:
            self._set_topology(plan, spacing, wanted)
        arch = plan["architecture"]["arch_kwargs"]
        stages = min(arch["n_stages"], self.budget.max_stages)
        for key in ("features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage"):
            arch[key] = arch[key][:stages]
        arch["n_conv_per_stage_decoder"] = arch["n_conv_per_stage_decoder"][: stages - 1]
        arch["n_stages"] = stages
        if self.budget.fixed_batch is not None:
            plan["batch_size"] = self.budget.fixed_batch
        return plan

    def save_plans(self, plans: dict) -> None:
        """Complete the plan instead of writing it: JSON types, windows in stock numbers, the key `autoseg`."""
        recursive_fix_for_json_export(plans)
        plans.update(json.loads(json.dumps(plans)))  # tuples become lists, as they will be read back
        plans["foreground_intensity_properties_per_channel"] = {
            str(channel): scheme.stock_properties(self._measured(channel))
            for channel, scheme in enumerate(self.schemes)
        }
        plans["autoseg"] = {
            "schema": 1,
            "budget": "cpu" if self.budget is CPU else "full",
            "gpu_memory_gb": self.overrides.gpu_memory_gb,
            "labels": len(self.label_names),
            "intensity": [
                {"channel": name, **scheme.to_json()}
                for name, scheme in zip(self.channel_names, self.schemes, strict=True)
            ],
            "DA_cases": self._degrees_of_cases(plans["transpose_forward"]),
        }
        for configuration in plans["configurations"].values():
            if "spacing" in configuration:  # the cascade inherits its parent's `autoseg` key with everything else
                configuration["autoseg"] = _anisotropy_of(configuration)
                rows = explain(
                    configuration,
                    plans,
                    self.dataset_fingerprint,
                    asked={
                        "spacing": self.overrides.spacing and (self.overrides.origin or "asked for with --spacing"),
                        "patch_size": self.overrides.patch_size,
                    },
                    gpu_memory_gb=self.overrides.gpu_memory_gb,
                    small=self.budget is CPU,
                )
                configuration["autoseg"]["decisions"] = [row.to_json() for row in rows]

    # Rules of autoseg ------------------------------------------------------------------------------------------------------

    def _choose_schemes(self) -> tuple[IntensityScheme, ...]:
        hints = self.dataset_fingerprint["autoseg"]["channels"]
        if self.overrides.intensity is not None:
            if len(self.overrides.intensity) != len(hints):
                raise PlanError(
                    "One intensity scheme a channel is needed",
                    found=len(self.overrides.intensity),
                    expected=f"{len(hints)} ({', '.join(self.channel_names)})",
                    remedy="separate them by spaces: --intensity 'ct-abdomen zscore'",
                )
            return self.overrides.intensity
        masked = self.dataset_fingerprint["median_relative_size_after_cropping"] < 0.75  # nnU-Net's rule
        return tuple(
            infer_scheme(name, hint, self.label_names, masked)
            for name, hint in zip(self.channel_names, hints, strict=True)
        )

    def _measured(self, channel: int) -> dict:
        return self.dataset_fingerprint["foreground_intensity_properties_per_channel"][str(channel)]

    def _target_spacing(self, configuration_name: str) -> np.ndarray:
        spacing = self.determine_fullres_target_spacing()[self.determine_transpose()[0]]
        return spacing[1:] if configuration_name.startswith("2d") else spacing

    def _resampling_names(self) -> list[Any]:
        data, data_kwargs, seg, seg_kwargs = self.determine_resampling()
        return [data.__name__, sorted(data_kwargs.items()), seg.__name__, sorted(seg_kwargs.items())]

    def _wanted_patch(self, dimensions: int, data_identifier: str) -> tuple[int, ...] | None:
        wanted = self.overrides.patch_size
        if wanted is None or len(wanted) != dimensions or data_identifier.endswith("lowres"):
            return None
        limit = self.budget.max_voxels_3d if dimensions == 3 else self.budget.max_voxels_2d
        return None if limit is not None and math.prod(wanted) > limit else wanted

    def _set_topology(self, plan: dict, spacing: Any, patch_size: tuple[int, ...]) -> None:
        """Give `plan` the user's patch and the strides and kernels that nnU-Net's rule derives from it."""
        if min(patch_size) < 1:
            raise PlanError("A patch needs positive sizes", found=patch_size)
        _, strides, kernels, divisible, factors = get_pool_and_conv_props(spacing, patch_size, MIN_EDGE, 999999)
        if tuple(int(n) for n in divisible) != tuple(patch_size):
            lower = tuple(int(n // f * f) for n, f in zip(patch_size, factors, strict=True))
            raise PlanError(
                "The patch does not fit the strides its size leads to",
                found=f"{patch_size}, strides {tuple(int(f) for f in factors)}",
                expected="multiples of the strides",
                remedy=f"--patch-size {','.join(str(int(n)) for n in divisible)} or {','.join(map(str, lower))}",
            )
        stages = len(strides)
        widest = self.UNet_max_features_2d if len(spacing) == 2 else self.UNet_max_features_3d
        plan["patch_size"] = list(patch_size)
        plan["architecture"]["arch_kwargs"].update(
            n_stages=stages,
            strides=strides,
            kernel_sizes=kernels,
            features_per_stage=[min(widest, self.UNet_base_num_features * 2**i) for i in range(stages)],
            n_blocks_per_stage=(*self.UNet_blocks_per_stage_encoder, *[6] * stages)[:stages],
            n_conv_per_stage_decoder=[1] * (stages - 1),
        )

    def _degrees_of_cases(self, transpose_forward: Sequence[int]) -> dict[str, float]:
        degrees = [
            degree_of_anisotropy([spacing[axis] for axis in transpose_forward])
            for spacing in self.dataset_fingerprint["spacings"]
        ]
        return {"min": min(degrees), "median": float(np.median(degrees)), "max": max(degrees)}


def _patch_voxels(patch_size: Sequence[int], *_: Any) -> int:
    return int(np.prod(patch_size))


def _anisotropy_of(configuration: dict) -> dict:
    strides = configuration["architecture"]["arch_kwargs"]["strides"]
    return anisotropy_facts(configuration["spacing"], configuration["patch_size"], strides)


def differs_from_file(plan: dict) -> bool:
    """Whether `plan` is not what its file holds; PlanError when it is not and something was trained from the file's."""
    dataset_name = plan["dataset_name"]
    if not plan_path(dataset_name, plan["plans_name"]).is_file():
        return True
    old = load_plan(dataset_name, plan["plans_name"])
    if old == plan:
        return False
    changed = [
        name
        for name in old["configurations"]
        if name not in plan["configurations"] or plan_hash(old, name) != plan_hash(plan, name)
    ]
    used = [folder for name in changed for folder in trained_from(dataset_name, plan["plans_name"], name)]
    if used:
        raise PlanError(
            f"Plan {plan['plans_name']} would change, and something was trained from it",
            where=", ".join(map(str, used[:3])),
            found=f"changes in {', '.join(changed)}",
            remedy="give the new plan a name of its own with --plan-name TAG",
        )
    return True
