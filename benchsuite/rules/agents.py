"""The rule of agents: how many environments each worker has.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable

from benchsuite.rules.view import Problem, Problems, View

PLACE = 20


def environments(view: View) -> Problems:
    """The number of replicas divides the environments of reinforcement learning.

    So each environment's stream of states stays the same for any number of workers.
    """
    environments = view.number("workload", "num_environments")
    together = view.cell.batch_mode == "fixed_global"  # else every worker has so many
    if environments and together and view.cell.replicas >= 1 and environments % view.cell.replicas:
        yield Problem(
            "environments",
            f"num_environments({environments:g}) is not divisible by "
            f"replicas({view.cell.replicas})",
            "set replicas to a divisor of the environments",
        )


RULES: tuple[Callable[[View], Problems], ...] = (environments,)
