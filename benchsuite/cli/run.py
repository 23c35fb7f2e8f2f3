"""`benchsuite run`: runs what is missing of a plan, and resumes what was interrupted."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from benchsuite.cli.flags import Parents, Verbs, engine_flags, examined_plan_of, store_of
from benchsuite.cli.printing import print_json

if TYPE_CHECKING:
    from benchsuite.plan.plan import Plan
    from benchsuite.running.runner import Tally


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "run",
        parents=[parents.plan, parents.results, parents.json],
        help="run what is missing (resumes)",
    )
    parser.add_argument("--fresh", action="store_true", help="run again what is stored")


def run(args: Namespace) -> int:
    """Runs what is missing; the exit code says whether all of it ended well.

    0: all ok. 4: some runs failed. 130: interrupted; what had ended is stored.
    """
    from benchsuite import rules
    from benchsuite.running import api
    from benchsuite.running.progress import Lines

    plan = examined_plan_of(args)

    for notice in rules.noticed(plan.cells):
        print(f"benchsuite: notice: {notice.text}", file=sys.stderr)

    # Progress and notices go to standard error, so that `--json` can be piped.
    tally = api.run_plan(
        plan,
        store_of(args),
        fresh=args.fresh,
        progress=Lines(),
        engine_flags=engine_flags(args),
    )

    _print_tally(args, plan, tally)
    if tally.failures:
        print("not ok, run again by the same command (a timeout stays):", file=sys.stderr)
        print("\n".join(tally.failures), file=sys.stderr)

    if tally.interrupted:
        print("interrupted: finished runs are stored, the same command continues", file=sys.stderr)
    return tally.exit_code


def _print_tally(args: Namespace, plan: Plan, tally: Tally) -> None:
    """Says what became of the cells, as one line or as JSON."""
    counts = {str(status): count for status, count in tally.counts.items()}
    if args.json:
        print_json(
            {
                "plan": plan.name,
                "stored_before": tally.stored,
                "counts": counts,
                "failures": tally.failures,
                "interrupted": tally.interrupted,
                "files": [str(path) for path in tally.paths],
            }
        )
        return

    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    nothing = "no run was finished" if tally.interrupted else "nothing to run"
    print(f"{plan.name}: {said or nothing}; {tally.stored} stored before, in {args.results}")
