"""The members that the design knows, those without a file in this version included. Imports no
torch.

What has a file is found by `plugins`. What is named here and has none yet resolves all the same
(its options as they are given), so that `rules.validate` can answer "known, but not built" instead
of "unknown". A name that is neither is a UsageError.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from benchsuite.plan import plugins
from benchsuite.plan.plugins import PluginError

# STRATEGIES.md section 1, CLUSTER.md section 1.
KNOWN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "workload": ("cnn", "transformer", "rl_agent", "mlp"),
        "parallel": ("data", "pipeline", "tensor", "fsdp"),
        "sync": (
            "synchronous",
            "asynchronous",
            "stale_synchronous",
            "k_sync",
            "local_sgd",
            "diloco",
            "elastic_averaging",
            "gossip",
            "hogwild",
            "delayed",
            "actor_learner",
            "ddp",
        ),
        "topology": (
            "native",
            "ring",
            "halving_doubling",
            "tree",
            "direct",
            "hierarchical",
            "parameter_server",
            "ring_neighbours",
            "exponential",
            "random_matching",
        ),
        "compression": ("none", "fp16", "bf16", "topk", "powersgd", "sign", "ef_sign", "int8"),
        "cluster": ("local", "torchrun", "namespaces", "slurm", "mpirun", "kubernetes"),
    }
)

# Started by the user's own command, so no file under cluster/ is needed for them to work.
WITHOUT_FILE = ("local", "torchrun")


def find(kind: str, reference: str) -> plugins.Plugin | None:
    """The member's file; None where the name is planned and has none. PluginError where nobody
    knows it."""
    if _planned(kind, reference):
        return None
    try:
        return plugins.find(kind, reference)
    except PluginError:
        if plugins.is_path(reference):
            raise
        known = list(dict.fromkeys([*plugins.names(kind), *KNOWN[kind]]))
        raise PluginError(plugins.unknown(kind, reference, known)) from None


def is_built(kind: str, reference: str) -> bool:
    """Whether this version has the member. A path is built by its owner."""
    if kind == "cluster" and reference in WITHOUT_FILE:
        return True
    return not _planned(kind, reference)


@lru_cache(maxsize=1024)
def _planned(kind: str, reference: str) -> bool:
    return reference in KNOWN[kind] and not (plugins.KINDS[kind][0] / f"{reference}.py").is_file()
