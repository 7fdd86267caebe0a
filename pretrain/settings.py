"""Settings of a method or of training: typed values from what stands on the command line, and their description."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from planners.errors import SettingsError

T = TypeVar("T")
ANY_CASE = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
"""For a field whose values are names: they may be typed in capitals."""


def configure(config: type[T], prefix: str, *layers: Mapping[str, Any]) -> T:
    """A `config` from its defaults and `layers`, later ones winning. Texts are read as the field's type (`1,3,3`, `none`).

    `prefix` is what stands before the settings' names on the command line (`voco` for `voco.grid`).
    Raises SettingsError listing every unknown name and unusable value.
    """
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    given = {name: value for layer in layers for name, value in layer.items()}
    problems = [f"{prefix}.{name}: no such setting" for name in given if name not in names]
    known = {name: _from_text(value) for name, value in given.items() if name in names}
    try:
        configured = TypeAdapter(config).validate_python(known)
    except ValidationError as error:
        problems += [
            f"{prefix}.{e['loc'][0] if e['loc'] else '?'}: {e['msg']}, not {e['input']!r}" for e in error.errors()
        ]
    if problems:
        raise SettingsError(
            "These settings cannot be used",
            found="\n            ".join(problems),
            expected=", ".join(f"{prefix}.{name}" for name in names),
            remedy="--show-config lists them" if prefix == "train" else f"autoseg methods {prefix} explains them",
        )
    return configured


def describe(config: type) -> dict[str, str]:
    """Name of each field of a settings dataclass, those of its bases first → the docstring that follows it in the source."""
    texts = {}
    for part in reversed([part for part in config.__mro__ if dataclasses.is_dataclass(part)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body  # type: ignore[attr-defined]
        for definition, following in itertools.pairwise(body):
            if (
                isinstance(definition, ast.AnnAssign)
                and isinstance(definition.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                texts[definition.target.id] = " ".join(str(following.value.value).split())
    return texts


def _from_text(value: Any) -> Any:
    """`none` and lists with commas; the rest of the conversion is the type's."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    return [part.strip() for part in value.split(",")] if "," in value else value
