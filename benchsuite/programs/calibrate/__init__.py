"""Micro-measurements of links and gradients, which the cost model and the virtual clock are fitted
to."""
