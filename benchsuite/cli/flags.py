"""Flags that several verbs share, and what is made of them: a plan, a store, a list of numbers.

Every command imports this file: it needs nothing that takes long to import, dataclasses included.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchsuite.errors import UsageError

if TYPE_CHECKING:
    from benchsuite.plan.plan import Plan
    from benchsuite.results.store import Store

    # The subparsers of the command line, to which each verb adds its own.
    Verbs = argparse._SubParsersAction[ArgumentParser]
else:
    Verbs = argparse._SubParsersAction  # takes no type argument when it runs

# Fields of a cell that have a flag of their own; all others are given by --set.
CELL_FLAGS = (
    "workload",
    "preset",
    "parallel",
    "sync",
    "topology",
    "compression",
    "replicas",
    "model_parallel",
    "servers",
    "threads",
    "precision",
    "backend",
    "device",
    "clock",
)
_ENGINE_FLAG = "engine_"  # what the names of an engine's flags begin with in the namespace


class Parents(NamedTuple):
    """Parsers whose flags a verb may take over (`parents=[..]` of argparse)."""

    json: ArgumentParser
    results: ArgumentParser
    cell: ArgumentParser  # a cell by flags, and what changes or selects cells
    plan: ArgumentParser  # `cell`, or a plan by name or path instead


def parents(arguments: Sequence[str] = ()) -> Parents:
    """The shared flags; those of the engine that `--cluster` names in `arguments` among them."""
    json = ArgumentParser(add_help=False)
    json.add_argument("--json", action="store_true", help="one JSON document on standard output")
    results = ArgumentParser(add_help=False)
    results.add_argument(
        "--results", default="results", metavar="DIR", help="results folder (default: results)"
    )
    engine = _declared_flags(arguments)
    cell = _cell_parser(engine)
    plan = ArgumentParser(add_help=False, parents=[_cell_parser(engine)])
    plan.add_argument(
        "plan",
        nargs="?",
        metavar="PLAN",
        help="path or name of a plan, e.g. quick; or give a cell:",
    )
    return Parents(json, results, cell, plan)


def _cell_parser(engine: Mapping[str, str]) -> ArgumentParser:
    """A parser of the flags that state or select cells.

    engine: the flags that the cluster engine declares, each with its help.
    """
    parser = ArgumentParser(add_help=False)
    cell = parser.add_argument_group("a single cell instead of a plan")

    for name in CELL_FLAGS:
        cell.add_argument(flag(name), metavar="X", dest=f"cell_{name}")

    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. precision=fp64"
    )
    parser.add_argument("--only", metavar="EXPR", help="e.g. 'topology == ring and replicas > 1'")
    parser.add_argument("--seeds", metavar="LIST", help="e.g. 0,1,2")
    parser.add_argument("--cluster", metavar="NAME", help="who starts the ranks (default: local)")

    for name, text in engine.items():
        parser.add_argument(flag(name), metavar="X", dest=f"{_ENGINE_FLAG}{name}", help=text)

    return parser


def _declared_flags(arguments: Sequence[str]) -> Mapping[str, str]:
    """Flags that the engine of `--cluster` declares, each with its help. {} = none is named.

    The command line is looked through once before it is parsed: the parser has to know all flags at
    its start, and which there are depends on one of them.
    """
    scout = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scout.add_argument("--cluster")

    # Without abbreviations: `--cl` may be the beginning of another verb's flag.
    try:
        reference = scout.parse_known_args(arguments)[0].cluster
    except argparse.ArgumentError:  # a --cluster without a name: the real parser says so
        return {}

    if not reference:
        return {}

    from benchsuite.plan import declared

    return declared.cluster(reference).flags


def flag(name: str) -> str:
    """`--model-parallel` of `model_parallel`."""
    return f"--{name.replace('_', '-')}"


def engine_flags(args: Namespace) -> dict[str, str]:
    """What was given for the flags of the cluster engine, by their names.

    Their names in the namespace have a prefix, so that an engine's flag cannot take the place of
    one of ours.
    """
    return {
        name.removeprefix(_ENGINE_FLAG): value
        for name, value in vars(args).items()
        if name.startswith(_ENGINE_FLAG) and value is not None
    }


def plan_of(args: Namespace, *settings: str) -> Plan:
    """The plan that PLAN names, or the one of the cell flags.

    settings: further `KEY=VALUE`, after those of the user. UsageError where both or neither are
    given.
    """
    from benchsuite.report import spec
    from benchsuite.rules import plans

    fields = {name: getattr(args, f"cell_{name}") for name in CELL_FLAGS}
    given = [flag(name) for name, value in fields.items() if value is not None]
    if bool(args.plan) == bool(given):
        said = f"PLAN {args.plan!r} and {given[0]}" if given else "neither"
        raise UsageError(
            "give a PLAN (benchsuite list report) or a cell by flags (--workload cnn ...), not "
            f"{said}"
        )

    # After the user's `--set`, so that the shorter flag wins where both are given.
    cluster = [f"cluster={args.cluster}"] if args.cluster else []
    all_settings = [*args.set, *cluster, *settings]
    seeds = None if args.seeds is None else integers(args.seeds, "--seeds", "0,1,2")

    # Figures are parsed here too: a mistake in them would otherwise cost a night of runs.
    if args.plan:
        loaded = plans.load(args.plan, settings=all_settings, only=args.only, seeds=seeds)
        spec.parse(loaded.figures)  # now, rather than after everything has run
        return loaded

    return plans.from_flags(fields, settings=all_settings, only=args.only, seeds=seeds)


def examined_plan_of(args: Namespace) -> Plan:
    """`plan_of` with what this machine lacks among the refused.

    UsageError with rule and remedy where it is one cell of flags, and refused: whoever asks for one
    cell has no other answer to look at. Of several cells the others run.
    """
    from benchsuite.running import api

    plan = api.examined(plan_of(args))
    asked_by_flags = plan.path is None
    if asked_by_flags and not plan.cells and len(plan.refused) == 1:
        (refused,) = plan.refused
        raise UsageError(f"{refused.cell.label} is refused: {refused.reason}")

    return plan


def integers(text: str, flag: str, example: str) -> list[int]:
    """The numbers of `0,1,2`.

    flag and example are for the message of the UsageError.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{flag} {text!r}: give integers separated by commas, e.g. {example}"
        ) from error


def store_of(args: Namespace) -> Store:
    """The store in the folder of `--results`."""
    from benchsuite.results.store import Store

    return Store(args.results)
