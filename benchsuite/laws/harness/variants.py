"""What the grid of laws varies besides members and sizes: recipes of the workload, members'
options.
"""

from __future__ import annotations

from typing import Any

Recipe = tuple[str, float, float]  # optimizer, lr, clip norm
Fields = dict[str, Any]  # fields of a cell

# Where pushes are stale or replicas differ, learning rates are smaller, because a run that diverges
# would amplify roundings (each of 12 replicas steps on 2 samples). A clip norm of 0.5 clips every
# step of this workload.
RECIPES: tuple[Recipe, ...] = (
    ("sgd", 0.05, 0.0),
    ("sgd", 0.05, 0.5),
    ("momentum", 0.05, 0.0),
    ("nesterov", 0.05, 0.5),
    ("adam", 0.01, 0.0),
    ("adamw", 0.01, 0.5),
)
APART_RECIPES: tuple[Recipe, ...] = (
    ("sgd", 0.02, 0.0),
    ("sgd", 0.02, 0.5),
    ("momentum", 0.005, 0.0),
    ("nesterov", 0.005, 0.5),
    ("adam", 0.01, 0.0),
    ("adamw", 0.01, 0.5),
)
STALE_RECIPES = (*APART_RECIPES[:3], APART_RECIPES[4])

# Options of members that are worth a cell of their own, in a budget of 10 steps. A compression is
# shown with the first options of a strategy.
VARIANTS: dict[str, tuple[Fields, ...]] = {
    "synchronous": ({}, {"bucket_mib": 0.001}),  # which cuts the gradient into five buckets
    "asynchronous": ({"lock": "exclusive"}, {"lock": "none"}),
    "k_sync": (
        *({"backup_workers": count} for count in range(3)),
        {"backup_workers": 1, "wait": False, "batch": False},
        {"backup_workers": 1, "wait": False, "batch": True},
        {"backup_workers": 1, "batch": True},
        *(
            {"backup_workers": count, "late": "cancel", "batch": batch}
            for count in (0, 1)
            for batch in (False, True)
        ),
    ),
    "stale_synchronous": (
        {"slack": 0},
        {"slack": 1},
        {"slack": 3},
        *({"slack": slack, "apply": "per_push"} for slack in (0, -1)),
    ),
    "local_sgd": (
        {"local_steps": 2},
        {"local_steps": 1},
        {"local_steps": 5, "momentum": "averaged"},
        {"local_steps": 2, "warmup_steps": 4, "momentum": "reset"},
    ),
    "diloco": (
        {"local_steps": 2},
        {"local_steps": 5},
        {"local_steps": 10, "fragments": 2, "delay": 1},
        *({"local_steps": 5, "outer_bits": bits} for bits in (8, 4)),
        {"local_steps": 10, "fragments": 2, "delay": 1, "outer_bits": 4},
    ),
    "elastic_averaging": ({"period": 2}, {"period": 1}),
    "ddp": ({}, {"local_steps": 5}, {"local_steps": 2, "warmup_steps": 4}),
    # The library's PowerSGD would leave matrices of 8 x 8 as they are at rank 2.
    "powersgd": ({"rank": 1},),
    "pipeline": (
        {},
        {"schedule": "gpipe"},
        {"schedule": "interleaved"},
        {"schedule": "zero_bubble"},
        {"schedule": "zero_bubble", "num_chunks": 2},
    ),
    "fsdp": ({}, {"reshard": "full"}, {"reshard": "gradient_only"}),
    "hogwild": ({"lock": "exclusive"}, {"lock": "none"}),
}
