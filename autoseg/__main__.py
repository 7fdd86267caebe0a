"""`autoseg` and `python -m autoseg`: run a command, turn errors into messages and exit codes."""

from __future__ import annotations

import sys
import warnings

from planners.errors import AutosegError


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 some cases failed or a fault of autoseg, 2 the user can mend it."""
    from autoseg.cli import app

    # Workers are spawned and import this module: nothing above the guard may start a command.
    debug = "--debug" in sys.argv
    # timm defines a scripted interface when it is imported, which newer torch deprecates: nothing a user can mend.
    warnings.filterwarnings("ignore", r".torch\.jit\.interface.", FutureWarning)
    try:
        app(prog_name="autoseg")
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


def _stop(message: str, exit_code: int) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
