"""What the suite itself costs, item by item, each beside a loop that does the same work by hand."""
