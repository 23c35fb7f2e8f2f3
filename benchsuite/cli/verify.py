"""`benchsuite verify`: every law on every strategy, and that each law catches its broken twins."""

from __future__ import annotations

import functools
from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs, integers
from benchsuite.cli.printing import print_json, tell

_AXES = {
    "parallel": "parallelisms",
    "sync": "strategies",
    "topology": "topologies",
    "compression": "compressions",
}


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "verify",
        parents=[parents.json],
        help="every law on every strategy, and that each law catches its broken twins",
    )

    for name, what in _AXES.items():
        parser.add_argument(
            f"--{name}",
            nargs="+",
            default=[],
            metavar="NAME",
            help=f"only these {what} or .py files",
        )

    parser.add_argument(
        "--replicas",
        default="1,2,3,4",
        metavar="LIST",
        help="numbers of workers (default: 1,2,3,4)",
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "virtual"),
        default="wall",
        help="real ranks, or in virtual time (default: wall)",
    )


def run(args: Namespace) -> int:
    """Exit code 0 where all laws hold and all twins are caught, else 1."""
    workers = integers(args.replicas, "--replicas", "1,2,3,4")
    from benchsuite.laws import verify
    from benchsuite.laws.harness.cases import Asked
    from benchsuite.laws.verify_table import table

    asked = Asked(
        tuple(args.sync),
        tuple(args.topology),
        tuple(args.compression),
        tuple(workers),
        args.clock,
        tuple(args.parallel),
    )
    document = verify.run(asked, say=functools.partial(tell, "verify"))
    if args.json:
        print_json(document)
    else:
        print(table(document))

    code: int = document["exit_code"]
    return code
