"""Meters and facts: time, memory, load, bytes on a wire, and what a run ran on.

Each looks at one thing, from outside of the strategy that is measured.
"""
