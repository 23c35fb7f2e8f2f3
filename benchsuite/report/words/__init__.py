"""The sentences of a report: labels, captions, answers to the question of a plan, and what the
numbers do not say."""
