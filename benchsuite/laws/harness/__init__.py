"""The ground that the laws stand on.

Cells to show the laws on, ranks to run them with, broken twins that they must catch, and serial
references that they compare with.
"""
