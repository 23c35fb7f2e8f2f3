"""Nobody works in threes."""

from benchsuite.rules.view import Problem

PLACE = 1


def no_threes(view):
    """Refuses three workers."""
    if view.cell.replicas == 3:
        yield Problem("threes", "replicas = 3: a crowd", "set replicas = 2 or 4")


RULES = (no_threes,)
