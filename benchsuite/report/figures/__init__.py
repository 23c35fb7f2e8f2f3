"""The kinds of figures, one per file; what they draw with stands in `report.drawing`."""
