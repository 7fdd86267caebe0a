"""Configurations that are added to a plan after it was made: by rule from their name, or for somebody else's network.

They inherit the data of `3d_fullres` or `2d`; `2d_vit` has a spacing and data of its own. Adding one is no change of a plan
something was trained from.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planners.anisotropy import anisotropy_facts
from planners.decisions import Choice, explain_added
from planners.errors import PlanError
from planners.files import write_json
from planners.foreign import PCRL_UNET, PRIMUS, UNETS, choose_pcrl_unet, choose_primus, choose_unet
from planners.locks import waiting_lock
from planners.plans import load_plan, plan_path, preprocessing_hash, resolved
from planners.sac import NETWORK as PUMIT
from planners.sac import SIZES, arguments_of_size, choose_sac
from planners.swin import NETWORK as SWIN
from planners.swin import choose_swin, default_features
from planners.vit import NETWORK as MEDDINOV3
from planners.vit import SIZE_NAMES as VIT_SIZES
from planners.vit import arguments_of_size as vit_of_size
from planners.vit import choose_vit, own_data

logger = logging.getLogger("autoseg")


@dataclass(frozen=True)
class _Rule:
    """How a configuration follows from its name."""

    parent: str
    sizes: str
    """What may follow the name, in words."""
    is_size: Callable[[str], bool]
    choose: Callable[[dict, dict, str | None], Choice]
    """Plan, resolved parent, and what followed the name, if anything did."""


def _swin_rule(use_v2: bool) -> _Rule:
    def is_size(text: str) -> bool:
        return re.fullmatch("[1-9][0-9]{0,3}", text) is not None and int(text) % 12 == 0

    def choose(plan: dict, parent: dict, size: str | None) -> Choice:
        arguments = {
            "feature_size": int(size) if size else default_features(plan),
            "depths": [2, 2, 2, 2],
            "num_heads": [3, 6, 12, 24],
            "window_size": 7,
            "use_v2": use_v2,
        }
        return choose_swin(plan, parent, arguments)

    return _Rule("3d_fullres", "features, 12, 24, …", is_size, choose)


def _choose_sac(plan: dict, parent: dict, size: str | None) -> Choice:
    return choose_sac(plan, parent, arguments_of_size(plan, size))


def _choose_vit(plan: dict, parent: dict, size: str | None) -> Choice:
    return choose_vit(plan, parent, vit_of_size(plan, size))


_RULES = {
    "3d_fullres_swin": _swin_rule(use_v2=True),
    "3d_fullres_swin1": _swin_rule(use_v2=False),
    "3d_fullres_sac": _Rule("3d_fullres", ", ".join(SIZES), SIZES.__contains__, _choose_sac),
    "2d_vit": _Rule("2d", ", ".join(VIT_SIZES), VIT_SIZES.__contains__, _choose_vit),
}


def derivable(name: str) -> bool:
    """Whether a configuration of that name can be made from any plan with its parent."""
    return _parsed(name) is not None


def with_configuration(plan: Mapping, name: str, content: Mapping | None = None) -> dict:
    """A copy of `plan` that has the configuration `name`; without `content` it is derived from the name, if not there yet.

    Raises PlanError when it cannot be derived, or is there with other content.
    """
    added = copy.deepcopy(dict(plan))
    there = added["configurations"].get(name)
    if content is None:
        if there is None:
            added["configurations"][name] = _derived(added, name)
        return added
    content = json.loads(json.dumps(content))
    if there is not None and there != content:
        raise PlanError(
            f"Plan {plan['plans_name']} has another configuration {name}",
            remedy="give the new one another name, or use the one that is there",
        )
    added["configurations"][name] = content
    return added


def configuration_like(plan: Mapping, architecture: Mapping, *, patch_size: Sequence[int] | None = None) -> dict:
    """The content of a configuration with the network of `architecture` (a plan's entry) on the plan's data.

    SwinUNETR, PUMIT and MedDINOv3 get the patch of `3d_fullres_swin`, `3d_fullres_sac` and `2d_vit`, Primus multiples of its
    tokens, PCRL's U-Net multiples of 8, another U-Net the plan's strides and kernels.
    `architecture` must have been looked up in the table of networks. Raises PlanError for a network without a rule.

    Args:
        patch_size: what the weights were trained with, where that is known; the patch is not larger.
    """
    name = architecture["network_class_name"]
    last = name.rpartition(".")[2]
    flat = str(architecture["arch_kwargs"].get("conv_op")).endswith("2d")
    parent = next(
        (c for c in (("2d", "3d_fullres") if flat else ("3d_fullres", "2d")) if c in plan["configurations"]), ""
    )
    if name in (SWIN, PUMIT, PRIMUS, PCRL_UNET):
        parent = "3d_fullres"
    elif name == MEDDINOV3:
        parent = "2d"
    data = resolved(dict(plan), parent)
    if name == SWIN:
        arguments = {k: v for k, v in architecture["arch_kwargs"].items() if k != "use_checkpoint"}
        choice = choose_swin(plan, data, arguments, patch_size=patch_size)
    elif name == PUMIT:
        arguments = {k: v for k, v in architecture["arch_kwargs"].items() if k != "strides"}
        choice = choose_sac(plan, data, arguments, patch_size=patch_size)
    elif name == MEDDINOV3:
        arguments = {k: v for k, v in architecture["arch_kwargs"].items() if k != "use_checkpoint"}
        choice = choose_vit(plan, data, arguments)
    elif name == PRIMUS:
        choice = choose_primus(plan, data, architecture, patch_size=patch_size)
    elif name == PCRL_UNET:
        choice = choose_pcrl_unet(plan, data, architecture, patch_size=patch_size)
    elif last in UNETS:
        choice = choose_unet(plan, data, architecture, patch_size=patch_size)
    else:
        raise PlanError(
            "No rule for this network",
            found=name,
            expected=", ".join(("SwinUNETR", "PUMIT", "MedDINOv3", "Primus", "PCRLUNet", *UNETS)),
        )
    return _content(choice, parent, data)


def ensure_configuration(dataset_name: str, plan_name: str, name: str, *, write: bool = True) -> dict:
    """The plan, with the configuration `name` added to its file and said so if it was missing; PlanError if that is not
    possible. Without `write` the file is left as it is."""
    plan = load_plan(dataset_name, plan_name)
    if name in plan["configurations"]:
        return plan
    path = plan_path(dataset_name, plan_name)
    with waiting_lock(path.with_name(f".{path.name}.lock"), f"changing {plan_name}"):
        plan = load_plan(dataset_name, plan_name)
        if name not in plan["configurations"]:
            plan = with_configuration(plan, name)
            if write:
                write_json(path, plan)
                logger.info("Added the configuration %s to %s: %s", name, plan_name, _in_words(plan, name))
    return plan


def carried_over(old: Mapping, new: Mapping) -> dict[str, dict]:
    """The configurations that were added to `old`, for `new`, the same plan made again.

    Those that follow from their name are derived again; the others stay as they are where the data they were made for are
    the same, and are left out where not.
    """
    kept = {}
    for name, content in old["configurations"].items():
        if name in new["configurations"] or not ("inherits_from" in content and "autoseg" in content):
            continue
        parent = content["inherits_from"]
        try:
            if derivable(name):
                kept[name] = _derived(new, name)
            elif _same_data(old, new, parent):
                kept[name] = content
            else:
                logger.warning("The configuration %s is left out: the data of %s are others now", name, parent)
        except PlanError as error:
            logger.warning("The configuration %s is left out: %s", name, error.what)
    return kept


def _same_data(old: Mapping, new: Mapping, parent: str) -> bool:
    if parent not in new["configurations"]:
        return False
    before, after = (resolved(dict(plan), parent)["data_identifier"] for plan in (old, new))
    return before == after and preprocessing_hash(dict(old), parent) == preprocessing_hash(dict(new), parent)


def _parsed(name: str) -> tuple[_Rule, str | None] | None:
    """The rule of a name and the size after it."""
    if name in _RULES:
        return _RULES[name], None
    found = ((rule, name.removeprefix(f"{start}_")) for start, rule in _RULES.items() if name.startswith(f"{start}_"))
    return next(((rule, size) for rule, size in found if rule.is_size(size)), None)


def _derived(plan: Mapping, name: str) -> dict:
    parsed = _parsed(name)
    if parsed is None or parsed[0].parent not in plan["configurations"]:
        raise PlanError(
            f"Plan {plan['plans_name']} has no configuration {name}",
            found=", ".join(plan["configurations"]),
            expected="one of these, or where 3d_fullres or 2d is among them "
            + ", ".join(f"{n}[_SIZE] (SIZE: {rule.sizes})" for n, rule in _RULES.items()),
            remedy="choose one of these with -c",
        )
    rule, size = parsed
    data = resolved(dict(plan), rule.parent)
    return _content(rule.choose(dict(plan), data, size), rule.parent, data)


def _content(choice: Choice, parent: str, data: dict) -> dict[str, Any]:
    """A configuration as it stands in a plan; its `autoseg` key is whole, because it replaces the parent's."""
    content = {
        "inherits_from": parent,
        **(own_data(choice, data) if choice.spacing is not None else {}),
        "patch_size": choice.patch_size,
        "batch_size": choice.batch_size,
        "architecture": choice.architecture,
        "batch_dice": data["batch_dice"],
        "autoseg": {
            **anisotropy_facts(data["spacing"], choice.patch_size, choice.strides, alike=choice.alike),
            "decisions": [row.to_json() for row in explain_added(choice, data)],
        },
    }
    return json.loads(json.dumps(content))


def _in_words(plan: dict, name: str) -> str:
    rows = {row["name"]: row["value"] for row in plan["configurations"][name]["autoseg"]["decisions"]}
    return f"{rows['network']}; patch {rows['patch, voxels']}, batch {rows['batch']}"
