"""`benchsuite plan`: a dry run, which says what a plan would run and starts nothing."""

from __future__ import annotations

import sys
from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs, examined_plan_of, plan_of, store_of
from benchsuite.cli.printing import print_json


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "plan",
        parents=[parents.plan, parents.results, parents.json],
        help="dry run: cells, bytes, time, refusals",
    )
    parser.add_argument(
        "--write", metavar="FILE", help="write the cells for a torchrun of your own (cells.json)"
    )


def run(args: Namespace) -> int:
    """Prints the forecast of a plan, or writes its cells for a torchrun of the user's own."""
    from pathlib import Path

    from benchsuite.running import forecast

    if args.write:
        # Not examined: the machine that writes the file need not be the one that runs it.
        plan = plan_of(args, "cluster=torchrun")
        ranks = forecast.write_cells(plan, Path(args.write))
        print(f"{args.write}: {len(plan.runs())} runs, {ranks}", file=sys.stderr)
        return 0

    from benchsuite.results import code_id

    plan = examined_plan_of(args)
    document = forecast.forecast(plan, store_of(args), code_id=code_id.code_id)

    if args.json:
        print_json(document)
    else:
        print(forecast.table(document))

    return 0
