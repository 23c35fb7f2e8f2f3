"""The items of `benchsuite selfcheck`, in the order in which they are measured.

In a file of its own, which imports nothing: the command line names them in its help.
"""

ITEMS = (
    "commands",
    "launch",
    "harness",
    "ring",
    "server",
    "parallel",
    "hierarchical",
    "overlap",
    "profile",
    "compression",
    "virtual",
    "store",
    "report",
)
