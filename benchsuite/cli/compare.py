"""`benchsuite compare`: a verdict per cell and metric between two results folders."""

from __future__ import annotations

from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs
from benchsuite.cli.printing import print_json


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "compare",
        parents=[parents.json],
        help="verdict per cell and metric between two stored sets",
    )
    parser.add_argument("base", metavar="BASE", help="results folder that is right by definition")
    parser.add_argument("head", metavar="HEAD", help="results folder to be judged")
    parser.add_argument(
        "--loss-tolerance",
        type=float,
        metavar="X",
        help="relative; default: exact on the same machine and torch, elsewhere 1e-8 (fp64) or "
        "1e-3 (fp32)",
    )


def run(args: Namespace) -> int:
    """Exit code 0 = the same, 1 = something differs; 2 = there is nothing to compare."""
    from benchsuite.report import comparison as comparisons
    from benchsuite.running import api

    comparison = api.compare(args.base, args.head, loss_tolerance=args.loss_tolerance)
    if args.json:
        print_json(comparison.to_json())
    else:
        print(comparisons.table(comparison))
    return comparison.exit_code
