"""Fixtures that several files share: one cluster for all tests that train with the real worker."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator

import pytest

from benchsuite.cluster.local import Cluster
from benchsuite.laws.harness.ranks import run_as_batch_work
from tests.bench import Bench

# A shell that starts the tests in the background ignores Ctrl-C for them, and whatever they start
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Whatever the tests start inherits it; no test looks at how long anything takes.
run_as_batch_work()


def pytest_collection_finish() -> None:
    """Modules and collected tests stay for ever: looking through them again costs every collection
    of garbage 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    with Cluster() as cluster:
        yield Bench(cluster)
