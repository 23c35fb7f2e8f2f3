"""The sentences of a page: what the runs answer, and what the numbers do not say."""
