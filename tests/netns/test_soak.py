"""The soak in short: the same program, load and faults for half a minute."""

from __future__ import annotations

import pytest

from soak.run import soak

MINUTES = 0.5


@pytest.mark.slow
def test_a_short_soak_leaves_nothing_behind() -> None:
    said: list[str] = []
    report = soak(MINUTES, said.append)
    print("\n".join([*said, *report.table()]))  # noqa: T201 - shown with a failure
    assert report.problems == []
    # It is worth nothing unless all of it took place.
    for fault in ("kill ztunnel", "upgrade ztunnel", "kill nodeagent", "restart nodeagent"):
        assert report.done[fault]
    assert report.done["STRICT and back"]
    assert {"bulk both ways", "requests", "new connections"} <= report.ledger.succeeded.keys()
