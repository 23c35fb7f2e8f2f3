"""asv is a front end here: the harness measures, these classes hand its figures over (docs:
asv.conf.json).

    asv machine --yes
    asv run -E existing --set-commit-hash $(git rev-parse HEAD) --record-samples
    asv publish

asv knows lower-is-better only: times, bytes and losses are exported, never throughput.
"""
