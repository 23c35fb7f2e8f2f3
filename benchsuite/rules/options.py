"""The rules on options that several workloads have: bounds, heads, places of data.

Options of one member only are bounded in the member's file. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from benchsuite.rules.view import Problem, Problems, View

PLACE = 50
FROM_A_PATH = {"text": "file", "cifar10": "folder", "imagenet": "folder"}


def workloads(view: View) -> Problems:
    """Heads divide the width; data from files have a place that every rank finds."""
    label = view.label("workload")
    data = view.option("workload", "data")
    path = view.option("workload", "path")
    width = view.number("workload", "width")
    heads = view.number("workload", "heads")
    if width is not None and heads is not None and (heads < 1 or width % heads):
        yield Problem(
            "heads",
            f"width({width:g}) is not a multiple of heads({heads:g}): each head has as many "
            "elements",
            f"set options.{label}.heads to a divisor of {width:g}",
        )

    is_whole = str(path).startswith("~") or PurePath(str(path)).is_absolute()
    if path is not None and data in FROM_A_PATH and not is_whole:
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

    width = view.number("workload", "width")
    heads = view.number("workload", "heads")
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


RULES: tuple[Callable[[View], Problems], ...] = (workloads, bounds)
