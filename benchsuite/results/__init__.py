"""Run files: how one is written, stored, checked, assembled from its ranks and turned into a
table.
"""
