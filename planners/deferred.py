"""nnU-Net's trainer and predictor, and Fabric, imported without the libraries that few of their functions use.

Most of the seconds before a training's first step, or a prediction's first scan, are imports: seaborn with scipy.stats and
pandas for a plot, scikit-learn for a split, scikit-image for the transforms of a cascade, torch's compiler for a check of type.
Modules that name them at their top get stand-ins, which import the real thing when it is used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

TRAINER, PREDICTOR = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer", "nnunetv2.inference.predict_from_raw_data"
FABRIC = "lightning_fabric"
_RARELY_USED = (
    "SimpleITK",
    "matplotlib",
    "matplotlib.pyplot",
    "nibabel",
    "nibabel.orientations",
    "pandas",
    "scipy.ndimage",
    "scipy.stats",
    "seaborn",
    "skimage",
    "skimage.data",
    "skimage.measure",
    "skimage.morphology",
    "skimage.morphology.binary",
    "skimage.transform",
    "sklearn",
    "sklearn.model_selection",
    "tifffile",
    "torch._dynamo",
)


_in_place: dict[str, ModuleType] = {}
"""Stand-ins by the name under which they can be imported just now."""


def import_quickly(*names: str) -> None:
    """Import modules of nnU-Net or Fabric; those that import them afterwards find them loaded."""
    with deferred(_RARELY_USED):
        for name in names:
            importlib.import_module(name)


@contextmanager
def deferred(names: tuple[str, ...]) -> Iterator[None]:
    """Modules imported within the block get stand-ins for the modules `names` that are not loaded yet.

    A package must be named with all of its modules that are imported. A stand-in can be called, asked for attributes and be
    what `isinstance` asks for; a class cannot be derived from one.
    """
    stand_ins = {name: _Module(name) for name in names if name not in sys.modules}
    _in_place.update(stand_ins)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        _take_out()
        _in_place.clear()


class _Module(ModuleType):
    """What is imported in place of a module; it has whatever it is asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # as packages have it, so that their modules, named too, can be imported

    def __getattr__(self, name: str) -> _Member:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Member(self.__name__, name)


class _Member:
    """What is imported from such a module, by its name."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *args: Any, **options: Any) -> Any:
        with _real_modules():
            return self._real()(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with _real_modules():
            return getattr(self._real(), name)

    def __instancecheck__(self, thing: Any) -> bool:
        # Nothing can be an instance of a class whose module was never loaded.
        loaded = sys.modules.get(self._module)
        return loaded is not None and not isinstance(loaded, _Module) and isinstance(thing, self._real())

    def _real(self) -> Any:
        module = importlib.import_module(self._module)
        if hasattr(module, self._name):
            return getattr(module, self._name)
        return importlib.import_module(f"{self._module}.{self._name}")


@contextmanager
def _real_modules() -> Iterator[None]:
    """Without stand-ins, should one be used while they are in place."""
    hidden = _take_out()
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.setdefault(name, _in_place[name])


def _take_out() -> list[str]:
    """Names of the stand-ins that could still be imported, and no more can."""
    found = [name for name, stand_in in _in_place.items() if sys.modules.get(name) is stand_in]
    for name in found:
        del sys.modules[name]
    return found
