"""The life of one rank, worker or server: its pieces put together from a cell, its loop, clock
and record.
"""
