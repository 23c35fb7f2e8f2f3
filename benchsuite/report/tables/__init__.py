"""The kinds of tables, one per file; `report.printed` writes them as CSV, Markdown and TeX."""
