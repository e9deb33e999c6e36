"""One lab and one right Envoy for all interop tests; see `support.interop`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.lab import Lab
from support import interop
from support.e2e import running
from support.envoy import Envoy, issue, redirect


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    with running(interop.described()) as made:
        for pod in ("envoy", "stranger"):
            redirect(made, pod)
        yield made


@pytest.fixture
def mesh(lab: Lab, tmp_path: Path) -> Iterator[interop.Interop]:
    with interop.session(lab, tmp_path) as found:
        yield found


@pytest.fixture(scope="session")
def envoy(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    directory = tmp_path_factory.mktemp("envoy")
    own = issue(lab, interop.spiffe("envoy"))
    with interop.session(lab, directory) as found, found.envoy("envoy", own) as started:
        yield started
