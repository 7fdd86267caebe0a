"""Names of runs: what the user may call one, so that it can be part of a folder's name that nnU-Net splits at `__`."""

from __future__ import annotations

import re

from planners.errors import SettingsError

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


def check_run_name(run: str) -> str:
    """`run` itself; SettingsError when it cannot be a name."""
    if _RUN.fullmatch(run) is None:
        raise SettingsError(
            "Not a name for a run",
            found=run,
            expected="letters, digits, '.' and '-', beginning with a letter or digit",
            remedy="choose another with --run",
        )
    return run
