"""Programs around the suite, each of which measures or reports something other than a cell.

They tell what a machine can do, what the suite itself costs, how links and gradients are calibrated
and what a GPU does; two hand figures over to asv and to Chakra's tools.
"""
