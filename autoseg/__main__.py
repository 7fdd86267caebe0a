"""`autoseg` and `python -m autoseg`: run a command, turn errors into messages and exit codes."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from planners.errors import AutosegError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 some cases failed or a fault of autoseg, 2 the user can mend it."""
    # Workers are spawned and import this module: nothing above the guard may start a command.
    debug = "--debug" in sys.argv
    # timm defines a scripted interface when it is imported, which newer torch deprecates: nothing a user can mend.
    warnings.filterwarnings("ignore", r".torch\.jit\.interface.", FutureWarning)
    try:
        _run(sys.argv[1:])
    except AutosegError as error:
        if debug:
            raise
        _stop(f"Error: {error}", error.exit_code)
    except KeyboardInterrupt:
        _stop("Interrupted. What was finished is kept; the same command continues.", 130)
    except OSError as error:
        if debug:
            raise
        _stop(f"Error: {error.strerror or error}\n  where     {error.filename or 'unknown'}", 2)
    except Exception as error:
        if debug:
            raise
        _stop(
            f"Error: {type(error).__name__}: {error}\n"
            "This is a fault of autoseg, not of yours. Repeat the command with --debug for the traceback.",
            1,
        )


def _run(arguments: list[str]) -> None:
    """Run the command that is named, not by way of the groups it belongs to: these would check their own options first, for
    which typer loads pydantic, and help and wrong options would take twice as long."""
    from typer.main import get_command

    from autoseg.cli import app

    command: Any = get_command(app)
    settings, names = command.context_settings, ["autoseg"]
    while arguments and arguments[0] in getattr(command, "commands", {}):
        name, *arguments = arguments
        names.append(name)
        command = command.commands[name]
    command.main(arguments, prog_name=" ".join(names), **settings)


def _stop(message: str, exit_code: int) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
