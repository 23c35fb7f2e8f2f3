"""Benchmarks for asv, which is a front end here: the harness measures, asv stores and draws.

asv.conf.json, in the repository's root, points here.

    asv machine --yes
    asv run -E existing --set-commit-hash $(git rev-parse HEAD) --record-samples
    asv publish

asv knows only figures of which lower is better, so times, bytes and losses are exported, and
throughput never is.
"""
