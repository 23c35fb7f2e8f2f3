"""The virtual world: the same strategy files with real gradients, a simulated clock and a simulated
network.

`clock.py` runs ranks as greenlets in virtual time, `network.py` gives every rank a port,
`compute_time.py` says how long a gradient takes, `gradients.py` and `part.py` compute outstanding
gradients together, `world.py` runs a cell, `simulator.py` is the process that `benchsuite run`
hands cells to. The `Comm` of this world is `comm/virtual.py`.
"""
