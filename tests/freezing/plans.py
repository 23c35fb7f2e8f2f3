"""What a plan becomes: cells and their ids, refusals and their messages, bytes of every member."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

from tests.freezing.doors import ROOT, internal, lines_of, say
from tests.freezing.golden import Part

CHEAP_FORECASTS = ("quick", "reference", "rl")
# A global batch that 2, 3 and 4 workers divide, and few steps: bytes per step are what matters.
# Of all workloads the transformer starts fastest, and it is started twice for every cell.
STEPS = ("--set", "budget.steps=24")
SMALL = ("--workload", "transformer", "--set", "options.transformer.global_batch=24", *STEPS)


def cells() -> str:
    """Every cell of every plan with its id; the refused ones with rule, reason and remedy."""
    shown = []
    for path in sorted((ROOT / "reports").glob("*.toml")):
        plan = internal("plan.load")(str(path))
        shown.append(
            f"== {path.stem}: {len(plan.cells)} cells, {len(plan.refused)} refused, "
            f"{plan.num_excluded} excluded, seeds {', '.join(map(str, plan.seeds))}"
        )
        shown += [f"{cell.id}  {cell.label}" for cell in plan.cells]
        for refused in plan.refused:
            shown.append(f"refused  {refused.cell.id}  {refused.cell.label}")
            shown += [
                f"    [{each.rule}] {each.reason}: {each.remedy}" for each in refused.problems
            ]
        shown.append("")
    return "\n".join(shown)


def forecast(name: str) -> str:
    """`benchsuite plan NAME --json` over an empty results folder."""
    return lines_of(_forecast(name))


def strategies() -> str:
    """Every sync strategy over every topology; those of agents beside."""
    sync, topology = _names("sync"), _names("topology")
    agents = ("--workload", "rl_agent", *STEPS)
    few = ("--topology", "native,parameter_server", "--replicas", "2,3,4")
    grids = {
        "every strategy over every topology": (*SMALL, *sync, *topology, "--replicas", "2,3,4"),
        "every strategy with an agent": (*agents, *sync, *few),
    }
    return _bytes(grids)


def compressions() -> str:
    """Every compression over every topology, then under every strategy."""
    compression = (*SMALL, *_names("compression"))
    everywhere = ("--sync", "synchronous", *_names("topology"), "--replicas", "2,3,4")
    few = ("--topology", "native,parameter_server,exponential", "--replicas", "4")
    grids = {
        "every compression over every topology": (*compression, *everywhere),
        "every compression under every strategy": (*compression, *_names("sync"), *few),
    }
    return _bytes(grids)


def parallelisms() -> str:
    """Every division of a replica over every topology, then under every strategy."""
    parallel = (*SMALL, *_names("parallel"), "--model-parallel", "2")
    everywhere = ("--sync", "synchronous", *_names("topology"), "--replicas", "1,2,3,4")
    few = ("--topology", "native,ring,parameter_server", "--replicas", "1,2,4")
    grids = {
        "every parallelism over every topology": (*parallel, *everywhere),
        "every parallelism under every strategy": (*parallel, *_names("sync"), *few),
    }
    return _bytes(grids)


def _names(kind: str) -> tuple[str, str]:
    """The flag that asks for all members of an axis."""
    return f"--{kind}", ",".join(
        member["name"] for member in json.loads(say("list", kind, "--json"))[kind]
    )


def _forecast(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as empty:
        document: dict[str, Any] = json.loads(say("plan", *arguments, "--json", "--results", empty))
    return document


def _bytes(grids: Mapping[str, tuple[str, ...]]) -> str:
    """A line per cell: what it sends and keeps; then every refusal once, with its cells."""
    shown = []
    for title, arguments in grids.items():
        document = _forecast(*arguments)
        told: dict[str, list[str]] = {}
        for refused in document["refused"]:
            for each in refused["problems"]:
                message = f"[{each['rule']}] {each['reason']}: {each['remedy']}"
                told.setdefault(message, []).append(refused["label"])
        shown.append(
            f"== {title}: {len(document['cells'])} cells, {len(document['refused'])} refused"
        )
        shown += [_line(cell) for cell in document["cells"]]
        for message in sorted(told):
            shown += [f"refused {message}", f"    {', '.join(told[message])}"]
        shown.append("")
    return "\n".join(shown)


def _line(cell: Mapping[str, Any]) -> str:
    kept = cell["kept_bytes"]
    return (
        f"{cell['cell_id']}  {cell['label']}: sends {cell['predicted_bytes']} B "
        f"in {cell['predicted_messages']} messages, busiest port {cell['busiest_port_bytes']} B, "
        f"keeps {kept['worker']} B on a worker, {kept['server']} B on a server"
    )


def _forecasts() -> tuple[Part, ...]:
    names = sorted(path.stem for path in (ROOT / "reports").glob("*.toml"))
    return tuple(
        Part(
            f"plan-{name}",
            f"plan-{name}.json",
            partial(forecast, name),
            cheap=name in CHEAP_FORECASTS,
        )
        for name in names
    )


PARTS = (
    Part("cells", "cells.txt", cells, cheap=True),
    *_forecasts(),
    Part("bytes-strategies", "bytes-strategies.txt", strategies, cheap=True),
    Part("bytes-compressions", "bytes-compressions.txt", compressions),
    Part("bytes-parallelisms", "bytes-parallelisms.txt", parallelisms),
)
