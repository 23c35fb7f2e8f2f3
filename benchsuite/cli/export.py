"""`benchsuite export`: stored runs as CSV, or a schedule of the virtual clock as Chakra traces."""

from __future__ import annotations

import sys
from argparse import Namespace

from benchsuite.cli.flags import CELL_FLAGS, Parents, Verbs, engine_flags, plan_of
from benchsuite.cli.printing import writing
from benchsuite.errors import UsageError


def add_parser(verbs: Verbs, parents: Parents) -> None:
    """Adds the verb."""
    parser = verbs.add_parser(
        "export",
        parents=[parents.cell, parents.results],
        help="other forms of the stored runs, or of a schedule",
    )
    parser.add_argument(
        "form",
        choices=("csv", "chakra"),
        help="csv: one row per stored run; chakra: one cell of the virtual clock as execution "
        "traces",
    )
    parser.add_argument(
        "plan", nargs="?", metavar="PLAN", help="chakra: a plan of one cell; or give a cell:"
    )
    parser.add_argument(
        "--out", metavar="PATH", help="csv: a file (default: standard output); chakra: a folder"
    )
    parser.add_argument(
        "--series", metavar="DIR", help="also curves.csv, step_times.csv, staleness.csv, ranks.csv"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="chakra: length of the schedule (default: 3)"
    )


def run(args: Namespace) -> int:
    """Writes the form that was asked for; returns the exit code."""
    return _chakra(args) if args.form == "chakra" else _csv(args)


def _csv(args: Namespace) -> int:
    """One row per run to standard output or a file; with `--series` a folder of curves too."""
    from pathlib import Path

    from benchsuite.results import export
    from benchsuite.running import api

    _refuse_cell_flags(args)
    store = api.existing(args.results)
    if args.series:
        for path in export.series(store, Path(args.series)):
            print(path, file=sys.stderr)

    if args.out:
        with writing(args.out), open(args.out, "w", encoding="utf-8", newline="") as stream:
            export.csv(store, stream)
    else:
        export.csv(store, sys.stdout)

    return 0


def _refuse_cell_flags(args: Namespace) -> None:
    """UsageError for a flag that `export csv` would ignore: a user who gives one expects fewer."""
    of_a_cell = [f"cell_{name}" for name in CELL_FLAGS]
    given = {name: getattr(args, name) for name in ("plan", "steps", "set", "only", "seeds")}
    given["cluster"] = args.cluster
    given |= {name.removeprefix("cell_"): getattr(args, name) for name in of_a_cell}

    for name, value in (given | engine_flags(args)).items():
        if value:
            raise UsageError(
                f"export csv writes every stored run, and {name} = {value!r} says which cell "
                "export chakra runs: leave it out"
            )


def _chakra(args: Namespace) -> int:
    """The schedule of one cell, a file per rank, into a folder."""
    from pathlib import Path

    from benchsuite.programs import chakra

    if args.series:
        raise UsageError("--series DIR is of export csv: give --out DIR, and no --series")
    if not args.out:
        raise UsageError("export chakra writes a file per rank: give --out DIR, and no --series")

    steps = 3 if args.steps is None else args.steps
    if steps < 1:
        raise UsageError(
            f"--steps {steps}: a schedule has at least one step; give --steps 1 or more"
        )

    cell = chakra.one_cell(plan_of(args, "gradients=none", f"budget.steps={steps}"))

    with writing(args.out):
        written = chakra.export(cell, args.out)

    traces = Path(args.out) / cell.id
    print(f"{traces}.*.et: {len(written.traces)} ranks of {cell.label}; {written.path}")
    return 0
