"""The items of `benchsuite selfcheck`, in the order in which they are measured.

They have a file of their own, which imports nothing, because the command line names them in its
help.
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
