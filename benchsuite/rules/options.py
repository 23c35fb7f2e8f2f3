"""The rules on options of strategies and compressions: their ranges, and what goes with what. No
torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import PurePath

from benchsuite.rules.combinations import SERVER
from benchsuite.rules.view import Problem, Problems, View

# They keep what was not sent for the next vector.
WITH_FEEDBACK = ("topk", "ef_sign", "powersgd")
OUTER_BITS_ON = ("native", "direct", *SERVER)
SYMBOLS_OF = {
    "markov": 8,
    "text": 256,
    "stdlib": 256,
}  # data of the transformer; random symbols are any number
MODEL_OF = {"cifar10": "resnet18", "imagenet": "resnet50"}  # data of the cnn
FROM_A_PATH = {"text": "file", "cifar10": "folder", "imagenet": "folder"}


def compressions(view: View) -> Problems:
    """How much of a vector travels."""
    rho = view.number("compression", "rho") if view.name("compression") == "topk" else None
    if rho is not None and not 0 < rho <= 1:
        yield Problem(
            "topk",
            f"rho = {rho:g}: the share of the elements that travels, 0 < rho <= 1",
            "set rho = 0.01, or 1 for all of them",
        )
    rank = view.number("compression", "rank") if view.name("compression") == "powersgd" else None
    if rank is not None and rank < 1:
        yield Problem(
            "powersgd", f"rank = {rank:g}: a factor has 1 column or more", "set rank = 1, 2 or 4"
        )


def what_is_compressed(view: View) -> Problems:
    """Gradients and differences are, and a residual is added to the next vector of its kind."""
    name = view.name("compression")
    label = view.label("compression")
    sync = view.name("sync")
    if name == "none":
        return
    if sync == "elastic_averaging" and view.name("topology") in SERVER:
        yield Problem(
            "compression x sync",
            f"compression = {label} with sync = elastic_averaging over topology = "
            f"{view.label('topology')}: it pushes "
            "parameters; a compression acts on gradients or differences",
            "set topology to a collective, or compression = none",
        )
    if sync == "local_sgd" and view.option("sync", "momentum") == "averaged":
        yield Problem(
            "compression x sync",
            f"compression = {label} with momentum = averaged of local_sgd: momentum is no "
            "difference",
            "set momentum = local or reset, or compression = none",
        )
    warmup = view.number("sync", "warmup_steps") if sync == "local_sgd" else None
    if warmup and name in WITH_FEEDBACK:
        yield Problem(
            "compression x sync",
            f"compression = {label} with warmup_steps = {warmup:g} of local_sgd: what the "
            "gradients left over would be "
            "added to differences of parameters",
            "set warmup_steps = 0, or compression to one without error feedback: fp16, bf16, int8",
        )
    if sync == "ddp" and (view.number("sync", "local_steps") or 1) > 1:
        yield Problem(
            "compression x sync",
            f"compression = {label} with local_steps = {view.number('sync', 'local_steps'):g} of "
            "ddp: it takes one "
            "hook, of a compression or of local steps",
            "set local_steps = 1, or compression = none",
        )
    if sync == "synchronous" and (view.number("sync", "bucket_mib") or 0) > 0:
        yield Problem(
            "compression x sync",
            f"compression = {label} with bucket_mib = {view.number('sync', 'bucket_mib'):g} of "
            "synchronous: buckets "
            "travel as they are",
            "set bucket_mib = 0, or compression = none",
        )
    if sync == "diloco" and (view.number("sync", "fragments") or 1) > 1:
        yield Problem(
            "compression x sync",
            f"compression = {label} with fragments = {view.number('sync', 'fragments'):g} of "
            "diloco: it acts on whole "
            "vectors",
            "set fragments = 1, or outer_bits = 8 or 4 and compression = none",
        )
    if sync == "diloco" and view.number("sync", "outer_bits"):
        yield Problem(
            "compression x sync",
            f"compression = {label} with outer_bits = {view.number('sync', 'outer_bits'):g} of "
            "diloco: both act on "
            "the outer gradient",
            "set outer_bits = 0, or compression = none",
        )


def buckets(view: View) -> Problems:
    """Buckets travel over a collective."""
    mib = view.number("sync", "bucket_mib") if view.name("sync") == "synchronous" else None
    if mib is None:
        return
    if not 0 <= mib < math.inf:
        yield Problem(
            "buckets",
            f"bucket_mib = {mib:g}: MiB of a bucket, or 0 for the whole gradient at once",
            "set bucket_mib = 0, or e.g. 25",
        )
    elif mib and view.name("topology") in SERVER:
        yield Problem(
            "buckets",
            f"bucket_mib = {mib:g} with topology = {view.label('topology')}: a push is whole, and "
            "a server steps "
            "once for it",
            "set bucket_mib = 0, or topology to a collective",
        )


def outer_step(view: View) -> Problems:
    """The outer optimiser of diloco is an SGD that moves and comes to rest."""
    if view.name("sync") != "diloco":
        return
    lr = view.number("sync", "outer_lr")
    momentum = view.number("sync", "outer_momentum")
    if lr is not None and not 0 < lr < math.inf:
        yield Problem("outer step", f"outer_lr = {lr:g}: a number above 0", "set outer_lr = 0.7")
    if momentum is not None and not 0 <= momentum < 1:
        yield Problem(
            "outer step",
            f"outer_momentum = {momentum:g}: 0 <= outer_momentum < 1",
            "set it to 0.9, or 0",
        )
    bits = view.number("sync", "outer_bits")
    topology = view.label("topology")
    if bits and not view.is_one_of("topology", OUTER_BITS_ON, own=True):
        yield Problem(
            "outer bits",
            f"outer_bits = {bits:g} over topology = {topology}: levels are never summed (100 + 100 "
            "= -56)",
            f"set topology to one of {', '.join(OUTER_BITS_ON)}, or outer_bits = 0",
        )


def clocks(view: View) -> Problems:
    """Means of a clock wait for all, however far ahead some are: they must be bounded."""
    if view.name("sync") != "stale_synchronous":
        return
    if view.number("sync", "slack") == -1 and view.option("sync", "apply") == "per_clock":
        yield Problem(
            "slack",
            "slack = -1 with apply = per_clock: without a bound a server would keep any number of "
            "clocks",
            "set slack = 0 or more, or apply = per_push",
        )


def consensus(view: View) -> Problems:
    """A share of the way to the neighbours."""
    rate = view.number("sync", "consensus_rate") if view.name("sync") == "gossip" else None
    if rate is not None and not 0 < rate <= 1:
        yield Problem(
            "consensus rate",
            f"consensus_rate = {rate:g}: 0 < consensus_rate <= 1 is needed",
            "set consensus_rate = 1",
        )


def workloads(view: View) -> Problems:
    """Heads divide the width; data have their symbols, their model, their place."""
    label = view.label("workload")
    data = view.option("workload", "data")
    path = view.option("workload", "path")
    width, heads, symbols = (
        view.number("workload", name) for name in ("width", "heads", "symbols")
    )
    if width is not None and heads is not None and (heads < 1 or width % heads):
        yield Problem(
            "heads",
            f"width({width:g}) is not a multiple of heads({heads:g}): each head has as many "
            "elements",
            f"set options.{label}.heads to a divisor of {width:g}",
        )
    known = SYMBOLS_OF.get(str(data)) if view.name("workload") == "transformer" else None
    if known is not None and symbols != known:
        yield Problem(
            "symbols",
            f"symbols = {symbols:g} with data = {data}, which has {known}",
            f"set options.{label}.symbols = {known}",
        )
    model = view.option("workload", "model")
    needed = MODEL_OF.get(str(data))
    if view.name("workload") == "cnn" and needed is not None and model != needed:
        yield Problem(
            "data",
            f"data = {data} with model = {model}: its images and classes are those of {needed}",
            f"set options.{label}.model = {needed}",
        )
    if (
        path is not None
        and data in FROM_A_PATH
        and not (str(path)[:1] == "~" or PurePath(path).is_absolute())
    ):
        yield Problem(
            "path",
            f"path = {path!r} with data = {data}: ranks stand in folders of their own, and need "
            "its whole path",
            f"set options.{label}.path to the {FROM_A_PATH[data]}, e.g. "
            f"/home/me/{FROM_A_PATH[data]}",
        )


# The least value of a workload's option, of whatever workload.
LEAST = {
    "width": 1,
    "blocks": 1,
    "context": 2,
    "clip_norm": 0,
    "weight_decay": 0,
    "lr_batch": 0,
    "num_environments": 1,
    "num_actions": 2,
    "evaluate_every": 1,
}
ABOVE_ZERO = ("lr", "clip_ratio", "reward_scale")


def bounds(view: View) -> Problems:
    """Numbers of a workload that train something."""
    label = view.label("workload")
    for names, least in ((LEAST, "{0} or more"), (ABOVE_ZERO, "a number above 0")):
        for name in names:
            value = view.number("workload", name)
            if value is None or (value >= LEAST[name] if name in LEAST else value > 0):
                continue
            needed = least.format(LEAST.get(name, 0))
            where = f"options.{label}.{name}"
            yield Problem(
                "bounds", f"{name} = {value:g} of {label}: {needed}", f"set {where} to {needed}"
            )
    width, heads = (view.number("workload", name) for name in ("width", "heads"))
    if (
        view.option("workload", "positions") == "rope"
        and width
        and heads
        and heads >= 1
        and (width // heads) % 2
    ):
        yield Problem(
            "heads",
            f"width({width:g}) / heads({heads:g}) = {width // heads:g} is odd with positions = "
            "rope, which turns pairs",
            f"set options.{label}.heads so that each has an even number, or positions = learned",
        )
    actions = view.number("workload", "num_actions")
    if view.option("workload", "environment") == "cartpole" and actions is not None and actions > 2:
        yield Problem(
            "bounds",
            f"num_actions = {actions:g} with environment = cartpole, which has 2: left and right",
            f"set options.{label}.num_actions = 2",
        )


RULES: tuple[Callable[[View], Problems], ...] = (
    compressions,
    what_is_compressed,
    buckets,
    outer_step,
    clocks,
    consensus,
    workloads,
    bounds,
)
