"""`benchsuite replay`: a stored asynchronous run happens again, in virtual time."""

from __future__ import annotations

from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs
from benchsuite.cli.printing import print_json


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "replay",
        parents=[parents.json],
        help="a stored asynchronous run again, in virtual time",
    )
    parser.add_argument(
        "run",
        metavar="RUN.json",
        help="a run file; its push log says who pushed what in which order",
    )


def run(args: Namespace) -> int:
    """Exit code 0 where it is the same run, 1 where it is another.

    What a run file holds is compared: staleness exactly, loss and metric within a tolerance.
    """
    from benchsuite.virtual import replay

    document = replay.compared(replay.load(args.run))
    if args.json:
        print_json(document)
    else:
        print(replay.table(document))

    return 0 if document["same"] else 1
