"""Workloads that ship with benchsuite: one file each, found by file name."""
