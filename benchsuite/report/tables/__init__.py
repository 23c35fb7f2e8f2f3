"""The tables of a report, as HTML, CSV, Markdown and LaTeX."""
