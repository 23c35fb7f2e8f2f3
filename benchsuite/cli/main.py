"""The command line: verbs and their flags, errors, exit codes. No logic, and nothing heavy is
imported here.

Exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 some runs failed, 5 harness error, 130
interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from benchsuite import __version__
from benchsuite.errors import UsageError

USAGE = 2
HARNESS_ERROR = 5
INTERRUPTED = 130
CELL_FLAGS = (
    "workload",
    "preset",
    "parallel",
    "sync",
    "topology",
    "compression",
    "replicas",
    "model_parallel",
    "servers",
    "threads",
    "precision",
    "backend",
    "device",
    "clock",
)
SELFCHECK_ITEMS = (  # its ITEMS
    "commands",
    "launch",
    "harness",
    "ring",
    "server",
    "parallel",
    "hierarchical",
    "overlap",
    "profile",
    "compression",
    "virtual",
    "store",
    "report",
)

Verb = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `benchsuite`; returns the exit code."""
    args = build_parser().parse_args(arguments)
    warnings.showwarning = _one_line
    try:
        return _verb(args.verb)(args)
    except UsageError as error:
        return _fail(error, USAGE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `benchsuite export csv | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  outermost frame: Python's own code for it, 1, would mean "regression"
        from benchsuite.results.store import StoreError

        if not isinstance(error, StoreError):
            traceback.print_exc()
        return _fail(error, HARNESS_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their flags."""
    parser = argparse.ArgumentParser(
        prog="benchsuite",
        description="Benchmarks for distributed training strategies.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"benchsuite {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    json_output = _json_flag()
    results = _results_flag()
    plan = _plan_flags()
    cell = _cell_flags()

    each = verbs.add_parser(
        "list", parents=[json_output], help="members of an axis, their options and files"
    )
    kinds = ("workload", "parallel", "sync", "topology", "compression", "cluster", "report")
    each.add_argument("kind", nargs="?", choices=kinds, metavar="KIND", help=" | ".join(kinds))

    each = verbs.add_parser(
        "plan", parents=[plan, results, json_output], help="dry run: cells, bytes, time, refusals"
    )
    each.add_argument(
        "--write", metavar="FILE", help="write the cells for a torchrun of your own (cells.json)"
    )

    each = verbs.add_parser(
        "run", parents=[plan, results, json_output], help="run what is missing (resumes)"
    )
    each.add_argument("--fresh", action="store_true", help="run again what is stored")

    each = verbs.add_parser(
        "report",
        parents=[plan, results, json_output],
        help="figures, tables, page from stored runs",
    )
    each.add_argument("--out", metavar="DIR", help="default: reports/build/PLAN")

    each = verbs.add_parser(
        "compare", parents=[json_output], help="verdict per cell and metric between two stored sets"
    )
    each.add_argument("base", metavar="BASE", help="results folder that is right by definition")
    each.add_argument("head", metavar="HEAD", help="results folder to be judged")
    each.add_argument(
        "--loss-tolerance",
        type=float,
        metavar="X",
        help="relative; default: exact on the same machine and torch, elsewhere 1e-8 (fp64) or "
        "1e-3 (fp32)",
    )

    each = verbs.add_parser(
        "export", parents=[cell, results], help="other forms of the stored runs, or of a schedule"
    )
    each.add_argument(
        "form",
        choices=("csv", "chakra"),
        help="csv: one row per stored run; chakra: one cell of the virtual clock as execution "
        "traces",
    )
    each.add_argument(
        "plan", nargs="?", metavar="PLAN", help="chakra: a plan of one cell; or give a cell:"
    )
    each.add_argument(
        "--out", metavar="PATH", help="csv: a file (default: standard output); chakra: a folder"
    )
    each.add_argument(
        "--series", metavar="DIR", help="also curves.csv, step_times.csv, staleness.csv, ranks.csv"
    )
    each.add_argument(
        "--steps", type=int, metavar="N", help="chakra: length of the schedule (default: 3)"
    )

    each = verbs.add_parser(
        "collect", parents=[results, json_output], help="take over the runs of your own torchrun"
    )
    each.add_argument(
        "run_dir", metavar="RUNDIR", help="what --out named in `torchrun ... -m benchsuite.worker`"
    )

    each = verbs.add_parser(
        "replay", parents=[json_output], help="a stored asynchronous run again, in virtual time"
    )
    each.add_argument(
        "run",
        metavar="RUN.json",
        help="a run file; its push log says who pushed what in which order",
    )

    each = verbs.add_parser(
        "verify",
        parents=[json_output],
        help="every law on every strategy, and that each law catches its broken twins",
    )
    members = {"parallel": "parallelisms", "sync": "strategies", "topology": "topologies"}
    members["compression"] = "compressions"
    for name, what in members.items():
        each.add_argument(
            f"--{name}",
            nargs="+",
            default=[],
            metavar="NAME",
            help=f"only these {what} or .py files",
        )
    each.add_argument(
        "--replicas",
        default="1,2,3,4",
        metavar="LIST",
        help="numbers of workers (default: 1,2,3,4)",
    )
    each.add_argument(
        "--clock",
        choices=("wall", "virtual"),
        default="wall",
        help="real ranks, or in virtual time (default: wall)",
    )

    verbs.add_parser(
        "doctor",
        parents=[json_output],
        help="what this machine can do, and what is missing for what",
    )
    each = verbs.add_parser(
        "calibrate",
        parents=[results, json_output],
        help="links, incast, gradients; a virtual run beside a real one",
    )
    each.add_argument(
        "--workload", default="cnn", metavar="X", help="whose gradients are timed (default: cnn)"
    )
    each.add_argument("--preset", default="", metavar="X", help="default: the workload's first")
    each.add_argument(
        "--launches",
        type=int,
        default=3,
        metavar="N",
        help="fresh launches per quantity (default: 3)",
    )
    each.add_argument(
        "--no-shaped",
        action="store_true",
        help="no slow links (they need ip, tc and a private network)",
    )
    each = verbs.add_parser(
        "selfcheck", parents=[results, json_output], help="what the suite itself costs"
    )
    each.add_argument("--only", metavar="NAME", help=" | ".join(SELFCHECK_ITEMS))
    each.add_argument(
        "--launches",
        type=int,
        default=5,
        metavar="N",
        help="fresh launches per quantity (default: 5)",
    )
    return parser


def _verb(name: str) -> Verb:
    from benchsuite.cli import verbs

    verb: Verb = getattr(verbs, {"list": "list_members", "plan": "show_plan"}.get(name, name))
    return verb


def _json_flag() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parent


def _results_flag() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "--results", default="results", metavar="DIR", help="results folder (default: results)"
    )
    return parent


def _plan_flags() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False, parents=[_cell_flags()])
    parent.add_argument(
        "plan",
        nargs="?",
        metavar="PLAN",
        help="path or name of a plan, e.g. quick; or give a cell:",
    )
    return parent


def _cell_flags() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    cell = parent.add_argument_group("a single cell instead of a plan")
    for name in CELL_FLAGS:
        cell.add_argument(f"--{name.replace('_', '-')}", metavar="X", dest=f"cell_{name}")
    parent.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. precision=fp64"
    )
    parent.add_argument("--only", metavar="EXPR", help="e.g. 'topology == ring and replicas > 1'")
    parent.add_argument("--seeds", metavar="LIST", help="e.g. 0,1,2")
    parent.add_argument("--cluster", metavar="NAME", help="who starts the ranks (default: local)")
    parent.add_argument("--hosts", metavar="N", help="needs a cluster of several hosts")
    parent.add_argument("--link", metavar="RATE", help="needs the namespaces cluster")
    return parent


def _fail(error: BaseException, code: int) -> int:
    text = str(error) or type(error).__name__
    print(f"benchsuite: error: {text}", file=sys.stderr)
    return code


def _one_line(message: Warning | str, category: type[Warning], *_rest: Any, **_more: Any) -> None:
    print(f"benchsuite: warning: {message}", file=sys.stderr)


_EXIT_CODES = (
    "exit codes: 0 pass, 1 regression, 2 usage, 3 inconclusive, 4 some runs failed, 5 "
    "harness error, 130 interrupted"
)

if __name__ == "__main__":
    sys.exit(main())
