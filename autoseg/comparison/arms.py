"""The arms of a comparison: what stands after `--methods`, and what their runs are called."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from planners.errors import SettingsError
from planners.run_names import check_run_name
from pretrain.catalog import METHODS, entry, load_method
from trainers.runs import COMPARED, SCRATCH

_ARM = re.compile(r"(?P<method>[A-Za-z0-9_]+)(\[(?P<options>[^][]*)\])?(@(?P<configuration>[A-Za-z0-9_]+))?")
_EXPECTED = "names as in voco,rotation@2d,meddinov3[stages=1]@2d_vit"


@dataclass(frozen=True)
class Arm:
    """One way to begin a training: new weights, or an encoder that a method has learned."""

    method: str
    """`scratch` or a name of `pretrain.catalog.METHODS`."""
    configuration: str
    name: str
    """As people read it: `voco[region=full]@2d`, without the configuration where it is the usual one."""
    options: tuple[tuple[str, str], ...] = ()
    """`preset`, `steps` and `stages` as on the command line of `pretrain`; all others are settings of the method."""

    @property
    def is_scratch(self) -> bool:
        return self.method == SCRATCH

    @property
    def slug(self) -> str:
        """The name as a part of a folder's name: letters, digits and dots."""
        parts = [self.method, *(part for option in self.options for part in option)]
        return re.sub(r"[^A-Za-z0-9]+", ".", ".".join(parts)).strip(".")


def parse_arms(text: str, usual_configuration: str) -> list[Arm]:
    """The arms that `text` names, in its order, each once; scratch of every configuration among them is always there, before
    its first arm where it was not named, because it is what the others are compared with.

    Raises SettingsError for an unknown method, a text that cannot be read, and two arms that would share their folders.
    """
    arms: dict[str, Arm] = {}
    for part in _split(text):
        arm = _parse(part, usual_configuration)
        arms[arm.name] = arm
    all_arms: list[Arm] = []
    for arm in arms.values():
        if not any(one.is_scratch and one.configuration == arm.configuration for one in (*all_arms, *arms.values())):
            all_arms.append(_arm(SCRATCH, (), arm.configuration, usual_configuration))
        all_arms.append(arm)
    places: dict[tuple[str, str], str] = {}
    for arm in all_arms:
        other = places.setdefault((arm.slug.lower(), arm.configuration), arm.name)
        if other != arm.name:
            raise SettingsError("Two arms would lie in the same folders", found=f"{other} and {arm.name}")
    return all_arms


def scratch_of(arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The arm that `arm` is compared with: from new weights, in the same configuration."""
    return next(other for other in arms if other.is_scratch and other.configuration == arm.configuration)


def encoder_run(comparison: str | None, arm: Arm, fold: int) -> str:
    """Name of the run that pretrains an arm without the validation cases of a fold: `cmp-voco-x0`."""
    return check_run_name(f"{_prefix(comparison)}{arm.slug}-x{fold}")


def training_run(comparison: str | None, arm: Arm, fold: int, fraction: float, seed: int) -> str:
    """Name of the run that trains an arm: `cmp-voco-f10-s0-x0`. The fold is in it because each has an encoder of its own."""
    return check_run_name(f"{_prefix(comparison)}{arm.slug}-f{100 * fraction:.6g}-s{seed}-x{fold}")


def _prefix(comparison: str | None) -> str:
    return f"{COMPARED}{comparison}-" if comparison else COMPARED


def _split(text: str) -> list[str]:
    """At the commas that are not inside brackets."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    if not all(parts):
        raise SettingsError("--methods has an empty place", found=text, expected=_EXPECTED)
    return parts


def _parse(part: str, usual_configuration: str) -> Arm:
    match = _ARM.fullmatch(part)
    if match is None:
        raise SettingsError("Not a method of a comparison", found=part, expected=_EXPECTED)
    method, options = match["method"], _options(match["options"] or "", part)
    own: str | None = None
    if method == SCRATCH:
        if options:
            raise SettingsError("Training from new weights has no options here", found=part,
                                remedy="--set train.KEY=VALUE holds for all arms")  # fmt: skip
    elif method not in METHODS and (near := difflib.get_close_matches(method, [SCRATCH], n=1)):
        raise SettingsError(f"Unknown method '{method}'. Did you mean '{near[0]}'?", expected=_EXPECTED)
    else:
        entry(method)
        own = load_method(method).configuration(dict(options))
    return _arm(method, options, match["configuration"] or own or usual_configuration, usual_configuration)


def _arm(method: str, options: tuple[tuple[str, str], ...], configuration: str, usual_configuration: str) -> Arm:
    name = method + (f"[{','.join(f'{key}={value}' for key, value in options)}]" if options else "")
    name += f"@{configuration}" if configuration != usual_configuration else ""
    return Arm(method, configuration, name, options)


def _options(text: str, part: str) -> tuple[tuple[str, str], ...]:
    """`grid=1,3,3,steps=20` → (("grid", "1,3,3"), ("steps", "20")): what has no `=` goes on with the value before."""
    options: list[tuple[str, str]] = []
    for piece in text.split(",") if text else ():
        key, sign, value = piece.strip().partition("=")
        if sign and key and value:
            options.append((key, value))
        elif not sign and key and options:
            options[-1] = (options[-1][0], f"{options[-1][1]},{key}")
        else:
            raise SettingsError("Options of an arm are KEY=VALUE, with commas between", found=part, expected=_EXPECTED)
    if len(dict(options)) < len(options):
        raise SettingsError("An option is given twice", found=part)
    return tuple(options)
