"""The rules of agents: who has them, how many environments, which trajectories. No torch."""

from __future__ import annotations

from collections.abc import Callable

from benchsuite.rules.combinations import SERVER
from benchsuite.rules.view import Problem, Problems, View


def actor_learner(view: View) -> Problems:
    """Reinforcement learning with one learner."""
    if view.name("sync") != "actor_learner":
        return
    built = view.name("workload") == "rl_agent" or view.constant(
        "workload", "collects"
    )  # a user's agent says so
    if not built:
        yield Problem(
            "actor_learner",
            f"sync = actor_learner with workload = {view.label('workload')}: actors collect "
            "rollouts",
            "set workload = rl_agent, or choose another sync",
        )
    micro = view.number("parallel", "num_micro_batches") or 1
    if micro > 1:
        yield Problem(
            "actor_learner",
            f"num_micro_batches = {micro:g} with sync = actor_learner: a trajectory is not cut "
            "into pieces",
            "set num_micro_batches = 1, or batches_per_trajectory lower",
        )
    if view.name("topology") in SERVER and view.cell.num_servers != 1:
        yield Problem(
            "actor_learner",
            f"servers = {view.cell.num_servers} with sync = actor_learner: the one server is the "
            "learner",
            "set servers = 1",
        )


def environments(view: View) -> Problems:
    """Reinforcement learning: N divides the environments, so that their streams stay the same for
    any N."""
    environments = view.number("workload", "num_environments")
    batch = view.number("workload", "global_batch")
    together = view.cell.batch_mode == "fixed_global"  # else every worker has so many
    if view.name("workload") == "rl_agent" and environments and batch and batch != 2 * environments:
        yield Problem(
            "environments",
            f"global_batch({batch:g}) is not 2 x num_environments({environments:g}): a minibatch "
            "stands for 2 steps of "
            "each environment",
            f"set options.rl_agent.global_batch = {2 * environments:g}",
        )
    if environments and together and view.cell.replicas >= 1 and environments % view.cell.replicas:
        yield Problem(
            "environments",
            f"num_environments({environments:g}) is not divisible by "
            f"replicas({view.cell.replicas})",
            "set replicas to a divisor of the environments",
        )


def trajectories(view: View) -> Problems:
    """Actors hand over whole trajectories, and use the budget up."""
    if view.name("sync") != "actor_learner":
        return
    for name, least in (("batches_per_trajectory", 1), ("steps_per_trajectory", 1), ("ahead", 0)):
        value = view.number("sync", name)
        if value is not None and value < least:
            yield Problem(
                "trajectories",
                f"{name} = {value:g} of {view.label('sync')}: at least {least} is needed",
                f"set options.{view.label('sync')}.{name} = {least} or more",
            )
            return
    length = view.number("sync", "batches_per_trajectory")
    steps = view.steps
    if length and steps is not None and steps * view.cell.replicas % length:
        yield Problem(
            "trajectories",
            f"steps({steps}) x replicas({view.cell.replicas}) is not divisible by "
            f"batches_per_trajectory({length:g}): "
            "a part of the budget would not be used",
            "set batches_per_trajectory to a divisor, or the budget to a multiple",
        )


RULES: tuple[Callable[[View], Problems], ...] = (actor_learner, environments, trajectories)
