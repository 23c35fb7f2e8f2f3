"""`benchsuite doctor`: what this machine can do, and what is missing for what."""

from __future__ import annotations

from argparse import Namespace

from benchsuite.cli.flags import Parents, Verbs
from benchsuite.cli.printing import print_json


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    verbs.add_parser(
        "doctor",
        parents=[parents.json],
        help="what this machine can do, and what is missing for what",
    )


def run(args: Namespace) -> int:
    """Prints what was found; the exit code is 0 whatever is missing.

    What is missing matters only to those who need it, which the machine cannot know.
    """
    from benchsuite.programs import doctor

    findings = doctor.examine()
    if args.json:
        print_json(findings)
    else:
        print(doctor.table(findings))

    return 0
