"""The mesh that the fault tests of one module share, and what each of them sees of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeagent.lab import Lab
from support.e2e import Mesh, running, spec, watched


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made
