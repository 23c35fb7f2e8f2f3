"""The figures of a report: what they draw on, and one file per kind of figure."""
