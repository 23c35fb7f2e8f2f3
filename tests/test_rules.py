"""Every rule refuses its case, and the allowed twin beside it passes."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from pathlib import Path

import pytest

from benchsuite import rules
from benchsuite.errors import UsageError
from benchsuite.laws.harness.cases import TINY  # global batch 24, 9 layers
from benchsuite.plan import declared, plugins
from benchsuite.plan.cell import AXES, Budget, Cell, resolve
from benchsuite.rules import Machine, Problem, validate
from benchsuite.rules.view import topologies

SERVER = {"topology": "parameter_server"}
VIRTUAL = {"clock": "virtual"}
FAULT = {"rank": 1, "phase": "compute", "step": 3, "signal": "SIGKILL"}
SMALL = {
    "options": {"cnn": {"global_batch": 8}},
    "batch_mode": "fixed_per_worker",
    "budget": Budget(steps=2),
}
MANY = {
    "workload": "mlp",
    "topology": "parameter_server",
    "batch_mode": "fixed_per_worker",
    **VIRTUAL,
}


def staged(stages: int, *, tiny: dict | None = None, **options) -> dict:
    """Fields of a pipeline."""
    return {
        "parallel": "pipeline",
        "model_parallel": stages,
        "options": {"pipeline": options, **({"tiny": tiny} if tiny else {})},
    }


def problems(**fields) -> list[Problem]:
    """Of the cell as it is written and, the same ones, of the resolved cell."""
    cell = Cell(**fields)
    found = validate(cell)
    try:
        resolved = resolve(cell)
    except UsageError:  # e.g. an option value that comes with a later version
        return found
    assert [p.rule for p in validate(resolved)] == [p.rule for p in found]
    return found


# rule, words of the reason, refused, allowed twin
CASES = [
    # parallel x sync
    (
        "parallel x sync",
        "synchronous by construction",
        {"sync": "asynchronous", **SERVER, "parallel": "pipeline"},
        {"sync": "asynchronous", **SERVER},
    ),
    (
        "parallel x sync",
        "parallel = tensor",
        {"sync": "gossip", "topology": "exponential", "parallel": "tensor"},
        {"sync": "gossip", "topology": "exponential"},
    ),
    (
        "parallel x sync",
        "parallel = fsdp",
        {"sync": "ddp", "parallel": "fsdp"},
        {"sync": "local_sgd", "parallel": "fsdp"},
    ),
    (
        "parallel x sync",
        "hogwild",
        {"sync": "hogwild", "parallel": "tensor"},
        {"sync": "diloco", "parallel": "tensor"},
    ),
    (
        "parallel x sync",
        "delayed",
        {"sync": "delayed", "parallel": "pipeline"},
        {"sync": "elastic_averaging", "parallel": "pipeline"},
    ),
    (
        "parallel x sync",
        "batches are handed out to single ranks",
        {"sync": "elastic_averaging", **SERVER, "parallel": "pipeline"},
        {"sync": "elastic_averaging", "parallel": "pipeline"},
    ),
    (
        "bounds",
        "clip_norm = -1",
        {"workload": "transformer", "options": {"transformer": {"clip_norm": -1.0}}},
        {"workload": "transformer", "options": {"transformer": {"clip_norm": 0.0}}},
    ),
    (
        "bounds",
        "num_actions = 5 with environment = cartpole",
        {"workload": "rl_agent", "options": {"rl_agent": {"num_actions": 5}}},
        {"workload": "rl_agent"},
    ),
    (
        "bounds",
        "context = 1",
        {"workload": "transformer", "options": {"transformer": {"context": 1}}},
        {"workload": "transformer", "options": {"transformer": {"context": 2}}},
    ),
    (
        "heads",
        "is odd with positions = rope",
        {"workload": "transformer", "options": {"transformer": {"heads": 64}}},
        {"workload": "transformer", "options": {"transformer": {"heads": 32}}},
    ),
    (
        "stages",
        "layers(3) < stages(4)",
        {
            "workload": "transformer",
            "parallel": "pipeline",
            "model_parallel": 4,
            "options": {"transformer": {"blocks": 1}},
        },
        {
            "workload": "transformer",
            "parallel": "pipeline",
            "model_parallel": 4,
            "options": {"transformer": {"blocks": 2}},
        },
    ),
    (
        "rank placement",
        "there are no parts to place",
        {"rank_placement": "part_major"},
        {"rank_placement": "part_major", "parallel": "fsdp"},
    ),
    (
        "buckets",
        "does not say which slices of the gradient are final",
        {"parallel": "fsdp", "options": {"synchronous": {"bucket_mib": 25.0}}},
        {"parallel": "fsdp"},
    ),
    # sync x topology
    (
        "sync x topology",
        "a ring is a collective: every rank must enter the same step",
        {"sync": "asynchronous", "topology": "ring"},
        {"sync": "asynchronous", **SERVER},
    ),
    (
        "sync x topology",
        "stale_synchronous",
        {"sync": "stale_synchronous"},
        {"sync": "stale_synchronous", **SERVER},
    ),
    (
        "sync x topology",
        "k_sync",
        {"sync": "k_sync", "topology": "direct", "replicas": 2},
        {"sync": "k_sync", **SERVER, "replicas": 2},
    ),
    ("sync x topology", "no such mean", {"topology": "exponential"}, {"topology": "tree"}),
    (
        "sync x topology",
        "no such mean",
        {"sync": "local_sgd", "topology": "ring_neighbours"},
        {"sync": "local_sgd", **SERVER},
    ),
    (
        "sync x topology",
        "no such mean",
        {"sync": "diloco", "topology": "exponential"},
        {"sync": "diloco", "topology": "hierarchical"},
    ),
    (
        "sync x topology",
        "no such mean",
        {"sync": "elastic_averaging", "topology": "exponential"},
        {"sync": "elastic_averaging", **SERVER},
    ),
    (
        "sync x topology",
        "delayed",
        {"sync": "delayed", **SERVER},
        {"sync": "delayed", "topology": "halving_doubling"},
    ),
    (
        "sync x topology",
        "neighbours of a graph",
        {"sync": "gossip", "topology": "ring"},
        {"sync": "gossip", "topology": "ring_neighbours"},
    ),
    (
        "sync x topology",
        "native by definition",
        {"sync": "hogwild", "topology": "ring"},
        {"sync": "hogwild"},
    ),
    ("sync x topology", "native by definition", {"sync": "ddp", **SERVER}, {"sync": "ddp"}),
    (
        "sync x topology",
        "the learner is the server",
        {"sync": "actor_learner", "workload": "rl_agent"},
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER},
    ),
    # actor_learner, hogwild
    (
        "actor_learner",
        "workload = cnn",
        {"sync": "actor_learner", **SERVER},
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER},
    ),
    (
        "actor_learner",
        "servers = 2",
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER, "servers": 2},
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER, "servers": 1},
    ),
    (
        "actor_learner",
        "num_micro_batches = 2",
        {
            "sync": "actor_learner",
            "workload": "rl_agent",
            **SERVER,
            "options": {"data": {"num_micro_batches": 2}},
        },
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER},
    ),
    *[
        (
            "trajectories",
            reason,
            {
                "sync": "actor_learner",
                "workload": "rl_agent",
                **SERVER,
                "options": {"actor_learner": options},
            },
            {"sync": "actor_learner", "workload": "rl_agent", **SERVER},
        )
        for reason, options in (
            ("ahead = -1", {"ahead": -1}),
            ("steps_per_trajectory = 0", {"steps_per_trajectory": 0}),
            ("batches_per_trajectory = 0", {"batches_per_trajectory": 0}),
            ("is not divisible by batches_per_trajectory(7)", {"batches_per_trajectory": 7}),
        )
    ],
    (
        "parallel x sync",
        "actor_learner",
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER, "parallel": "fsdp"},
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER},
    ),
    (
        "hogwild",
        "hosts = 2",
        {"sync": "hogwild", "replicas": 2, "hosts": 2, "cluster": "torchrun"},
        {"sync": "hogwild", "replicas": 2, "cluster": "torchrun"},
    ),
    (
        "hogwild",
        "device = cuda",
        {"sync": "hogwild", "device": "cuda"},
        {"sync": "hogwild", "device": "cpu"},
    ),
    # compression
    (
        "compression",
        "0 bytes on the wire",
        {"sync": "hogwild", "compression": "fp16"},
        {"sync": "hogwild"},
    ),
    (
        "compression",
        "learner",
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER, "compression": "bf16"},
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER},
    ),
    (
        "compression x topology",
        "not on a server",
        {**SERVER, "compression": "powersgd"},
        {"topology": "ring", "compression": "powersgd"},
    ),
    (
        "compression x topology",
        "powersgd",
        {"sync": "gossip", "topology": "exponential", "compression": "powersgd"},
        {"sync": "gossip", "topology": "exponential", "compression": "topk"},
    ),
    *[
        (
            "compression x topology",
            "is not k-sparse",
            {"topology": topology, "compression": compression},
            {"topology": allowed, "compression": compression},
        )
        for compression in ("topk", "sign", "ef_sign")
        for topology, allowed in (
            ("ring", "native"),
            ("tree", "parameter_server"),
            ("halving_doubling", "native"),
        )
    ],
    *[
        (
            "compression x topology",
            "100 + 100 = -56",
            {"topology": topology, "compression": "int8"},
            {"topology": allowed, "compression": "int8"},
        )
        for topology, allowed in (
            ("ring", "direct"),
            ("native", "parameter_server"),
            ("hierarchical", "direct"),
        )
    ],
    (
        "compression x sync",
        "majority vote",
        {"sync": "asynchronous", **SERVER, "compression": "sign"},
        {"sync": "asynchronous", **SERVER, "compression": "ef_sign"},
    ),
    (
        "compression x sync",
        "hook",
        {"sync": "ddp", "compression": "topk"},
        {"sync": "ddp", "compression": "powersgd"},
    ),
    *[
        (
            "compression x parallel",
            "inside one",
            {"parallel": parallel, "compression": "fp16"},
            {"parallel": parallel, "compression": "fp16", "replicas": 2},
        )
        for parallel in ("fsdp", "tensor", "pipeline")
    ],
    *[
        (
            "topk",
            f"rho = {rho:g}",
            {"compression": "topk", "options": {"topk": {"rho": rho}}},
            {"compression": "topk", "options": {"topk": {"rho": allowed}}},
        )
        for rho, allowed in ((0.0, 1e-6), (1.5, 1.0))
    ],
    (
        "powersgd",
        "rank = 0",
        {"compression": "powersgd", "options": {"powersgd": {"rank": 0}}},
        {"compression": "powersgd", "options": {"powersgd": {"rank": 1}}},
    ),
    (
        "compression x sync",
        "it pushes parameters",
        {"sync": "elastic_averaging", **SERVER, "compression": "fp16"},
        {"sync": "elastic_averaging", "topology": "ring", "compression": "fp16"},
    ),
    (
        "compression x sync",
        "momentum is no difference",
        {
            "sync": "local_sgd",
            "compression": "fp16",
            "options": {"local_sgd": {"momentum": "averaged"}},
        },
        {
            "sync": "local_sgd",
            "compression": "fp16",
            "options": {"local_sgd": {"momentum": "reset"}},
        },
    ),
    *[
        (
            "compression x sync",
            "what the gradients left over",
            {
                "sync": "local_sgd",
                "compression": name,
                "options": {"local_sgd": {"warmup_steps": 8}},
            },
            {
                "sync": "local_sgd",
                "compression": "fp16",
                "options": {"local_sgd": {"warmup_steps": 8}},
            },
        )
        for name in ("topk", "ef_sign", "powersgd")
    ],
    (
        "compression x sync",
        "it takes one",
        {"sync": "ddp", "compression": "fp16", "options": {"ddp": {"local_steps": 8}}},
        {"sync": "ddp", "compression": "fp16"},
    ),
    (
        "compression x sync",
        "buckets travel as they are",
        {"compression": "fp16", "options": {"synchronous": {"bucket_mib": 4.0}}},
        {"compression": "fp16", "options": {"synchronous": {"bucket_mib": 0.0}}},
    ),
    (
        "compression x sync",
        "fragments = 2",
        {"sync": "diloco", "compression": "fp16", "options": {"diloco": {"fragments": 2}}},
        {"sync": "diloco", "options": {"diloco": {"fragments": 2, "outer_bits": 8}}},
    ),
    (
        "compression x sync",
        "outer_bits = 8",
        {"sync": "diloco", "compression": "fp16", "options": {"diloco": {"outer_bits": 8}}},
        {"sync": "diloco", "compression": "fp16", "options": {"diloco": {"outer_bits": 0}}},
    ),
    # options of strategies
    (
        "buckets",
        "bucket_mib = -1",
        {"options": {"synchronous": {"bucket_mib": -1.0}}},
        {"options": {"synchronous": {"bucket_mib": 0.0}}},
    ),
    (
        "buckets",
        "a push is whole",
        {**SERVER, "options": {"synchronous": {"bucket_mib": 25.0}}},
        {"options": {"synchronous": {"bucket_mib": 25.0}}},
    ),
    *[
        (
            "outer step",
            f"{name} = {value:g}",
            {"sync": "diloco", "options": {"diloco": {name: value}}},
            {"sync": "diloco", "options": {"diloco": {name: allowed}}},
        )
        for name, value, allowed in (
            ("outer_lr", 0.0, 1.0),
            ("outer_momentum", 1.0, 0.0),
            ("outer_momentum", -0.1, 0.9),
        )
    ],
    *[
        (
            "outer bits",
            "never summed",
            {"sync": "diloco", "topology": topology, "options": {"diloco": {"outer_bits": 4}}},
            {"sync": "diloco", "topology": allowed, "options": {"diloco": {"outer_bits": 4}}},
        )
        for topology, allowed in (
            ("ring", "direct"),
            ("hierarchical", "native"),
            ("tree", "parameter_server"),
        )
    ],
    (
        "slack",
        "any number of clocks",
        {
            "sync": "stale_synchronous",
            **SERVER,
            "options": {"stale_synchronous": {"slack": -1, "apply": "per_clock"}},
        },
        {
            "sync": "stale_synchronous",
            **SERVER,
            "options": {"stale_synchronous": {"slack": -1, "apply": "per_push"}},
        },
    ),
    *[
        (
            "consensus rate",
            f"consensus_rate = {rate:g}",
            {
                "sync": "gossip",
                "topology": "exponential",
                "options": {"gossip": {"consensus_rate": rate}},
            },
            {
                "sync": "gossip",
                "topology": "exponential",
                "options": {"gossip": {"consensus_rate": 0.5}},
            },
        )
        for rate in (0.0, 1.5)
    ],
    # workloads
    (
        "heads",
        "width(64) is not a multiple of heads(5)",
        {"workload": "transformer", "options": {"transformer": {"heads": 5}}},
        {"workload": "transformer", "options": {"transformer": {"heads": 8}}},
    ),
    (
        "heads",
        "heads(0)",
        {"workload": "transformer", "options": {"transformer": {"heads": 0}}},
        {"workload": "transformer", "options": {"transformer": {"heads": 1}}},
    ),
    *[
        (
            "symbols",
            f"with data = {data}, which has {right}",
            {
                "workload": "transformer",
                "options": {"transformer": {"data": data, "symbols": wrong, "path": "/t"}},
            },
            {
                "workload": "transformer",
                "options": {"transformer": {"data": data, "symbols": right, "path": "/t"}},
            },
        )
        for data, wrong, right in (("markov", 9, 8), ("text", 8, 256), ("stdlib", 255, 256))
    ],
    *[
        (
            "path",
            f"path = {path!r} with data = text",
            {
                "workload": "transformer",
                "options": {"transformer": {"data": "text", "symbols": 256, "path": path}},
            },
            {
                "workload": "transformer",
                "options": {"transformer": {"data": "text", "symbols": 256, "path": whole}},
            },
        )
        for path, whole in (("", "/words"), ("words", "~/words"))
    ],
    *[
        (
            "path",
            f"path = '' with data = {data}",
            {"preset": preset, "options": {"cnn": {"data": data}}},
            {"preset": preset, "options": {"cnn": {"data": data, "path": "/images"}}},
        )
        for preset, data in (("cifar10", "cifar10"), ("gpu", "imagenet"))
    ],
    (
        "data",
        "with model = digits: its images and classes are those of resnet18",
        {"options": {"cnn": {"data": "cifar10", "path": "/images"}}},
        {"options": {"cnn": {"data": "cifar10", "path": "/images", "model": "resnet18"}}},
    ),
    (
        "data",
        "those of resnet50",
        {"preset": "cifar10", "options": {"cnn": {"data": "imagenet", "path": "/images"}}},
        {"preset": "gpu", "options": {"cnn": {"data": "imagenet", "path": "/images"}}},
    ),
    *[
        (
            "momentum",
            "with optimizer = adamw of cnn",
            {
                "sync": "asynchronous",
                **SERVER,
                "options": {"cnn": {"optimizer": "adamw"}, "asynchronous": {"momentum": name}},
            },
            {
                "sync": "asynchronous",
                **SERVER,
                "options": {"cnn": {"optimizer": "sgd"}, "asynchronous": {"momentum": name}},
            },
        )
        for name in ("per_worker", "dana")
    ],
    # counts
    *[
        ("counts", f"{name} = 0", {name: 0}, {name: 1})
        for name in ("replicas", "model_parallel", "threads", "hosts")
    ],
    ("servers", "it needs one at least", {**SERVER, "servers": 0}, {**SERVER, "servers": 3}),
    (
        "servers",
        "which has none",
        {"topology": "ring", "servers": 1},
        {"topology": "ring", "servers": 0},
    ),
    (
        "servers",
        "no server",
        {"server_placement": "with_worker"},
        {**SERVER, "server_placement": "with_worker"},
    ),
    (
        "servers",
        "servers(3) > workers(2)",
        {**SERVER, "servers": 3, "replicas": 2, "server_placement": "with_worker"},
        {**SERVER, "servers": 2, "replicas": 2, "server_placement": "with_worker"},
    ),
    (
        "model_parallel",
        "one rank is one replica",
        {"model_parallel": 2},
        {"model_parallel": 2, "parallel": "tensor"},
    ),
    (
        "hosts",
        "hosts(3) > ranks(2)",
        {"hosts": 3, "replicas": 2, "cluster": "torchrun"},
        {"hosts": 2, "replicas": 2, "cluster": "torchrun"},
    ),
    # budget
    ("budget", "steps = 0", {"budget": Budget(steps=0)}, {"budget": Budget(steps=1)}),
    (
        "budget",
        "samples(63) < global batch(64)",
        {"budget": Budget(samples=63)},
        {"budget": Budget(samples=64)},
    ),
    ("budget", "timeout_s = 0", {"budget": Budget(timeout_s=0)}, {"budget": Budget(timeout_s=1)}),
    (
        "counts",
        "server_threads = 0",
        {"sync": "asynchronous", **SERVER, "options": {"asynchronous": {"server_threads": 0}}},
        {"sync": "asynchronous", **SERVER, "options": {"asynchronous": {"server_threads": 1}}},
    ),
    (
        "counts",
        "bucket_cap_mb = 0",
        {"sync": "ddp", "options": {"ddp": {"bucket_cap_mb": 0}}},
        {"sync": "ddp", "options": {"ddp": {"bucket_cap_mb": 1}}},
    ),
    (
        "counts",
        "segment_kib = -1",
        {"topology": "ring", "options": {"ring": {"segment_kib": -1}}},
        {"topology": "ring", "options": {"ring": {"segment_kib": 1}}},
    ),
    # divisibility
    ("global batch", "64 % 3 = 1", {"replicas": 3}, {"replicas": 4}),
    (
        "global batch",
        "24 % 5 = 4",
        {"workload": TINY, "replicas": 5},
        {"workload": TINY, "replicas": 6},
    ),
    (
        "global batch",
        "global_batch = 0",
        {"options": {"cnn": {"global_batch": 0}}},
        {"options": {"cnn": {"global_batch": 1}}},
    ),
    (
        "global batch",
        "global batch(1281) > num_samples(1280)",
        {"options": {"cnn": {"global_batch": 1281}}},
        {"options": {"cnn": {"global_batch": 1280}}},
    ),
    (
        "global batch",
        "global batch(72) > num_samples(64)",
        {"preset": "comm", "batch_mode": "fixed_per_worker", "replicas": 9},
        {"preset": "comm", "batch_mode": "fixed_per_worker", "replicas": 8},
    ),
    (
        "global batch",
        "num_micro_batches(5)",
        {
            "workload": TINY,
            "parallel": "pipeline",
            "replicas": 2,
            "options": {"pipeline": {"num_micro_batches": 5}},
        },
        {
            "workload": TINY,
            "parallel": "pipeline",
            "replicas": 2,
            "options": {"pipeline": {"num_micro_batches": 4}},
        },
    ),
    (
        "global batch",
        "model_parallel(5)",
        {"workload": TINY, "parallel": "fsdp", "model_parallel": 5},
        {
            "workload": TINY,
            "parallel": "tensor",
            "model_parallel": 5,
            "options": {"tiny": {"width": 20}},
        },
    ),
    (
        "global batch",
        "num_micro_batches(5)",
        {"workload": TINY, "replicas": 2, "options": {"data": {"num_micro_batches": 5}}},
        {"workload": TINY, "replicas": 2, "options": {"data": {"num_micro_batches": 6}}},
    ),
    (
        "counts",
        "num_micro_batches = 0",
        {"options": {"data": {"num_micro_batches": 0}}},
        {"options": {"data": {"num_micro_batches": 1}}},
    ),
    *[
        (
            "local steps",
            "would not end with a synchronisation",
            {
                "sync": sync,
                "budget": Budget(steps=20),
                "options": {sync: {"local_steps": 8, "warmup_steps": 2}},
            },
            {
                "sync": sync,
                "budget": Budget(steps=20),
                "options": {sync: {"local_steps": 8, "warmup_steps": 4}},
            },
        )
        for sync in ("local_sgd", "diloco")
    ],
    (
        "local steps",
        "% local_steps(7)",
        {"sync": "ddp", "options": {"ddp": {"local_steps": 7}}},
        {"sync": "ddp", "options": {"ddp": {"local_steps": 8, "warmup_steps": 8}}},
    ),
    *[
        (
            "local steps",
            "warmup_steps = -8",
            {"sync": sync, "options": {sync: {"local_steps": 8, "warmup_steps": -8}}},
            {"sync": sync, "options": {sync: {"local_steps": 8, "warmup_steps": 8}}},
        )
        for sync in ("local_sgd", "ddp")
    ],
    (
        "local steps",
        "local_steps = 0",
        {"sync": "ddp", "options": {"ddp": {"local_steps": 0}}},
        {"sync": "ddp", "options": {"ddp": {"local_steps": 1, "warmup_steps": 3}}},
    ),
    (
        "local steps",
        "local_steps = 0",
        {"sync": "local_sgd", "options": {"local_sgd": {"local_steps": 0}}},
        {"sync": "local_sgd", "options": {"local_sgd": {"local_steps": 1}}},
    ),
    (
        "fragments",
        "does not divide local_steps(8)",
        {"sync": "diloco", "options": {"diloco": {"fragments": 3}}},
        {"sync": "diloco", "options": {"diloco": {"fragments": 4}}},
    ),
    (
        "fragments",
        "delay = 8",
        {"sync": "diloco", "options": {"diloco": {"delay": 8}}},
        {"sync": "diloco", "options": {"diloco": {"delay": 7}}},
    ),
    (
        "fragments",
        "averages whole vectors",
        {"sync": "diloco", **SERVER, "options": {"diloco": {"fragments": 2, "delay": 1}}},
        {"sync": "diloco", "topology": "ring", "options": {"diloco": {"fragments": 2, "delay": 1}}},
    ),
    (
        "counts",
        "period = 0",
        {"sync": "elastic_averaging", "options": {"elastic_averaging": {"period": 0}}},
        {"sync": "elastic_averaging", "options": {"elastic_averaging": {"period": 1}}},
    ),
    (
        "tensor plan",
        "does not say what splits by weight",
        {
            "workload": str(Path(__file__).parent / "workloads" / "quadratic.py"),
            "parallel": "tensor",
            "model_parallel": 2,
        },
        {"workload": TINY, "parallel": "tensor", "model_parallel": 2},
    ),
    (
        "tensor split",
        "heads(4) is not divisible by model_parallel(3)",
        {"workload": "transformer", "parallel": "tensor", "model_parallel": 3},
        {"workload": "transformer", "parallel": "tensor", "model_parallel": 4},
    ),
    (
        "tensor split",
        "the 8 that cnn splits by is not divisible by model_parallel(3)",
        {"parallel": "tensor", "model_parallel": 3},
        {"parallel": "tensor", "model_parallel": 8},
    ),
    (
        "tensor split",
        "context(18) is not divisible by model_parallel(4)",
        {
            "workload": "transformer",
            "parallel": "tensor",
            "model_parallel": 4,
            "options": {"transformer": {"context": 18}, "tensor": {"sequence_parallel": True}},
        },
        {
            "workload": "transformer",
            "parallel": "tensor",
            "model_parallel": 4,
            "options": {"transformer": {"context": 18}},
        },
    ),
    (
        "sequence parallel",
        "it has no sequences of tokens",
        {
            "parallel": "tensor",
            "model_parallel": 2,
            "options": {"tensor": {"sequence_parallel": True}},
        },
        {"parallel": "tensor", "model_parallel": 2},
    ),
    (
        "stages",
        "layers(9) < stages(5) x num_chunks(2)",
        {"workload": TINY, **staged(5, schedule="interleaved")},
        {"workload": TINY, **staged(4, schedule="interleaved")},
    ),
    (
        "stages",
        "layers(9) < stages(5) x num_chunks(2)",
        {"workload": TINY, **staged(5, schedule="zero_bubble", num_chunks=2)},
        {"workload": TINY, **staged(5, schedule="zero_bubble")},
    ),
    (
        "stages",
        "layers with parameters(3) < stages(4)",
        {"workload": "mlp", **staged(4)},
        {"workload": "mlp", **staged(3)},
    ),
    (
        "schedule",
        "num_chunks = 2 with schedule = 1f1b",
        {"workload": TINY, **staged(2, num_chunks=2)},
        {"workload": TINY, **staged(2, schedule="interleaved", num_chunks=2)},
    ),
    (
        "schedule",
        "num_micro_batches(3) < stages(4)",
        {"workload": TINY, **staged(4, num_micro_batches=3)},
        {"workload": TINY, **staged(4, schedule="gpipe", num_micro_batches=3)},
    ),
    *[
        (
            "schedule",
            "num_micro_batches(5) is not divisible by rounds(max(1, 5 // stages(2)) = 2)",
            {
                "workload": TINY,
                **staged(2, schedule=schedule, num_micro_batches=5, tiny={"global_batch": 20}),
            },
            {
                "workload": TINY,
                **staged(2, schedule=schedule, num_micro_batches=4, tiny={"global_batch": 20}),
            },
        )
        for schedule in ("interleaved", "zero_bubble")
    ],
    (
        "counts",
        "num_micro_batches = 0",
        {"options": {"data": {"num_micro_batches": 0}}},
        {"options": {"data": {"num_micro_batches": 1}}},
    ),
    *[
        (
            "local steps",
            "would not end with a synchronisation",
            {
                "sync": sync,
                "budget": Budget(steps=20),
                "options": {sync: {"local_steps": 8, "warmup_steps": 2}},
            },
            {
                "sync": sync,
                "budget": Budget(steps=20),
                "options": {sync: {"local_steps": 8, "warmup_steps": 4}},
            },
        )
        for sync in ("local_sgd", "diloco")
    ],
    (
        "local steps",
        "% local_steps(7)",
        {"sync": "ddp", "options": {"ddp": {"local_steps": 7}}},
        {"sync": "ddp", "options": {"ddp": {"local_steps": 8, "warmup_steps": 8}}},
    ),
    *[
        (
            "local steps",
            "warmup_steps = -8",
            {"sync": sync, "options": {sync: {"local_steps": 8, "warmup_steps": -8}}},
            {"sync": sync, "options": {sync: {"local_steps": 8, "warmup_steps": 8}}},
        )
        for sync in ("local_sgd", "ddp")
    ],
    (
        "local steps",
        "local_steps = 0",
        {"sync": "ddp", "options": {"ddp": {"local_steps": 0}}},
        {"sync": "ddp", "options": {"ddp": {"local_steps": 1, "warmup_steps": 3}}},
    ),
    (
        "local steps",
        "local_steps = 0",
        {"sync": "local_sgd", "options": {"local_sgd": {"local_steps": 0}}},
        {"sync": "local_sgd", "options": {"local_sgd": {"local_steps": 1}}},
    ),
    (
        "fragments",
        "does not divide local_steps(8)",
        {"sync": "diloco", "options": {"diloco": {"fragments": 3}}},
        {"sync": "diloco", "options": {"diloco": {"fragments": 4}}},
    ),
    (
        "fragments",
        "delay = 8",
        {"sync": "diloco", "options": {"diloco": {"delay": 8}}},
        {"sync": "diloco", "options": {"diloco": {"delay": 7}}},
    ),
    (
        "fragments",
        "averages whole vectors",
        {"sync": "diloco", **SERVER, "options": {"diloco": {"fragments": 2, "delay": 1}}},
        {"sync": "diloco", "topology": "ring", "options": {"diloco": {"fragments": 2, "delay": 1}}},
    ),
    (
        "counts",
        "period = 0",
        {"sync": "elastic_averaging", "options": {"elastic_averaging": {"period": 0}}},
        {"sync": "elastic_averaging", "options": {"elastic_averaging": {"period": 1}}},
    ),
    (
        "tensor plan",
        "does not say what splits by weight",
        {
            "workload": str(Path(__file__).parent / "workloads" / "quadratic.py"),
            "parallel": "tensor",
            "model_parallel": 2,
        },
        {"workload": TINY, "parallel": "tensor", "model_parallel": 2},
    ),
    (
        "tensor split",
        "heads(4) is not divisible by model_parallel(3)",
        {"workload": "transformer", "parallel": "tensor", "model_parallel": 3},
        {"workload": "transformer", "parallel": "tensor", "model_parallel": 4},
    ),
    (
        "tensor split",
        "the 8 that cnn splits by is not divisible by model_parallel(3)",
        {"parallel": "tensor", "model_parallel": 3},
        {"parallel": "tensor", "model_parallel": 8},
    ),
    (
        "tensor split",
        "context(18) is not divisible by model_parallel(4)",
        {
            "workload": "transformer",
            "parallel": "tensor",
            "model_parallel": 4,
            "options": {"transformer": {"context": 18}, "tensor": {"sequence_parallel": True}},
        },
        {
            "workload": "transformer",
            "parallel": "tensor",
            "model_parallel": 4,
            "options": {"transformer": {"context": 18}},
        },
    ),
    (
        "sequence parallel",
        "it has no sequences of tokens",
        {
            "parallel": "tensor",
            "model_parallel": 2,
            "options": {"tensor": {"sequence_parallel": True}},
        },
        {"parallel": "tensor", "model_parallel": 2},
    ),
    (
        "stages",
        "layers(9) < stages(5) x num_chunks(2)",
        {"workload": TINY, **staged(5, schedule="interleaved")},
        {"workload": TINY, **staged(4, schedule="interleaved")},
    ),
    (
        "stages",
        "layers(9) < stages(5) x num_chunks(2)",
        {"workload": TINY, **staged(5, schedule="zero_bubble", num_chunks=2)},
        {"workload": TINY, **staged(5, schedule="zero_bubble")},
    ),
    (
        "stages",
        "layers with parameters(3) < stages(4)",
        {"workload": "mlp", **staged(4)},
        {"workload": "mlp", **staged(3)},
    ),
    (
        "schedule",
        "num_chunks = 2 with schedule = 1f1b",
        {"workload": TINY, **staged(2, num_chunks=2)},
        {"workload": TINY, **staged(2, schedule="interleaved", num_chunks=2)},
    ),
    (
        "schedule",
        "num_micro_batches(3) < stages(4)",
        {"workload": TINY, **staged(4, num_micro_batches=3)},
        {"workload": TINY, **staged(4, schedule="gpipe", num_micro_batches=3)},
    ),
    *[
        (
            "schedule",
            "num_micro_batches(6) is not divisible by rounds(max(1, 6 // stages(1)) = 6)"[:47],
            {"workload": TINY, **staged(3, schedule=schedule, num_micro_batches=8), "replicas": 1},
            {"workload": TINY, **staged(3, schedule=schedule, num_micro_batches=6), "replicas": 1},
        )
        for schedule in ()
    ],
    (
        "counts",
        "num_micro_batches = 0",
        {"workload": TINY, **staged(2, num_micro_batches=0)},
        {"workload": TINY, **staged(2, num_micro_batches=2)},
    ),
    (
        "random matching",
        "is odd",
        {"workload": TINY, "sync": "gossip", "topology": "random_matching", "replicas": 3},
        {"workload": TINY, "sync": "gossip", "topology": "random_matching", "replicas": 4},
    ),
    (
        "moving rate",
        "replicas(4) x moving_rate(0.3)",
        {
            "sync": "elastic_averaging",
            "replicas": 4,
            "options": {"elastic_averaging": {"moving_rate": 0.3}},
        },
        {
            "sync": "elastic_averaging",
            "replicas": 4,
            "options": {"elastic_averaging": {"moving_rate": 0.25}},
        },
    ),
    (
        "moving rate",
        "moving_rate = 1",
        {"sync": "elastic_averaging", "options": {"elastic_averaging": {"moving_rate": 1.0}}},
        {"sync": "elastic_averaging", "options": {"elastic_averaging": {"moving_rate": 0.9}}},
    ),
    (
        "slack",
        "slack = -2",
        {"sync": "stale_synchronous", **SERVER, "options": {"stale_synchronous": {"slack": -2}}},
        {
            "sync": "stale_synchronous",
            **SERVER,
            "options": {"stale_synchronous": {"slack": -1, "apply": "per_push"}},
        },
    ),
    (
        "backup workers",
        "backup_workers(2) of replicas(2)",
        {"sync": "k_sync", **SERVER, "replicas": 2, "options": {"k_sync": {"backup_workers": 2}}},
        {"sync": "k_sync", **SERVER, "replicas": 2, "options": {"k_sync": {"backup_workers": 1}}},
    ),
    (
        "k_sync servers",
        "servers = 2",
        {"sync": "k_sync", **SERVER, "replicas": 2, "servers": 2},
        {"sync": "k_sync", **SERVER, "replicas": 2, "servers": 1},
    ),
    ("lr_factor", "lr_factor = 0", {"lr_factor": 0.0}, {"lr_factor": 0.5}),
    ("lr_factor", "lr_factor = -1", {"lr_factor": -1.0}, {"lr_factor": 1e-3}),
    ("tuning", "lr_factor = 2", {"tuning": "per_strategy", "lr_factor": 2.0}, {"lr_factor": 2.0}),
    (
        "tuning",
        "gradients = none",
        {"tuning": "per_strategy", "clock": "virtual", "gradients": "none"},
        {"tuning": "per_strategy", "clock": "virtual"},
    ),
    (
        "tuning",
        "cluster = torchrun",
        {"tuning": "per_strategy", "cluster": "torchrun"},
        {"tuning": "per_strategy"},
    ),
    (
        "straggler",
        "numbered 0 to 1",
        {"replicas": 2, "straggler": {"2": 4.0}},
        {"replicas": 2, "straggler": {"1": 4.0}},
    ),
    ("straggler", "1 or more", {"straggler": {"0": 0.5}}, {"straggler": {"0": 1.0}}),
    (
        "faults",
        "rank 2 of 2 ranks",
        {"replicas": 2, "faults": ({**FAULT, "rank": 2},)},
        {"replicas": 2, "faults": (FAULT,)},
    ),
    *[
        (
            "faults",
            words,
            {"replicas": 2, "faults": ({**FAULT, **wrong},)},
            {"replicas": 2, "faults": (FAULT,)},
        )
        for words, wrong in (
            ("exactly the keys", {"at": 3}),
            ("fault phase 'lunch'", {"phase": "lunch"}),
            ("fault signal 'SIGHOP'", {"signal": "SIGHOP"}),
            ("step 'x'", {"step": "x"}),
            ("step -1", {"step": -1}),
        )
    ],
    # clock
    *[
        (
            "wall clock",
            f"{name} with clock = wall",
            {name.partition(" ")[0]: value},
            {name.partition(" ")[0]: value, **VIRTUAL},
        )
        for name, value in (
            ("compute_time", {"kind": "gamma", "cv": 0.1}),
            ("receive_cost", {"incast": 2.0}),
            ("gradients = none", "none"),
        )
    ],
    (
        "receive_cost",
        "incast = 0.5",
        {"receive_cost": {"incast": 0.5}, **VIRTUAL},
        {"receive_cost": {"incast": 1.0}, **VIRTUAL},
    ),
    (
        "receive_cost",
        "unknown key 'incas'",
        {"receive_cost": {"incas": 2.0}, **VIRTUAL},
        {"receive_cost": {"incast": 2.0}, **VIRTUAL},
    ),
    (
        "compute_time",
        "kind = gamma without cv",
        {"compute_time": {"kind": "gamma"}, **VIRTUAL},
        {"compute_time": {"kind": "gamma", "cv": 0.1}, **VIRTUAL},
    ),
    (
        "compute_time",
        "unknown compute_time kind 'gama'; did you mean 'gamma'?",
        {"compute_time": {"kind": "gama"}, **VIRTUAL},
        {"compute_time": {"kind": "pareto", "shape": 3.0}, **VIRTUAL},
    ),
    (
        "compute_time",
        "mean_s = 0",
        {"compute_time": {"kind": "fixed", "mean_s": 0.0}, **VIRTUAL},
        {"compute_time": {"kind": "fixed", "mean_s": 0.1}, **VIRTUAL},
    ),
    (
        "compute_time",
        "without a kind",
        {"compute_time": {"mean_s": 0.1}, **VIRTUAL},
        {"compute_time": {"kind": "fixed", "mean_s": 0.1}, **VIRTUAL},
    ),
    (
        "compute_time",
        "mean_s = 1e+300",
        {"compute_time": {"kind": "fixed", "mean_s": 1e300}, **VIRTUAL},
        {"compute_time": {"kind": "fixed", "mean_s": 1e5}, **VIRTUAL},
    ),
    (
        "compute_time",
        "cv = 1e+200",
        {"compute_time": {"kind": "log_normal", "cv": 1e200}, **VIRTUAL},
        {"compute_time": {"kind": "log_normal", "cv": 10.0}, **VIRTUAL},
    ),
    (
        "momentum",
        "momentum = dana with lock = none",
        {
            "sync": "asynchronous",
            **SERVER,
            "options": {"asynchronous": {"lock": "none", "momentum": "dana"}},
        },
        {"sync": "asynchronous", **SERVER, "options": {"asynchronous": {"momentum": "dana"}}},
    ),
    *[
        (
            "momentum",
            f"momentum = {name} of asynchronous with momentum = 0 of mlp",
            {
                "sync": "asynchronous",
                "workload": "mlp",
                **SERVER,
                "options": {"asynchronous": {"momentum": name}},
            },
            {
                "sync": "asynchronous",
                "workload": "mlp",
                **SERVER,
                "options": {"asynchronous": {"momentum": name}, "mlp": {"momentum": 0.9}},
            },
        )
        for name in ("per_worker", "dana")
    ],
    (
        "late",
        "not abandoned",
        {"sync": "k_sync", **SERVER, "replicas": 2, "options": {"k_sync": {"late": "cancel"}}},
        {
            "sync": "k_sync",
            **SERVER,
            "replicas": 2,
            "options": {"k_sync": {"late": "cancel"}},
            **VIRTUAL,
        },
    ),
    ("virtual clock", "sync = ddp", {"sync": "ddp", **VIRTUAL}, {**VIRTUAL}),
    (
        "virtual clock",
        "compute none",
        {"sync": "actor_learner", "workload": "rl_agent", **SERVER, **VIRTUAL},
        {"sync": "asynchronous", "workload": "rl_agent", **SERVER, **VIRTUAL},
    ),
    *[
        ("virtual clock", f"parallel = {parallel}", {"parallel": parallel, **VIRTUAL}, {**VIRTUAL})
        for parallel in ("pipeline", "tensor", "fsdp")
    ],
    (
        "virtual clock",
        "lock = none",
        {
            "sync": "asynchronous",
            **SERVER,
            **VIRTUAL,
            "options": {"asynchronous": {"lock": "none"}},
        },
        {
            "sync": "asynchronous",
            **SERVER,
            **VIRTUAL,
            "options": {"asynchronous": {"lock": "exclusive"}},
        },
    ),
    (
        "virtual clock",
        "torn reads",
        {"sync": "hogwild", **VIRTUAL},
        {"sync": "hogwild", **VIRTUAL, "options": {"hogwild": {"lock": "exclusive"}}},
    ),
    ("virtual clock", "device = cuda", {"device": "cuda", **VIRTUAL}, {"device": "cpu", **VIRTUAL}),
    ("virtual clock", "precision = bf16", {"precision": "bf16", **VIRTUAL}, {"precision": "bf16"}),
    (
        "virtual clock",
        "num_micro_batches = 2",
        {**VIRTUAL, "options": {"data": {"num_micro_batches": 2}}},
        {"options": {"data": {"num_micro_batches": 2}}},
    ),
    (
        "cuda",
        "meet in the host's memory",
        {"device": "cuda", "topology": "hierarchical"},
        {"device": "cuda", "topology": "ring"},
    ),
    (
        "cuda",
        "gloo sends the host's memory",
        {"workload": TINY, **staged(2), "device": "cuda"},
        {"workload": TINY, **staged(2), "device": "cuda", "backend": "nccl"},
    ),
    (
        "cuda",
        "a codec works on the host",
        {"device": "cuda", "compression": "fp16"},
        {"device": "cuda", "sync": "ddp", "compression": "fp16"},
    ),
    (
        "precision",
        "does not run under autocast",
        {"precision": "bf16", "parallel": "tensor"},
        {"precision": "bf16"},
    ),
    (
        "virtual clock",
        "backend = mpi",
        {"backend": "mpi", **VIRTUAL},
        {"backend": "gloo", **VIRTUAL},
    ),
    ("virtual clock", "threads = 4", {"threads": 4, **VIRTUAL}, {**VIRTUAL}),
    ("virtual clock", "5001 ranks", {**MANY, "replicas": 5000}, {**MANY, "replicas": 4000}),
    ("virtual clock", "cluster = torchrun", {"cluster": "torchrun", **VIRTUAL}, {**VIRTUAL}),
    (
        "virtual clock",
        "up to 128",
        {"topology": "ring", "replicas": 256, **SMALL, **VIRTUAL},
        {"topology": "ring", "replicas": 128, **SMALL, **VIRTUAL},
    ),
    (
        "virtual clock",
        "up to 128",
        {"topology": "direct", "replicas": 129, **SMALL, **VIRTUAL},
        {"topology": "tree", "replicas": 129, **SMALL, **VIRTUAL},
    ),
    # backend, cluster, links
    ("nccl", "device = cpu", {"backend": "nccl"}, {"backend": "nccl", "device": "cuda"}),
    (
        "nccl",
        "CPU memory",
        {"backend": "nccl", "device": "cuda", "sync": "hogwild"},
        {"backend": "gloo", "sync": "hogwild"},
    ),
    (
        "nccl",
        "threads",
        {
            "backend": "nccl",
            "device": "cuda",
            "sync": "asynchronous",
            **SERVER,
            "options": {"asynchronous": {"lock": "none"}},
        },
        {"backend": "nccl", "device": "cuda", "sync": "asynchronous", **SERVER},
    ),
    (
        "hosts",
        "on this machine only",
        {"hosts": 2, "replicas": 2},
        {"hosts": 2, "replicas": 2, "cluster": "torchrun"},
    ),
    (
        "hosts",
        "share the last host",
        {
            **SERVER,
            "replicas": 4,
            "hosts": 2,
            "cluster": "torchrun",
            "server_placement": "with_worker",
        },
        {**SERVER, "replicas": 4, "hosts": 2, **VIRTUAL, "server_placement": "with_worker"},
    ),
    (
        "virtual clock",
        "moves nothing over a link",
        {"topology": "hierarchical", "replicas": 4, "link_mbit": 100.0, **VIRTUAL},
        {"topology": "hierarchical", "replicas": 4, "link_mbit": 100.0, "hosts": 2, **VIRTUAL},
    ),
    (
        "virtual clock",
        "moves nothing over a link",
        {"topology": "hierarchical", "replicas": 4, "link_latency_us": 50.0, **VIRTUAL},
        {"topology": "hierarchical", "replicas": 4, **VIRTUAL},
    ),
    (
        "random matching",
        "seed = -1",
        {
            "sync": "gossip",
            "topology": "random_matching",
            "replicas": 2,
            "options": {"random_matching": {"seed": -1}},
        },
        {
            "sync": "gossip",
            "topology": "random_matching",
            "replicas": 2,
            "options": {"random_matching": {"seed": 1}},
        },
    ),
    ("links", "nobody shapes", {"link_mbit": 100.0}, {"link_mbit": 100.0, "clock": "virtual"}),
    ("links", "nobody shapes", {"link_latency_us": 50.0}, {"link_latency_us": 50.0, **VIRTUAL}),
    (
        "links",
        "link_mbit = 0: a link has 0.001 to 1e+09 Mbit/s",
        {"link_mbit": 0.0, **VIRTUAL},
        {"link_mbit": 1.0, **VIRTUAL},
    ),
    (
        "links",
        "link_mbit = 1e-300",
        {"link_mbit": 1e-300, **VIRTUAL},
        {"link_mbit": 0.001, **VIRTUAL},
    ),
    (
        "links",
        "link_latency_us = -1",
        {"link_latency_us": -1.0, **VIRTUAL},
        {"link_latency_us": 0.0, **VIRTUAL},
    ),
]


@pytest.mark.parametrize(
    ("rule", "words", "refused", "twin"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES]
)
def test_rule_refuses_its_case_and_passes_the_twin(rule, words, refused, twin):
    found = problems(**refused)
    matching = [p for p in found if p.rule == rule and words in p.reason]
    assert matching, f"expected {rule}: {words!r}, found {found}"
    assert all(p.reason and p.remedy for p in found)
    assert problems(**twin) == []


@pytest.mark.parametrize(
    "compression",
    [
        name
        for name in declared.members("compression")
        if declared.of("compression", name).travels_over
    ],
)
@pytest.mark.parametrize(
    "sync", [name for name in declared.members("sync") if name != "actor_learner"]
)
def test_a_topology_that_a_refusal_names_is_one_that_both_take(sync, compression):
    """Of a compression that does not travel over the topology: what the remedy names is not refused
    in its turn."""
    for topology in topologies(declared.strategy(sync).topologies):
        fields = {"sync": sync, "topology": topology, "compression": compression, "replicas": 4}
        for problem in [p for p in problems(**fields) if p.rule == "compression x topology"]:
            named = re.match(
                r"set topology to (?:one of )?(.*), or compression = none", problem.remedy
            )
            assert named or problem.remedy == "set compression = none", problem
            for other in named[1].split(", ") if named else ():
                again = [
                    p
                    for p in problems(**{**fields, "topology": other})
                    if "topology" in p.rule or other in p.reason
                ]
                assert again == [], f"{fields}: {problem.remedy}"


def test_every_rule_has_a_case():
    """Each Problem in the sources names a rule that a test here refuses."""
    named = {
        refusal.rule
        for axis in AXES
        for name in declared.members(axis)
        for refusal in declared.of(axis, name).refuses
    }
    for path in (plugins.PACKAGE / "rules").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "Problem"
                and isinstance(node.args[0], ast.Constant)
            ):
                named.add(ast.literal_eval(node.args[0]))
    elsewhere = {
        "smallest",
        "muon",
        "environments",
        "cuda",
        "mpi",
        "gloo",
        "batch norm",
        "laws",
    }  # further down
    assert named == {case[0] for case in CASES} | elsewhere


# every member


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in AXES for name in declared.members(kind)]
)
def test_every_member_is_allowed_with_its_companions(kind, name):
    companions = {
        "stale_synchronous": SERVER,
        "asynchronous": SERVER,
        "gossip": {"topology": "exponential"},
        "actor_learner": {**SERVER, "workload": "rl_agent"},
        "ring_neighbours": {"sync": "gossip"},
        "exponential": {"sync": "gossip"},
        "random_matching": {"sync": "gossip"},
        "k_sync": SERVER,
        "int8": {"topology": "direct"},
        "pipeline": {"model_parallel": 2},
        "tensor": {"model_parallel": 2},
        "fsdp": {"model_parallel": 2},
    }
    assert problems(**{kind: name, "replicas": 2, **companions.get(name, {})}) == []


@pytest.mark.parametrize("name", ["kubernetes", "namespaces", "slurm"])
def test_a_cluster_without_a_file_is_unknown(name):
    with pytest.raises(UsageError, match=f"unknown cluster '{name}'.* known: "):
        resolve(Cell(cluster=name))
    with pytest.raises(UsageError, match=f"unknown cluster '{name}'.* known: "):
        validate(Cell(cluster=name))


@pytest.mark.parametrize("kind", [*AXES, "cluster"])
def test_a_name_that_nobody_knows_is_a_usage_error_with_the_known_ones(kind):
    with pytest.raises(
        UsageError, match=f"unknown {kind} 'nosuch'.* known: .*{declared.members(kind)[0]}"
    ):
        resolve(Cell(**{kind: "nosuch"}))


def test_every_pair_of_sync_and_topology_is_answered():
    """No crash, no gap: each pair is allowed, or refused with a reason and a remedy."""
    allowed = set()
    for sync, topology in itertools.product(declared.members("sync"), declared.members("topology")):
        found = validate(Cell(sync=sync, topology=topology, workload="rl_agent", replicas=2))
        assert all(p.reason and p.remedy for p in found)
        if not found:
            allowed.add((sync, topology))
    reducing = 7 * 4  # synchronous, local_sgd, diloco, elastic_averaging
    assert (
        len(allowed) == reducing + 3 + 1 + 6 + 3 + 2
    )  # async x 3, actor_learner, delayed, gossip, hogwild and ddp


# a user's own files


def _own(tmp_path: Path, name: str, class_name: str, body: str = "    pass\n") -> str:
    path = tmp_path / f"{name}.py"
    path.write_text(f"class {class_name}:\n{body}")
    return str(path)


def test_own_plugins_are_allowed_whatever_their_file_is_called(tmp_path):
    own_ring = _own(tmp_path, "ring", "Topology")
    assert problems(topology=own_ring, compression="topk", sync="gossip", replicas=2) == []
    own_sync = _own(tmp_path, "hogwild", "Strategy")
    assert problems(sync=own_sync, topology="ring", replicas=2) == []
    assert problems(sync=own_sync, **SERVER, replicas=2) == []
    assert problems(sync=own_sync, parallel="tensor", model_parallel=2) == []


def test_own_plugins_obey_the_numbers(tmp_path):
    own_sync = _own(tmp_path, "mine", "Strategy")
    assert [p.rule for p in problems(sync=own_sync, replicas=3)] == ["global batch"]


def test_needs_topology_of_an_own_strategy_is_honoured(tmp_path):
    pushes = _own(tmp_path, "pushes", "Strategy", '    needs_topology = ("parameter_server",)\n')
    (problem,) = problems(sync=pushes, topology="ring", replicas=2)
    assert (
        problem.rule == "sync x topology" and "needs_topology = parameter_server" in problem.reason
    )
    assert problems(sync=pushes, **SERVER, replicas=2) == []
    graph = _own(tmp_path, "graph", "Strategy", '    needs_topology = "exponential"\n')
    assert problems(sync=graph, topology="exponential", replicas=2) == []
    plain = _own(tmp_path, "plain", "Strategy")
    assert problems(sync=plain, topology="exponential", replicas=2) != []


def test_an_exact_topology_is_not_replaced_by_an_own_one(tmp_path):
    own = _own(tmp_path, "my_topology", "Topology")
    assert [p.rule for p in problems(sync="asynchronous", topology=own, replicas=2)] == [
        "sync x topology"
    ]
    assert [p.rule for p in problems(sync="ddp", topology=own, replicas=2)] == ["sync x topology"]
    assert problems(topology=own, replicas=2) == []


def _own_workload(tmp_path: Path, preset: str) -> str:
    path = tmp_path / "my_net.py"
    path.write_text(
        f"presets = {{'default': {preset}}}\n\n\nclass Workload:\n    dropout: float = 0.0\n    norm: str = 'group'\n    tensor_divides = (2,)\n"
    )
    return str(path)


def test_muon_needs_whole_matrices(tmp_path):
    net = _own_workload(
        tmp_path, "{'global_batch': 64, 'budget_samples': 640, 'optimizer': 'muon'}"
    )
    assert [p.rule for p in problems(workload=net, **SERVER, replicas=2)] == ["muon"]
    assert [p.rule for p in problems(workload=net, parallel="fsdp", model_parallel=2)] == ["muon"]
    assert [p.rule for p in problems(workload=net, parallel="tensor", model_parallel=2)] == ["muon"]
    assert problems(workload=net, topology="ring", replicas=2) == []
    allowed = (
        "synchronous",
        "local_sgd",
        "diloco",
        "elastic_averaging",
        "delayed",
        "ddp",
        "hogwild",
    )
    for sync in allowed:  # each replica steps its own whole tensors
        assert problems(workload=net, sync=sync, replicas=2, budget=Budget(steps=16)) == [], sync
    for sync in ("asynchronous", "stale_synchronous", "k_sync"):  # servers step slices
        assert [p.rule for p in problems(workload=net, sync=sync, **SERVER, replicas=2)] == [
            "muon"
        ], sync


def test_workers_divide_the_environments(tmp_path):
    net = _own_workload(
        tmp_path, "{'global_batch': 512, 'budget_samples': 65536, 'num_environments': 16}"
    )
    assert [p.rule for p in problems(workload=net, replicas=32)] == ["environments"]
    assert problems(workload=net, replicas=16) == []
    many = {"options": {"rl_agent": {"num_environments": 24}}, "workload": "rl_agent"}
    assert [
        "global_batch(32) is not 2 x num_environments(24)" in p.reason for p in problems(**many)
    ] == [True]
    assert problems(workload="rl_agent", replicas=16) == []
    each = {
        "workload": "rl_agent",
        "batch_mode": "fixed_per_worker",
        "budget": Budget(samples=96 * 16),
    }
    assert problems(**each, replicas=3) == []  # every worker has 16


def test_batch_norm_is_a_notice_and_dropout_is_refused_in_laws_only(tmp_path):
    net = _own_workload(tmp_path, "{'global_batch': 64, 'budget_samples': 640}")
    normed = Cell(workload=net, replicas=2, options={"my_net": {"norm": "batch", "dropout": 0.1}})
    assert validate(normed) == []
    assert [p.rule for p in rules.notices(normed)] == ["batch norm", "laws"]
    assert rules.notices(dataclasses.replace(normed, replicas=1)) == []
    assert [p.rule for p in rules.law_problems(normed)] == ["laws"]
    assert [
        "float64" in p.reason for p in rules.law_problems(Cell(workload=TINY, precision="bf16"))
    ] == [True]
    assert rules.law_problems(dataclasses.replace(normed, options={})) == []
    assert rules.notices(dataclasses.replace(normed, options={})) == []
    (rounded,) = rules.notices(Cell(workload=TINY, precision="bf16", replicas=2))
    assert "float64" in rounded.reason
    assert rules.notices(Cell(workload=TINY, precision="bf16")) == []


def test_a_notice_is_said_once_with_the_cells_that_it_is_about():
    rounded = [Cell(workload=TINY, precision="bf16", replicas=count) for count in (1, 2, 4)]
    exact = [dataclasses.replace(cell, precision="fp64") for cell in rounded]
    (notice,) = rules.noticed([*exact, *rounded])
    assert (
        notice.cells == tuple(rounded[1:]) and notice.concerns == f"{rounded[1].label} and 1 more"
    )
    assert notice.text.startswith("precision = bf16") and notice.text.endswith(
        f"set precision = fp64 ({notice.concerns})"
    )
    assert [each.concerns for each in rules.noticed(rounded[:2])] == [rounded[1].label]
    assert rules.noticed(exact) == []


# the machine


@pytest.mark.parametrize(
    ("rule", "words", "fields", "lacking", "having"),
    [
        (
            "cuda",
            "no CUDA device",
            {"device": "cuda"},
            {"num_cuda_devices": 0},
            {"num_cuda_devices": 1},
        ),
        (
            "nccl",
            "without NCCL",
            {"backend": "nccl", "device": "cuda"},
            {"nccl": False},
            {"nccl": True},
        ),
        (
            "nccl",
            "4 local ranks, but 2 CUDA devices",
            {"backend": "nccl", "device": "cuda", "replicas": 4},
            {"nccl": True, "num_cuda_devices": 2},
            {"nccl": True, "num_cuda_devices": 4},
        ),
        (
            "nccl",
            "2 local ranks, but 1 CUDA",
            {"backend": "nccl", "device": "cuda", "replicas": 4, "hosts": 2},
            {"nccl": True, "num_cuda_devices": 1},
            {"nccl": True, "num_cuda_devices": 2},
        ),
        ("mpi", "without MPI", {"backend": "mpi"}, {"mpi": False}, {"mpi": True}),
        ("gloo", "without gloo", {}, {"gloo": False}, {"gloo": True}),
    ],
)
def test_the_machine_decides_on_devices_and_backends(rule, words, fields, lacking, having):
    cell = Cell(**fields)
    (problem,) = rules.machine_problems(cell, Machine(torch="2.13.0", **lacking))
    assert problem.rule == rule and words in problem.reason and problem.remedy
    assert rules.machine_problems(cell, Machine(torch="2.13.0", **having)) == []
    assert rules.machine_problems(cell, Machine()) == []  # nobody has looked
