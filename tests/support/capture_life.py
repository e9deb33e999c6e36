"""A captured pod, and what its tests of life and failure share."""

from __future__ import annotations

import pytest

from nodeagent.capture import (
    CaptureError,
)
from support.captured import Captured


def assert_gone(world: Captured, before: str) -> None:
    assert world.pod.dump() == before
    assert world.pins() == []


def failure(world: Captured, **kwargs: object) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        world.enrol(**kwargs)  # type: ignore[arg-type]  # enrol's own
    return caught.value
