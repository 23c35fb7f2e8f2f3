"""The page of a plan: its figures, tables and sentences, made from stored results alone.

Only this package imports matplotlib and seaborn. Nothing here imports torch.
"""
