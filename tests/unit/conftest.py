"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.d"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """What a test configures of logging is over with it."""
    yield
    structlog.reset_defaults()
