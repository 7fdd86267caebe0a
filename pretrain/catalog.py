"""The pretraining methods: a literal table that imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planners.errors import SettingsError

if TYPE_CHECKING:
    from pretrain.method import PretrainMethod


@dataclass(frozen=True)
class Entry:
    """Where a method lives and what it needs."""

    path: str
    """module:Class."""
    idea: str
    dims: tuple[int, ...]
    networks: tuple[str, ...]
    """Classes (last part of the plan's `network_class_name`) whose encoder it can pretrain."""
    paper: str


_UNETS = ("ResidualEncoderUNet", "PlainConvUNet", "ResidualUNet")
_ENCODERS = (*_UNETS, "SwinUNETR")
_TALEB = "arXiv:2006.03829"

METHODS: dict[str, Entry] = {
    "voco": Entry(
        "pretrain.methods.voco:VoCo", "where a crop lies in the volume", (2, 3), _ENCODERS, "arXiv:2402.17300"
    ),
    "cpc": Entry("pretrain.methods.cpc:CPC", "which tiles follow below", (2, 3), _ENCODERS, _TALEB),
    "rpl": Entry("pretrain.methods.rpl:RPL", "which neighbour of a tile another tile is", (2, 3), _ENCODERS, _TALEB),
    "jigsaw": Entry("pretrain.methods.jigsaw:Jigsaw", "in which order tiles were shuffled", (2, 3), _ENCODERS, _TALEB),
    "rotation": Entry("pretrain.methods.rotation:Rotation", "how a crop was turned", (2, 3), _ENCODERS, _TALEB),
    "exemplar": Entry(
        "pretrain.methods.exemplar:Exemplar",
        "which two crops are the same place, seen differently",
        (2, 3),
        _ENCODERS,
        _TALEB,
    ),
    "pcrl": Entry(
        "pretrain.methods.pcrl:PCRL", "restore a scan and tell it from others", (2, 3), _UNETS, "arXiv:2109.04379"
    ),
    "pumit": Entry(
        "pretrain.methods.pumit.method:PUMITPretraining",
        "which visual words stand where a scan is masked",
        (3,),
        ("PUMIT",),
        "arXiv:2312.07630",
    ),
    "meddinov3": Entry(
        "pretrain.methods.meddinov3.method:MedDINOv3Pretraining",
        "say of a part of a slice what its moving average says of the whole",
        (2,),
        ("MedDINOv3",),
        "arXiv:2509.02379",
    ),
}


def entry(name: str) -> Entry:
    """The table's line for a method; SettingsError with the nearest name when there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise SettingsError(
            f"Unknown method '{name}'." + (f" Did you mean '{near[0]}'?" if near else ""),
            expected=", ".join(METHODS),
            remedy="autoseg methods lists them",
        )
    return METHODS[name]


def load_method(name: str) -> type[PretrainMethod]:
    """The class of a method."""
    module, _, attribute = entry(name).path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def settings_table(name: str) -> list[tuple[str, str, str, str]]:
    """(setting, value in the default preset, value in the cpu preset, meaning) for every setting of a method."""
    import dataclasses

    from pretrain.settings import configure, describe

    method = load_method(name)
    texts = describe(method.Config)
    default, cpu = (dataclasses.asdict(configure(method.Config, name, method.presets[p])) for p in ("default", "cpu"))
    return [(f"{name}.{key}", _text(default[key]), _text(cpu[key]), texts[key]) for key in default]


def _text(value: object) -> str:
    """As it is typed after `--set`."""
    return (
        ",".join(map(str, value))
        if isinstance(value, tuple | list)
        else str(value).lower()
        if value is None
        else str(value)
    )
