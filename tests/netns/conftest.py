"""Fixtures of the tests in network namespaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.captured import Captured, captured


@pytest.fixture
def world() -> Iterator[Captured]:
    """A captured pod with a stand-in for the tunnel."""
    with captured() as made:
        yield made
