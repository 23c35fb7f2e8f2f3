"""The virtual world: the same strategy files with real gradients, a simulated clock and network.

`clock.py` runs ranks as greenlets in virtual time. `network.py` gives every host a port.
`streams.py` says how long a gradient takes. `gradients.py` and `part.py` compute outstanding
gradients together. `comm.py` is the `Comm` of this world. `world.py` runs a cell; the process that
`benchsuite run` hands cells to is `cluster/simulator_process.py`.
"""
