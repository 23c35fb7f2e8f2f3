"""Stored runs: what a run file holds, where it lies, and the table of all of them."""
