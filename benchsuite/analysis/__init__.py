"""From the tidy table of runs to what a figure or a table prints.

Works from stored files alone and imports no torch.
"""
