"""Fixtures of the acceptance tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.acceptance.beds import Hosts
from ulnet.kernelshim.testbed import can_testbed


@pytest.fixture(scope="module")
def served() -> Iterator[Hosts]:
    """One server for a file of tests."""
    reason = can_testbed()
    if reason is not None:
        pytest.skip(reason)
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.fixture
def hosts(served: Hosts) -> Iterator[Hosts]:
    """The server with nothing in it, before and after the test."""
    yield served
    served.tidy()
