"""The error hierarchy.

AutosegError
├── DatasetError        a dataset, a scan or a label file is not as it must be
├── PlanError           a plan cannot be made, or contradicts what was asked
├── PretrainedMismatch  weights do not fit the network they were meant for
├── UnsafeFile          a file asks for code to be run; nothing of it was
├── SettingsError       an option is unknown, out of range, or contradicts an existing run
└── CasesFailed         some cases failed, the others are finished (exit code 1)

Each message says what is wrong, where, what was found and expected, and what to do. The command line prints it without a
traceback and exits with `exit_code`.
"""

from __future__ import annotations


class AutosegError(Exception):
    """An error the user can mend. `exit_code` is what the command line returns."""

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        lines = [what]
        for label, value in (("where", where), ("found", found), ("expected", expected), ("to fix", remedy)):
            if value is not None:
                lines.append(f"  {label:<9} {value}")
        super().__init__("\n".join(lines))
        self.what = what

    def __reduce__(self) -> tuple:
        # The default would call __init__ with the formatted text only, which is what a message from a worker needs.
        return (_rebuild, (type(self), str(self), self.what))


def _rebuild(kind: type[AutosegError], text: str, what: str) -> AutosegError:
    error = kind(text)
    error.what = what
    return error


class DatasetError(AutosegError):
    """A dataset, a scan or a label file is not as it must be."""


class PlanError(AutosegError):
    """A plan cannot be made, or contradicts what was asked."""


class PretrainedMismatch(AutosegError):
    """Weights do not fit the network they were meant for."""


class UnsafeFile(AutosegError):
    """A file asks for code to be imported or run; nothing of it was."""


class SettingsError(AutosegError):
    """An option is unknown, out of range, or contradicts an existing run."""


class CasesFailed(AutosegError):
    """Some cases failed; the others are finished and kept."""

    exit_code = 1
