"""`benchsuite collect`: takes over the runs that a torchrun of the user's own left in a folder."""

from __future__ import annotations

from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs, store_of
from benchsuite.cli.printing import print_json


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "collect",
        parents=[parents.results, parents.json],
        help="take over the runs of your own torchrun",
    )
    parser.add_argument(
        "run_dir", metavar="RUNDIR", help="what --out named in `torchrun ... -m benchsuite.worker`"
    )


def run(args: Namespace) -> int:
    """Stores what is new and prints its files; a second call finds nothing new."""
    from pathlib import Path

    from benchsuite.running import api

    tally = api.collect(Path(args.run_dir), store_of(args))
    counts = {str(status): count for status, count in tally.counts.items() if count}
    files = [str(path) for path in tally.paths]

    if args.json:
        print_json({"counts": counts, "failures": tally.failures, "files": files})
    else:
        print("\n".join(files))
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"{said or 'nothing new'}; {tally.stored} taken before")

    return tally.exit_code
