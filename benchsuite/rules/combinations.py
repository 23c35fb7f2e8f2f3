"""What goes with what: parallel x sync, sync x topology, compression, what a plug-in asks for
itself. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from benchsuite.rules.view import Problem, Problems, View

COLLECTIVES = ("native", "ring", "halving_doubling", "tree", "direct", "hierarchical")
SERVER = ("parameter_server",)
REDUCING = (*COLLECTIVES, *SERVER)
GRAPHS = ("ring_neighbours", "exponential", "random_matching")
MODEL_PARALLEL = ("pipeline", "tensor", "fsdp")
# On the replica axis of a model-parallel group; all other strategies need `data`.
SYNC_WITH_MODEL_PARALLEL = ("synchronous", "local_sgd", "diloco", "elastic_averaging")


@dataclass(frozen=True)
class Needs:
    """The topologies that a strategy takes; `own`: whether a user's topology may be one of them."""

    topologies: tuple[str, ...]
    why: str
    own: bool = False


_ONE_STEP = "a ring is a collective: every rank must enter the same step"
_ANSWERED = Needs(SERVER, f"workers are answered one by one; {_ONE_STEP}")
_REDUCES = Needs(
    REDUCING, "every replica's vector enters one mean; a gossip graph has no such mean", own=True
)
_BY_DEFINITION = "its communication is its own, topology = native by definition"

TOPOLOGY_OF: Mapping[str, Needs] = MappingProxyType(
    {
        "synchronous": _REDUCES,
        "local_sgd": _REDUCES,
        "diloco": _REDUCES,
        "elastic_averaging": _REDUCES,
        "asynchronous": _ANSWERED,
        "stale_synchronous": _ANSWERED,
        "k_sync": _ANSWERED,
        "actor_learner": Needs(
            SERVER, "the learner is the server, actors push their trajectories to it"
        ),
        "delayed": Needs(
            COLLECTIVES, "the mean of step k-1 travels during step k, on every rank alike", own=True
        ),
        "gossip": Needs(GRAPHS, "it mixes with the neighbours of a graph", own=True),
        "hogwild": Needs(("native",), f"it works on shared memory: {_BY_DEFINITION}"),
        "ddp": Needs(
            ("native",), f"DistributedDataParallel calls the backend itself: {_BY_DEFINITION}"
        ),
    }
)

_NOT_SPARSE = (
    "a sum of k-sparse (or 1-bit) vectors is not k-sparse (or 1-bit): it needs an "
    "all-gather or a push"
)
COMPRESSION_ON: Mapping[str, Needs] = MappingProxyType(
    {
        "powersgd": Needs(
            COLLECTIVES, "its low-rank factors are summed by all-reduce, not on a server", own=True
        ),
        "topk": Needs(("native", *SERVER, *GRAPHS), _NOT_SPARSE, own=True),
        "sign": Needs(("native", *SERVER, *GRAPHS), _NOT_SPARSE, own=True),
        "ef_sign": Needs(("native", *SERVER, *GRAPHS), _NOT_SPARSE, own=True),
        "int8": Needs(
            ("direct", *SERVER, *GRAPHS), "int8 is never summed in int8 (100 + 100 = -56)", own=True
        ),
    }
)
DDP_HOOKS = ("none", "fp16", "bf16", "powersgd")
WITHOUT_COMPRESSION: Mapping[str, str] = MappingProxyType(
    {
        "hogwild": "hogwild puts 0 bytes on the wire",
        "actor_learner": "actor_learner exchanges trajectories and whole parameters with its "
        "learner",
    }
)


def parallel_and_sync(view: View) -> Problems:
    """Inside a model-parallel group forward and backward depend on each other."""
    sync = view.label("sync")
    parallel = view.label("parallel")
    if view.name("parallel") in MODEL_PARALLEL and not view.is_one_of(
        "sync", SYNC_WITH_MODEL_PARALLEL, own=True
    ):
        yield Problem(
            "parallel x sync",
            f"sync = {sync} with parallel = {parallel}: inside a model-parallel group forward and "
            "backward depend on "
            "each other, so it is synchronous by construction",
            f"set parallel = data, or sync to one of {', '.join(SYNC_WITH_MODEL_PARALLEL)}",
        )


def sync_and_topology(view: View) -> Problems:
    """Each strategy's kind of topology."""
    needs = TOPOLOGY_OF.get(view.name("sync"))
    sync = view.label("sync")
    topology = view.label("topology")
    if needs is not None and not view.is_one_of("topology", needs.topologies, own=needs.own):
        yield Problem(
            "sync x topology",
            f"sync = {sync} over topology = {topology}: {needs.why}",
            f"set topology to {_one_of(needs.topologies)}",
        )
        return
    if needs is None and view.name("topology") in GRAPHS and not _asks(view, view.name("topology")):
        yield Problem(
            "sync x topology",
            f"sync = {sync} over topology = {topology}: a gossip graph is for strategies that ask "
            "for it",
            f"set topology to {_one_of(REDUCING)}, or give the class needs_topology = "
            f'("{topology}",)',
        )
    asked = view.constant("sync", "needs_topology")
    if asked:
        allowed = (asked,) if isinstance(asked, str) else tuple(asked)
        if topology not in allowed:
            yield Problem(
                "sync x topology",
                f"sync = {sync} over topology = {topology}: its class says needs_topology = "
                f"{_one_of(allowed)}",
                f"set topology to {_one_of(allowed)}",
            )


def divided(view: View) -> Problems:
    """Replicas that several ranks hold: what strategies and placements mean for them."""
    cell = view.cell
    parallel = view.label("parallel")
    if view.name("parallel") not in MODEL_PARALLEL:
        if cell.rank_placement != "replica_major":
            yield Problem(
                "rank placement",
                f"rank_placement = {cell.rank_placement} with parallel = {parallel}: a replica is "
                "one rank, there are "
                "no parts to place",
                "set rank_placement = replica_major, or parallel to one of "
                + ", ".join(MODEL_PARALLEL),
            )
        return
    if view.name("sync") == "elastic_averaging" and view.name("topology") in SERVER:
        yield Problem(
            "parallel x sync",
            f"sync = {view.label('sync')} over topology = {view.label('topology')} with parallel = "
            f"{parallel}: batches "
            "are handed out to single ranks, and the parts of a replica work on one batch together",
            "set topology to a collective",
        )
    bucket_mib = view.number("sync", "bucket_mib") if view.name("sync") == "synchronous" else None
    if bucket_mib:
        yield Problem(
            "buckets",
            f"bucket_mib = {bucket_mib:g} with parallel = {parallel}: the library's backward pass "
            "does not say which "
            "slices of the gradient are final",
            "set bucket_mib = 0, or parallel = data",
        )


def momentum(view: View) -> Problems:
    """Vectors that a policy keeps between pushes belong to one thread."""
    own = view.option("sync", "momentum")
    if view.name("sync") != "asynchronous" or own not in ("per_worker", "dana"):
        return
    optimizer = view.option("workload", "optimizer")
    if optimizer in ("adam", "adamw"):
        yield Problem(
            "momentum",
            f"momentum = {own} of asynchronous with optimizer = {optimizer} of "
            f"{view.label('workload')}: it is the "
            "momentum of SGD that is kept per worker",
            "set another optimizer, or momentum = shared",
        )
    if view.option("sync", "lock") == "none":
        yield Problem(
            "momentum",
            f"momentum = {own} with lock = none: threads without a lock would add to one another's "
            "momentum vectors",
            "set lock = exclusive, or momentum = shared",
        )
    if view.number("workload", "momentum") == 0:
        yield Problem(
            "momentum",
            f"momentum = {own} of asynchronous with momentum = 0 of {view.label('workload')}: "
            "there is none to keep",
            f"set options.{view.label('workload')}.momentum = 0.9, or momentum = shared",
        )


def hogwild(view: View) -> Problems:
    """Shared memory of one host."""
    if view.name("sync") != "hogwild":
        return
    if view.cell.hosts != 1:
        yield Problem(
            "hogwild",
            f"hosts = {view.cell.hosts} with sync = hogwild: parameters lie in one host's shared "
            "memory",
            "set hosts = 1",
        )
    if view.cell.device != "cpu":
        yield Problem(
            "hogwild",
            f"device = {view.cell.device} with sync = hogwild: its parameters lie in CPU shared "
            "memory",
            "set device = cpu",
        )


def compression(view: View) -> Problems:
    """What may be put on which wire."""
    name = view.name("compression")
    label = view.label("compression")
    sync = view.name("sync")
    topology = view.label("topology")
    if name == "none":
        return
    if sync in WITHOUT_COMPRESSION:
        yield Problem(
            "compression",
            f"compression = {label}: {WITHOUT_COMPRESSION[sync]}, nothing to compress",
            "set compression = none",
        )
        return
    needs = COMPRESSION_ON.get(name)
    if needs is not None and not view.is_one_of("topology", needs.topologies, own=needs.own):
        yield Problem(
            "compression x topology",
            f"compression = {label} over topology = {topology}: {needs.why}",
            _where_it_travels(view, needs),
        )
    if name == "sign" and not view.is_one_of("sync", ("synchronous",), own=True):
        yield Problem(
            "compression x sync",
            f"compression = sign with sync = {view.label('sync')}: a majority vote needs all votes "
            "of a step",
            "set sync = synchronous, or compression = ef_sign",
        )
    if sync == "ddp" and name not in DDP_HOOKS:
        yield Problem(
            "compression x sync",
            f"compression = {label} with sync = ddp: it has no communication hook for it",
            f"set compression to {_one_of(DDP_HOOKS)}, or sync = synchronous",
        )
    if view.name("parallel") in MODEL_PARALLEL and view.cell.replicas == 1:
        yield Problem(
            "compression x parallel",
            f"compression = {label} with parallel = {view.label('parallel')} and replicas = 1: "
            "only traffic between "
            "replicas is compressed, never that inside one",
            "set compression = none, or replicas to at least 2",
        )


def _where_it_travels(view: View, needs: Needs) -> str:
    """A topology that the strategy takes and the compression too."""
    taken = TOPOLOGY_OF.get(view.name("sync"), _REDUCES).topologies
    both = tuple(name for name in needs.topologies if name in taken)
    if view.name("sync") == "elastic_averaging":  # over a server it pushes parameters
        both = tuple(name for name in both if name not in SERVER)
    return (
        f"set topology to {_one_of(both)}, or compression = none"
        if both
        else "set compression = none"
    )


def muon(view: View) -> Problems:
    """Muon orthogonalises whole matrices: no rank may hold only a slice of one."""
    if view.option("workload", "optimizer") != "muon":
        return
    for axis, names in (("topology", SERVER), ("parallel", ("fsdp", "tensor"))):
        if view.name(axis) in names:
            yield Problem(
                "muon",
                f"optimizer = muon with {axis} = {view.label(axis)}: it needs whole matrices, and "
                "a rank holds a slice",
                f"set another optimizer, or {axis} = {'native' if axis == 'topology' else 'data'}",
            )


def _asks(view: View, topology: str) -> bool:
    asked = view.constant("sync", "needs_topology") or ()
    return topology == asked or topology in tuple(asked)


def _one_of(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else "one of " + ", ".join(names)


RULES: tuple[Callable[[View], Problems], ...] = (
    parallel_and_sync,
    sync_and_topology,
    divided,
    momentum,
    hogwild,
    compression,
    muon,
)
