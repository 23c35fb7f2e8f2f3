"""What goes with what: parallel x sync, sync x topology, compression x topology.

The members declare it (`benchsuite/plan/declared.py`); these rules compare what two of them say.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from benchsuite.plan import conditions, declared
from benchsuite.plan.cell import Cell
from benchsuite.rules.names import Names
from benchsuite.rules.view import Problem, Problems, View, names_of, one_of, topologies

PLACE = 0  # first: what no number mends
REDUCING = (declared.COLLECTIVE, declared.SERVER)


def parallel_and_sync(view: View) -> Problems:
    """Inside a model-parallel group forward and backward depend on each other."""
    if view.parallel.divides and not view.sync.model_parallel:
        allowed = names_of("sync", model_parallel=True)
        yield Problem(
            "parallel x sync",
            f"sync = {view.label('sync')} with parallel = {view.label('parallel')}: inside a "
            "model-parallel group forward and backward depend on each other, so it is synchronous "
            "by construction",
            f"set parallel = data, or sync to one of {', '.join(allowed)}",
        )


def sync_and_topology(view: View) -> Problems:
    """Each strategy's kind of topology."""
    sync = view.label("sync")
    topology = view.label("topology")
    needed = view.sync.topologies
    named = view.sync.needs_topology
    if needed and not view.is_over(needed):
        why = conditions.sentence(view.sync.topologies_why).said(Names(view, "sync"))
        yield Problem(
            "sync x topology",
            f"sync = {sync} over topology = {topology}: {why}",
            f"set topology to {one_of(topologies(needed))}",
        )
        return

    if not needed and view.topology.kind == declared.GRAPH and topology not in named:
        yield Problem(
            "sync x topology",
            f"sync = {sync} over topology = {topology}: {view.topology.called} is for strategies "
            "that ask for it",
            f"set topology to {one_of(topologies(REDUCING))}, or give the class needs_topology = "
            f'("{topology}",)',
        )

    if named and topology not in named:
        yield Problem(
            "sync x topology",
            f"sync = {sync} over topology = {topology}: its class says needs_topology = "
            f"{one_of(named)}",
            f"set topology to {one_of(named)}",
        )


def rank_placement(view: View) -> Problems:
    """Only a replica that several ranks hold has parts to place."""
    placement = view.cell.rank_placement
    if not view.parallel.divides and placement != Cell.rank_placement:
        yield Problem(
            "rank placement",
            f"rank_placement = {placement} with parallel = {view.label('parallel')}: a replica is "
            "one rank, there are no parts to place",
            "set rank_placement = replica_major, or parallel to one of "
            + ", ".join(names_of("parallel", divides=True)),
        )


def compression(view: View) -> Problems:
    """What may be put on which wire."""
    label = view.label("compression")
    sync = view.label("sync")
    if view.cell.compression == "none":
        return
    if view.sync.refuses_compression:
        yield Problem(
            "compression",
            f"compression = {label}: {view.sync.refuses_compression}, nothing to compress",
            "set compression = none",
        )
        return

    travels_over = view.compression.travels_over
    if travels_over and not view.is_over(travels_over):
        yield Problem(
            "compression x topology",
            f"compression = {label} over topology = {view.label('topology')}: "
            f"{view.compression.travels_why}",
            _where_it_travels(view),
        )

    taken = view.sync.compressions
    if taken and (view.file("compression").given_by_path or label not in taken):
        yield Problem(
            "compression x sync",
            f"compression = {label} with sync = {sync}: {view.sync.compressions_why}",
            f"set compression to {one_of(taken)}, or sync = {Cell.sync}",
        )

    if view.parallel.divides and view.cell.replicas == 1:
        yield Problem(
            "compression x parallel",
            f"compression = {label} with parallel = {view.label('parallel')} and replicas = 1: "
            "only traffic between replicas is compressed, never that inside one",
            "set compression = none, or replicas to at least 2",
        )


def _where_it_travels(view: View) -> str:
    """A topology that the strategy takes and the compression too."""
    taken = topologies(view.sync.topologies or REDUCING)
    compressed = topologies(view.sync.compresses_over)
    travels = topologies(view.compression.travels_over)
    both = tuple(name for name in travels if name in taken and name in compressed)
    if not both:
        return "set compression = none"
    return f"set topology to {one_of(both)}, or compression = none"


def muon(view: View) -> Problems:
    """Muon orthogonalises whole matrices: no rank may hold only a slice of one."""
    if view.option("workload", "optimizer") != "muon":
        return

    slices = {"topology": view.has_servers, "parallel": view.parallel.holds_slices}

    for axis, holds_slices in slices.items():
        if holds_slices:
            yield Problem(
                "muon",
                f"optimizer = muon with {axis} = {view.label(axis)}: it needs whole matrices, and "
                "a rank holds a slice",
                f"set another optimizer, or {axis} = {getattr(Cell, axis)}",
            )


RULES: tuple[Callable[[View], Problems], ...] = (
    parallel_and_sync,
    sync_and_topology,
    rank_placement,
    compression,
    muon,
)
