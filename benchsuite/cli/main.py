"""The entry point of `benchsuite`: builds the parser, calls a verb, turns errors into exit codes.

Exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 some runs failed, 5 harness error, 130
interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from benchsuite.cli.flags import parents
from benchsuite.errors import UsageError
from benchsuite.measure.version import VERSION

USAGE = 2
HARNESS_ERROR = 5
INTERRUPTED = 130

# The verbs in the order of the help page; each is a file of this folder.
VERBS = (
    "list",
    "plan",
    "run",
    "report",
    "compare",
    "export",
    "collect",
    "replay",
    "verify",
    "doctor",
    "calibrate",
    "selfcheck",
)
_EXIT_CODES = (
    "exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 some runs failed, 5 "
    "harness error, 130 interrupted"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command of `arguments` (None = of this process); returns its exit code.

    Raises nothing but what argparse does for `--help` and a wrong flag, which is SystemExit.
    """
    warnings.showwarning = _one_line
    given = sys.argv[1:] if arguments is None else arguments

    try:
        args = build_parser(given).parse_args(given)
        code: int = _module(args.verb).run(args)
        return code

    except UsageError as error:
        return _fail(error, USAGE)

    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `benchsuite export csv | head`
        # Python flushes standard output once more at its end, into the closed pipe, and would print
        # an error that nobody can act on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # The outermost frame: Python's own exit code for an error, 1, would mean "regression".
    except Exception as error:  # noqa: BLE001
        from benchsuite.results.store import StoreError

        # Its message says all; a traceback is for errors of ours.
        if not isinstance(error, StoreError):
            import traceback

            traceback.print_exc()

        return _fail(error, HARNESS_ERROR)


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of the command `arguments`; of no command, as here by default, all verbs.

    Where the command begins with a verb, only the file of that verb is imported. Its `--cluster`
    may name an engine that takes flags of its own.
    """
    parser = argparse.ArgumentParser(
        prog="benchsuite",
        description="Benchmarks for distributed training strategies.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"benchsuite {VERSION}")

    # Each verb is a file that may import much; a command pays for its own only.
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    shared = parents(arguments)
    asked = [verb for verb in VERBS if verb in arguments[:1]]

    for verb in asked or VERBS:
        _module(verb).add_parser(verbs, shared)

    return parser


def _module(verb: str) -> Any:
    """The file of a verb."""
    return importlib.import_module(f"benchsuite.cli.{verb}")


def _fail(error: BaseException, code: int) -> int:
    """Prints an error in one line and returns the exit code that goes with it."""
    text = str(error) or type(error).__name__
    print(f"benchsuite: error: {text}", file=sys.stderr)
    return code


def _one_line(message: Warning | str, category: type[Warning], *_rest: Any, **_more: Any) -> None:
    """How warnings are shown: without the file and the line of ours that raised them."""
    print(f"benchsuite: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
