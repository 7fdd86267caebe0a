"""Settings of a method: typed values from what stands on the command line, and their description from the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from planners.errors import SettingsError

T = TypeVar("T")


def configure(config: type[T], method: str, *layers: Mapping[str, Any]) -> T:
    """A `config` from its defaults and `layers`, later ones winning. Texts are read as the field's type (`1,3,3`, `none`).

    Raises SettingsError listing every unknown name and unusable value.
    """
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    given = {name: value for layer in layers for name, value in layer.items()}
    unknown = [f"{method}.{name}" for name in given if name not in names]
    if unknown:
        raise SettingsError(
            f"{method} has no such setting",
            found=", ".join(unknown),
            expected=", ".join(f"{method}.{name}" for name in names),
            remedy=f"autoseg methods {method} explains them",
        )
    try:
        return TypeAdapter(config).validate_python({name: _from_text(value) for name, value in given.items()})
    except ValidationError as error:
        problems = [
            f"{method}.{e['loc'][0] if e['loc'] else '?'}: {e['msg']}, not {e['input']!r}" for e in error.errors()
        ]
        raise SettingsError(
            f"{method} cannot use these settings",
            found="\n            ".join(problems),
            remedy=f"autoseg methods {method} explains them",
        ) from error


def describe(config: type) -> dict[str, str]:
    """Name of each field of a settings dataclass → the docstring that follows it in the source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body  # type: ignore[attr-defined]
    texts = {}
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
