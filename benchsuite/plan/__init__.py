"""The question: cells, plans that list them, and what the files of their members say.

Imports no torch.
"""
