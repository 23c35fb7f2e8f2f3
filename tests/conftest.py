"""Fixtures that several files share: one cluster for all tests that train with the real worker."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchsuite.cluster.local import Cluster
from tests.bench import Bench


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    with Cluster() as cluster:
        yield Bench(cluster)
