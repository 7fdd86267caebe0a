"""Which values the label files hold, what they are called, and which they become in the dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.convert.label_sets import LABEL_SETS
from planners.cases import run_cases
from planners.errors import SettingsError
from planners.geometry import read_voxels


@dataclass(frozen=True)
class LabelPlan:
    """Structure → value in the dataset, and value in the files → value in the dataset (background apart)."""

    labels: dict[str, int]
    values: dict[int, int]

    @property
    def remap(self) -> dict[str, int]:
        """What dataset.json stores so that prediction can undo it; empty when values stay as they are."""
        changed = any(old != new for old, new in self.values.items())
        return {str(old): new for old, new in self.values.items()} if changed else {}


def read_label_values(files: Mapping[str, Path], largest_bytes: int) -> tuple[set[int], list[str]]:
    """All values in the label files (case → file), and a line for each file that is not a label map."""
    outcomes = run_cases(
        _values,
        {name: (path,) for name, path in files.items()},
        description="Reading labels",
        bytes_per_case=largest_bytes,
    )
    problems = [f"{files[name].name}: {_one_line(o.error)}" for name, o in outcomes.items() if o.error is not None]
    found: set[int] = set().union(*(outcome.value for outcome in outcomes.values() if outcome.error is None))
    return found, problems


def plan_labels(
    found: set[int], label_set: str | None = None, remap: Mapping[int, int] | None = None
) -> tuple[LabelPlan, list[str]]:
    """Names and values for the dataset.

    Args:
        found: values in the label files.
        label_set: a name in `LABEL_SETS`; without one, labels are named `label_N` by their values (after `remap`) and
            renumbered 1, 2, 3, …
        remap: value in the files → value wanted; 0 drops a structure.

    Returns the plan and a line for each contradiction.
    """
    if label_set is not None and label_set not in LABEL_SETS:
        raise SettingsError("Unknown label set", found=label_set, expected=", ".join(LABEL_SETS))
    remap = dict(remap or {})
    problems = [f"remap {old}:{new}: values cannot be below 0" for old, new in remap.items() if new < 0]
    problems += [f"no label file holds {old}, which the remap names" for old in sorted(remap.keys() - found)]
    kept = sorted(found - remap.keys() - {0})
    problems += [
        f"{value} would mean two structures: it is in the files and the remap makes another value {value}; "
        f"add {value}:N to the remap ({value}:{value} to merge them)"
        for value in kept
        if value in remap.values()
    ]
    problems += [f"label files hold {value}; values below 0 need a remap" for value in kept if value < 0]
    wanted = {value: remap.get(value, value) for value in sorted(found | remap.keys()) if value != 0}
    used = sorted({new for new in wanted.values() if new > 0})
    if not used:
        return LabelPlan({}, {}), [*problems, "no label file holds a value above 0"]
    if label_set is None:
        renumbered = {value: index for index, value in enumerate(used, start=1)} | {0: 0}
        labels = {f"label_{value}": renumbered[value] for value in used}
        values = {old: renumbered.get(new, 0) for old, new in wanted.items()}
    else:
        labels, values = dict(LABEL_SETS[label_set]), wanted
        unknown = [value for value in used if value not in labels.values()]
        if unknown:
            problems.append(
                f"label files hold {', '.join(map(str, unknown))}, which {label_set} does not have; "
                f"drop or rename with --remap {','.join(f'{value}:0' for value in unknown)}"
            )
    return LabelPlan({"background": 0, **labels}, values), problems


def _values(path: Path) -> set[int]:
    values: Sequence[float] = np.unique(read_voxels(path)[0]).tolist()
    broken = [value for value in values if not float(value).is_integer()]
    if broken:
        raise ValueError(f"values that are not whole numbers, such as {broken[0]:g}; labels need nearest neighbour")
    return {int(value) for value in values}


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__
