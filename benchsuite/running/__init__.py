"""Running what a plan lacks: the loop over cells, who starts them, tuning, progress, forecasts.

`api.py` is the Python face of the suite; `benchsuite.run` is a function of it, and for this reason
the room has another name.
"""
