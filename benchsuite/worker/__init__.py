"""The life of one rank, worker or server.

Its pieces are put together from a cell (`setup.py`), it runs its loop by its clock, and it writes
its record.
"""
