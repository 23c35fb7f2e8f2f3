"""`benchsuite selfcheck`: what the suite itself costs on this machine."""

from __future__ import annotations

import functools
from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs
from benchsuite.cli.printing import print_json, tell
from benchsuite.programs.selfcheck.items import ITEMS


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "selfcheck", parents=[parents.results, parents.json], help="what the suite itself costs"
    )
    parser.add_argument("--only", metavar="NAME", help=" | ".join(ITEMS))
    parser.add_argument(
        "--launches",
        type=int,
        default=5,
        metavar="N",
        help="fresh launches per quantity (default: 5)",
    )


def run(args: Namespace) -> int:
    """Exit code 0, 1 where a bar is missed, 3 where the machine was too noisy to tell."""
    from benchsuite.programs.selfcheck import selfcheck

    document = selfcheck.run(
        args.only,
        args.launches,
        results=args.results,
        say=functools.partial(tell, "selfcheck"),
    )
    if args.json:
        print_json(document)
    else:
        print(selfcheck.table(document))

    code: int = document["exit_code"]
    return code
