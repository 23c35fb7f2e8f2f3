"""`benchsuite calibrate`: what messages and gradients take on this machine.

A virtual run that is fed with it stands beside a real one, to show how well it predicts.
"""

from __future__ import annotations

import functools
from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs
from benchsuite.cli.printing import print_json, tell


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "calibrate",
        parents=[parents.results, parents.json],
        help="links, incast, gradients; a virtual run beside a real one",
    )
    parser.add_argument(
        "--workload", default="cnn", metavar="X", help="whose gradients are timed (default: cnn)"
    )
    parser.add_argument("--preset", default="", metavar="X", help="default: the workload's first")
    parser.add_argument(
        "--launches",
        type=int,
        default=3,
        metavar="N",
        help="fresh launches per quantity (default: 3)",
    )
    parser.add_argument(
        "--no-shaped",
        action="store_true",
        help="no slow links (they need ip, tc and a private network)",
    )


def run(args: Namespace) -> int:
    """Measures, stores the document and prints its tables."""
    import dataclasses

    from benchsuite.programs.calibrate import calibrate
    from benchsuite.programs.calibrate.launches import Effort
    from benchsuite.programs.calibrate.table import table

    effort = Effort(launches=args.launches)
    if args.no_shaped:
        effort = dataclasses.replace(effort, rates={})

    document = calibrate.run(
        args.workload,
        args.preset,
        effort=effort,
        results=args.results,
        say=functools.partial(tell, "calibrate"),
    )
    if args.json:
        print_json(document)
    else:
        print(table(document))

    return 0
