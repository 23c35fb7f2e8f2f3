"""What each verb of the command line does: calls the library, prints the answer. Heavy imports stay
inside.

The answer goes to standard output (one JSON document with `--json`), everything else to standard
error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchsuite.cli import main
from benchsuite.errors import UsageError
from benchsuite.plan import plugins
from benchsuite.report import text

if TYPE_CHECKING:
    from benchsuite.plan.plan import Plan
    from benchsuite.results.store import Store

_CELL_FLAGS = tuple(f"cell_{name}" for name in main.CELL_FLAGS)


def list_members(args: Namespace) -> int:
    """Members of an axis with their options; plans with their question."""
    kinds = [args.kind] if args.kind else [*plugins.KINDS, "report"]
    listing = {kind: _members(kind) for kind in kinds}
    if args.json:
        return _print_json(listing)
    for kind, members in listing.items():
        print(kind if args.kind is None else f"{kind}:")
        rows = []
        for member in members:
            rows.append((member["name"], f"{member['summary']}  [{member['path']}]"))
            for option in member.get("options", ()):
                said = f"  {option['name']} = {option['default']!r}  {option['help']}"
                rows.append(("", said))
        for line in text.aligned(rows, indent=2):
            print(line)
    return 0


def show_plan(args: Namespace) -> int:
    """Dry run: nothing is started."""
    from benchsuite.run import api
    from benchsuite.run import forecast as outlook

    if args.write:
        plan = _plan(args, "cluster=torchrun")
        ranks = outlook.write_cells(plan, Path(args.write))
        print(f"{args.write}: {len(plan.runs())} runs, {ranks}", file=sys.stderr)
        return 0
    from benchsuite.results import code_id

    plan = _refuses_no_single_cell(api.examined(_plan(args)))
    forecast = outlook.forecast(plan, _store(args), code_id=code_id.code_id)
    if args.json:
        return _print_json(forecast)
    print(outlook.table(forecast))
    return 0


def run(args: Namespace) -> int:
    """Runs what is missing."""
    from benchsuite import rules
    from benchsuite.run import api
    from benchsuite.run.progress import Lines

    plan = _refuses_no_single_cell(api.examined(_plan(args)))
    for notice in rules.noticed(plan.cells):
        print(f"benchsuite: notice: {notice.text}", file=sys.stderr)
    tally = api.run_plan(plan, _store(args), fresh=args.fresh, progress=Lines())
    counts = {str(status): count for status, count in tally.counts.items()}
    if args.json:
        document = {
            "plan": plan.name,
            "stored_before": tally.stored,
            "counts": counts,
            "failures": tally.failures,
        }
        document |= {"interrupted": tally.interrupted, "files": [str(path) for path in tally.paths]}
        _print_json(document)
    else:
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        nothing = "no run was finished" if tally.interrupted else "nothing to run"
        print(f"{plan.name}: {said or nothing}; {tally.stored} stored before, in {args.results}")
    if tally.failures:
        print(
            "\n".join(
                ["not ok, run again by the same command (a timeout stays):", *tally.failures]
            ),
            file=sys.stderr,
        )
    if tally.interrupted:
        print("interrupted: finished runs are stored, the same command continues", file=sys.stderr)
    return tally.exit_code


def report(args: Namespace) -> int:
    """Figures, tables, page; runs nothing."""
    from benchsuite.report import page
    from benchsuite.results import code_id

    plan = _plan(args)
    out = Path(args.out) if args.out else Path("reports") / "build" / plan.name
    with _writing(out):
        index = page.render_stored(plan, _store(args), out, code_id=code_id.code_id)
    if args.json:
        return _print_json({"plan": plan.name, "index": str(index)})
    print(index)
    return 0


def compare(args: Namespace) -> int:
    """Exit 0 same, 1 something differs, 2 nothing to compare."""
    from benchsuite.report import comparison as comparisons
    from benchsuite.run import api

    comparison = api.compare(args.base, args.head, loss_tolerance=args.loss_tolerance)
    if args.json:
        _print_json(comparison.to_json())
    else:
        print(comparisons.table(comparison))
    return comparison.exit_code


def export(args: Namespace) -> int:
    """csv: one row per run, to standard output or a file; series into a folder. chakra: a schedule,
    into a folder."""
    from benchsuite.results import export as forms
    from benchsuite.run import api

    if args.form == "chakra":
        return _export_chakra(args)
    for flag in ("plan", "steps", "set", "only", "seeds", "cluster", "hosts", "link", *_CELL_FLAGS):
        if getattr(args, flag):
            raise UsageError(
                f"export csv writes every stored run, and {flag.removeprefix('cell_')} = "
                f"{getattr(args, flag)!r} says "
                "which cell export chakra runs: leave it out"
            )
    store = api.existing(args.results)
    if args.series:
        for path in forms.series(store, Path(args.series)):
            print(path, file=sys.stderr)
    if args.out:
        with _writing(args.out), open(args.out, "w", encoding="utf-8", newline="") as stream:
            forms.csv(store, stream)
    else:
        forms.csv(store, sys.stdout)
    return 0


def _export_chakra(args: Namespace) -> int:
    from benchsuite.programs import chakra

    if args.series or not args.out:
        said = (
            "--series DIR is of export csv"
            if args.series
            else "export chakra writes a file per rank"
        )
        raise UsageError(f"{said}: give --out DIR, and no --series")
    steps = 3 if args.steps is None else args.steps
    if steps < 1:
        raise UsageError(
            f"--steps {steps}: a schedule has at least one step; give --steps 1 or more"
        )
    cell = chakra.one_cell(_plan(args, "gradients=none", f"budget.steps={steps}"))
    with _writing(args.out):
        written = chakra.export(cell, args.out)
    print(
        f"{Path(args.out) / cell.id}.*.et: {len(written.traces)} ranks of {cell.label}; "
        f"{written.path}"
    )
    return 0


def collect(args: Namespace) -> int:
    """Takes the ranks' files of a user's own torchrun into the results folder."""
    from benchsuite.run import api

    tally = api.collect(Path(args.run_dir), _store(args))
    counts = {str(status): count for status, count in tally.counts.items() if count}
    if args.json:
        _print_json(
            {
                "counts": counts,
                "failures": tally.failures,
                "files": [str(path) for path in tally.paths],
            }
        )
    else:
        print("\n".join(map(str, tally.paths)))
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"{said or 'nothing new'}; {tally.stored} taken before")
    return tally.exit_code


def replay(args: Namespace) -> int:
    """A stored asynchronous run again, in virtual time. Exit 0 where it is the same run, 1 where it
    is another."""
    from benchsuite.virtual import replay as bridge

    document = bridge.compared(bridge.load(args.run))
    _print_json(document) if args.json else _print(bridge.table(document))
    return 0 if document["same"] else 1


def verify(args: Namespace) -> int:
    """Laws and their broken twins. Exit 0 where all hold and all are caught, else 1."""
    workers = _integers(args.replicas, "--replicas", "1,2,3,4")
    from benchsuite.laws import verify as laws
    from benchsuite.laws.harness.cases import Asked
    from benchsuite.laws.verify_table import table

    def say(what: str) -> None:
        print(f"verify: {what}", file=sys.stderr, flush=True)

    asked = Asked(
        tuple(args.sync),
        tuple(args.topology),
        tuple(args.compression),
        tuple(workers),
        args.clock,
        tuple(args.parallel),
    )
    document = laws.run(asked, say=say)
    _print_json(document) if args.json else _print(table(document))
    code: int = document["exit_code"]
    return code


def doctor(args: Namespace) -> int:
    """What this machine can do."""
    from benchsuite.programs import doctor as machine

    findings = machine.examine()
    return _print_json(findings) if args.json else _print(machine.table(findings))


def selfcheck(args: Namespace) -> int:
    """What the suite itself costs. Exit 0, 1 where a bar is missed, 3 where the machine was too
    noisy to tell."""
    import benchsuite.programs.selfcheck.selfcheck as checks

    def say(item: str) -> None:
        print(f"selfcheck: {item}", file=sys.stderr, flush=True)

    document = checks.run(args.only, args.launches, results=args.results, say=say)
    _print_json(document) if args.json else _print(checks.table(document))
    code: int = document["exit_code"]
    return code


def calibrate(args: Namespace) -> int:
    """What messages and gradients take here, and how well a virtual run fed with it predicts a
    measured one."""
    from benchsuite.programs.calibrate import calibrate as calibration
    from benchsuite.programs.calibrate.launches import Effort
    from benchsuite.programs.calibrate.table import table

    def say(what: str) -> None:
        print(f"calibrate: {what}", file=sys.stderr, flush=True)

    effort = Effort(launches=args.launches)
    if args.no_shaped:
        effort = dataclasses.replace(effort, rates={})
    document = calibration.run(
        args.workload, args.preset, effort=effort, results=args.results, say=say
    )
    return _print_json(document) if args.json else _print(table(document))


def _plan(args: Namespace, *settings: str) -> Plan:
    """The plan that PLAN names, or the one of the cell flags. UsageError where both or neither are
    given."""
    from benchsuite.plan import plan
    from benchsuite.report import spec

    if args.hosts is not None or args.link is not None:
        flag = "--hosts" if args.hosts is not None else "--link"
        raise UsageError(
            f"{flag} needs a cluster of several hosts, which this version has not: leave it out, "
            "start the ranks with "
            "your own torchrun (benchsuite plan PLAN --write cells.json), or, under the virtual "
            "clock, say "
            "--set hosts=2 or --set link_mbit=1000 --set link_latency_us=50"
        )
    flags = {name: getattr(args, f"cell_{name}") for name in main.CELL_FLAGS}
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    if bool(args.plan) == bool(given):
        said = f"PLAN {args.plan!r} and {given[0]}" if given else "neither"
        raise UsageError(
            "give a PLAN (benchsuite list report) or a cell by flags (--workload cnn ...), not "
            f"{said}"
        )
    settings = (*args.set, *([f"cluster={args.cluster}"] if args.cluster else []), *settings)
    seeds = None if args.seeds is None else _integers(args.seeds, "--seeds", "0,1,2")
    if args.plan:
        loaded = plan.load(args.plan, settings=settings, only=args.only, seeds=seeds)
        spec.parse(loaded.figures)  # now, rather than after everything has run
        return loaded
    return plan.from_flags(flags, settings=settings, only=args.only, seeds=seeds)


def _refuses_no_single_cell(plan: Plan) -> Plan:
    """The same plan; UsageError with rule and remedy where it is one cell of flags, and refused.

    Whoever asks for one cell has no other answer to look at. Of several cells the others run.
    """
    asked_by_flags = plan.path is None
    if asked_by_flags and not plan.cells and len(plan.refused) == 1:
        (refused,) = plan.refused
        raise UsageError(f"{refused.cell.label} is refused: {refused.reason}")
    return plan


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """UsageError where the file or folder that a flag names cannot be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = (
            f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
        )
        raise UsageError(
            f"{path} cannot be written{where}: {error.strerror or error}; name another place"
        ) from error


def _integers(text: str, flag: str, example: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{flag} {text!r}: give integers separated by commas, e.g. {example}"
        ) from error


def _store(args: Namespace) -> Store:
    from benchsuite.results.store import Store

    return Store(args.results)


def _members(kind: str) -> list[dict[str, Any]]:
    return _plans() if kind == "report" else [_member(kind, name) for name in plugins.names(kind)]


def _member(kind: str, name: str) -> dict[str, Any]:
    member = plugins.find(kind, name)
    options = [
        {"name": o.name, "type": o.type, "default": o.default, "help": o.help}
        for o in member.options.values()
    ]
    listing: dict[str, Any] = {
        "name": name,
        "summary": member.summary,
        "path": str(member.path),
        "options": options,
    }
    return listing | ({"presets": list(member.presets)} if member.presets else {})


def _plans() -> list[dict[str, Any]]:
    import tomllib

    from benchsuite.plan import plan

    found = []
    for name, path in plan.available().items():
        try:
            question = tomllib.loads(path.read_text(encoding="utf-8")).get("question", "")
        except (OSError, ValueError) as error:
            question = f"cannot be read: {error}"
        found.append({"name": name, "summary": question, "path": str(path)})
    return found


def _print(text: str) -> int:
    print(text)
    return 0


def _print_json(document: Any) -> int:
    json.dump(document, sys.stdout, indent=1, sort_keys=True, allow_nan=False)
    print()
    return 0
