"""`benchsuite report`: figures, tables and the page of a plan, from stored runs; runs nothing."""

from __future__ import annotations

from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs, plan_of, store_of
from benchsuite.cli.printing import print_json, writing


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "report",
        parents=[parents.plan, parents.results, parents.json],
        help="figures, tables, page from stored runs",
    )
    parser.add_argument("--out", metavar="DIR", help="default: reports/build/PLAN")


def run(args: Namespace) -> int:
    """Draws the page from what is stored and prints where it is; starts nothing."""
    from pathlib import Path

    from benchsuite.report import page
    from benchsuite.results import code_id

    plan = plan_of(args)
    out = Path(args.out) if args.out else Path("reports") / "build" / plan.name

    with writing(out):
        index = page.render_stored(plan, store_of(args), out, code_id=code_id.code_id)

    if args.json:
        print_json({"plan": plan.name, "index": str(index)})
    else:
        print(index)

    return 0
