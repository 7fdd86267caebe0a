"""Bring weights and a plan together: which data, which network, and what becomes of every tensor. Nothing is written.

Own encoders of the same plan need none of this. For others each side gives way where that loses less: the data by
`pretrain.fit_data`; the network stays the plan's if the weights fill nearly all of its encoder, else the plan gets one more
configuration with the network of the weights, on the same data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planners.configurations import configuration_like, derivable, with_configuration
from planners.dataset import Dataset
from planners.decisions import Decision
from planners.errors import PlanError, PretrainedMismatch
from planners.fingerprint import fingerprint
from planners.intensity import parse_scheme
from planners.planner import Overrides, differs_from_file, draft_plans
from planners.plans import CPU_SUFFIX, FULL_PLAN, load_plan, resolved
from planners.sac import NETWORK as PUMIT
from planners.sac import SIZES
from planners.vit import NETWORK as MEDDINOV3
from planners.vit import SIZES as VIT_SIZES
from planners.vit import arguments_of_size as vit_of_size
from pretrain.encoders import build_segmentation_network, encoder_of
from pretrain.fit_data import fit_data
from pretrain.importers.weights import Weights
from pretrain.transfer import TransferReport, transfer

IMPORTED_SHARE = 0.95
"""Share of an encoder that foreign weights must fill; autoseg's own must fill all of it."""

_COLOURS = parse_scheme("rgb").normalization
# Arguments that change what a network computes but the shape of none of its tensors, or only add some.
_UNSEEN = ("num_heads", "eps", "qkv_bias")


@dataclass(frozen=True)
class Fit:
    """A plan and configuration for some weights."""

    plan: dict
    configuration: str
    report: TransferReport
    """What the transfer into a network of that configuration did; training repeats it."""
    decisions: tuple[Decision, ...]
    """Data and network: value, because, how to change it."""
    unwritten: tuple[dict, ...]
    """Plans that are not on disk yet as they are here."""

    @property
    def plan_name(self) -> str:
        return self.plan["plans_name"]


def fit(
    dataset: Dataset,
    weights: Weights,
    *,
    plan_name: str,
    configuration: str | None = None,
    keep_data: bool = False,
    minimum_share: float = IMPORTED_SHARE,
) -> Fit:
    """Find the plan, configuration and transfer for `weights`.

    Args:
        plan_name: the plan to start from.
        configuration: the one the user insists on; its network is then taken as it is.
        keep_data: keep the plan's spacing and intensities (the user named the plan).
        minimum_share: of the encoder that must be filled.

    Raises PretrainedMismatch with the table of tensors when no network of the plan can take the weights.
    """
    plan = load_plan(dataset.name, plan_name)
    base = _base_configuration(plan, weights)
    decisions: tuple[Decision, ...] = ()
    drafts: tuple[dict, ...] = ()
    if not keep_data and plan_name.startswith(FULL_PLAN) and weights.spatial_dims == 3 and base == "3d_fullres":
        data = fit_data(plan, resolved(plan, base), fingerprint(dataset), weights)
        decisions = data.decisions
        if not data.keeps_the_plan:
            drafts = _draft(dataset, plan, base, weights, data)
            plan = next(draft for draft in drafts if draft["plans_name"].endswith(CPU_SUFFIX) == _is_small(plan))
    if configuration is None:
        configuration, plan, report, about = _choose_network(plan, base, dataset, weights, minimum_share)
        decisions += (about,)
    else:
        if configuration not in plan["configurations"] and derivable(configuration):
            plan = with_configuration(plan, configuration)
        report = try_transfer(plan, configuration, dataset.json, weights, minimum_share)
        because = "asked for with -c"
        if other := differences(plan, configuration, weights):
            because += f"; {other}"
        decisions += (Decision("network", configuration, because, "leave -c out"),)
    wanted = [plan if draft["plans_name"] == plan["plans_name"] else draft for draft in drafts] or [plan]
    return Fit(plan, configuration, report, decisions, tuple(p for p in wanted if differs_from_file(p)))


def _base_configuration(plan: Mapping[str, Any], weights: Weights) -> str:
    """The plan's main configuration of the weights' dimensions, else of the other."""
    order = ("3d_fullres", "2d") if weights.spatial_dims == 3 else ("2d", "3d_fullres")
    found = next((name for name in order if name in plan["configurations"]), None)
    if found is None:
        raise PlanError(
            "The plan has no configuration that weights could be fitted to",
            found=", ".join(plan["configurations"]),
            expected="3d_fullres or 2d",
            remedy="name one with -c",
        )
    return found


def _draft(dataset: Dataset, plan: Mapping, base: str, weights: Weights, data: Any) -> tuple[dict, ...]:
    """Both plans of a new tag, on the data as the weights know them, nothing written."""
    planned = data.spacing or tuple(resolved(dict(plan), base)["spacing"])
    spacing = [0.0, 0.0, 0.0]
    for axis, value in zip(plan["transpose_forward"], planned, strict=True):
        spacing[axis] = float(value)
    overrides = Overrides(
        spacing=(spacing[0], spacing[1], spacing[2]),
        gpu_memory_gb=plan["autoseg"]["gpu_memory_gb"],
        intensity=data.intensity,
        origin=f"as {weights.name} was trained" if data.spacing else f"as in {plan['plans_name']}",
    )
    return draft_plans(dataset, fingerprint(dataset), overrides, tag=_tag(weights))


def _choose_network(
    plan: dict, base: str, dataset: Dataset, weights: Weights, minimum_share: float
) -> tuple[str, dict, TransferReport, Decision]:
    """The plan's own network where the weights fill it, else theirs as one more configuration."""
    own = resolved(plan, base)["architecture"]
    kind = own["network_class_name"].rpartition(".")[2]
    theirs = weights.architecture["network_class_name"].rpartition(".")[2]
    reason = f"the plan's {kind} has no place for weights of a {theirs}"
    if kind == theirs:
        try:
            report = try_transfer(plan, base, dataset.json, weights, minimum_share)
            because = f"the plan's own; the weights fill {report.encoder_share:.0%} of its encoder"
            return base, plan, report, Decision("network", f"{kind} of {base}", because, "-c CONFIGURATION")
        except PretrainedMismatch:
            share = try_transfer(plan, base, dataset.json, weights, 0.0).encoder_share
            reason = f"the weights fill only {share:.0%} of the encoder of {base}"
    name, plan = _add_network(plan, base, weights)
    report = try_transfer(plan, name, dataset.json, weights, minimum_share)
    because = f"the weights' own, on the plan's data, because {reason}"
    return name, plan, report, Decision("network", f"{theirs} as {name}", because, f"-c {base} for the plan's")


def _add_network(plan: dict, base: str, weights: Weights) -> tuple[str, dict]:
    """The plan with a configuration that has the weights' network, and its name."""
    arguments = weights.architecture["arch_kwargs"]
    if weights.architecture["network_class_name"] == "pretrain.networks.SwinUNETR":
        name = f"3d_fullres_swin{'' if arguments['use_v2'] else '1'}_{arguments['feature_size']}"
        candidate = with_configuration(plan, name)
        built = resolved(candidate, name)["architecture"]["arch_kwargs"]
        if all(built[key] == arguments[key] for key in ("depths", "num_heads", "window_size") if key in arguments):
            return name, candidate
    if weights.architecture["network_class_name"] == PUMIT:
        for size, transformer in SIZES.items():
            if transformer.items() <= arguments.items():
                name = f"3d_fullres_sac_{size}"
                return name, with_configuration(plan, name)
    if weights.architecture["network_class_name"] == MEDDINOV3:
        for size in VIT_SIZES:
            if vit_of_size(plan, size) == arguments:
                name = f"2d_vit_{size}"
                return name, with_configuration(plan, name)
    content = configuration_like(plan, weights.architecture, patch_size=weights.patch_size)
    name = f"{base}_{re.sub(r'[^a-z0-9.]+', '-', weights.name.lower()).strip('-.')}"
    there = plan["configurations"].get(name)
    if there is not None and there != content:
        name = f"{name}-{weights.sha256[:6]}"
    return name, with_configuration(plan, name, content)


def try_transfer(
    plan: dict, configuration: str, dataset_json: dict, weights: Weights, minimum_share: float
) -> TransferReport:
    """What becomes of every tensor, in a network that is thrown away afterwards."""
    network = build_segmentation_network(plan, configuration, dataset_json, initialise=False)
    return transfer_weights(weights, network, minimum_share, resolved(plan, configuration)["normalization_schemes"])


def differences(plan: dict, configuration: str, weights: Weights) -> str:
    """How the network of a configuration computes otherwise than that of the weights although tensors fit; empty if not so."""
    own, theirs = resolved(plan, configuration)["architecture"], weights.architecture
    if own["network_class_name"] != theirs["network_class_name"]:
        return ""
    texts = [
        f"{name} {own['arch_kwargs'].get(name)}, of the weights {theirs['arch_kwargs'].get(name)}"
        for name in _UNSEEN
        if own["arch_kwargs"].get(name) != theirs["arch_kwargs"].get(name)
    ]
    return f"it computes otherwise than the network of the weights: {'; '.join(texts)}" if texts else ""


def transfer_weights(
    weights: Weights, network: Any, minimum_share: float, normalizations: Sequence[str] = ()
) -> TransferReport:
    """Move `weights` into a segmentation network of autoseg, in place.

    Args:
        normalizations: nnU-Net's class for each channel of the plan; says whether the channels are colours.
    """
    target = network if weights.scope == "encoder+decoder" else encoder_of(network)
    try:
        return transfer(
            weights.tensors,
            target,
            minimum_share=minimum_share,
            position_grids=weights.position_grids,
            part=weights.part,
            mix_channels=weights.colours and set(normalizations) != {_COLOURS},
        )
    except PretrainedMismatch as error:
        raise PretrainedMismatch(f"{weights.name} ({weights.kind}): {error}") from error


def _tag(weights: Weights) -> str:
    """Usable as `--plan-name`."""
    return re.sub(r"_?cpu$", "", re.sub(r"[^A-Za-z0-9.-]+", "-", weights.name)).strip("-.") or "weights"


def _is_small(plan: Mapping[str, Any]) -> bool:
    return plan["plans_name"].endswith(CPU_SUFFIX)
