"""Figures, tables and the page of a plan, from stored results alone. seaborn lives only here; no
torch."""
