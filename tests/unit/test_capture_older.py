"""Whose the connections are that a pod had before its capture."""

from __future__ import annotations

import socket

from nodeagent.capture.layout import MARK_OLDER
from nodeagent.capture.model import OlderCaller
from nodeagent.capture.older import MAX_CALLERS, Connection, callers

OWN = frozenset({"10.0.0.1"})
CHOSEN = range(32768, 61000)


def connection(remote: str = "10.0.0.9", port: int = 80, mark: int = MARK_OLDER) -> Connection:
    return Connection(socket.AF_INET, b"", port, remote, mark)


def test_callers_are_told_by_address_and_port() -> None:
    found = [connection(), connection(), connection(port=81), connection("fd00::9")]
    assert set(callers(found, OWN, {80, 81}, CHOSEN)) == {
        OlderCaller("10.0.0.9", 80, 2),
        OlderCaller("10.0.0.9", 81, 1),
        OlderCaller("fd00::9", 80, 1),
    }


def test_newer_ones_and_those_within_the_pod_are_none() -> None:
    found = [connection(mark=0), connection("10.0.0.1"), connection("127.0.0.1"), connection("::1")]
    assert callers(found, OWN, {80}, CHOSEN) == ()


def test_what_the_pod_called_is_told_apart_by_its_port() -> None:
    assert callers([connection(port=40000)], OWN, {80}, CHOSEN) == ()
    # Somebody listens there; and a listener may have been closed behind its connections.
    assert callers([connection(port=40000)], OWN, {40000}, CHOSEN) != ()
    assert callers([connection(port=80)], OWN, (), CHOSEN) != ()


def test_those_without_room_are_one() -> None:
    found = [connection(f"10.1.0.{each}") for each in range(MAX_CALLERS + 3)]
    found.append(found[-1])
    told = callers(found, OWN, {80}, CHOSEN)
    assert len(told) == MAX_CALLERS + 1
    assert told[0].connections == 2
    assert told[-1] == OlderCaller("", 0, 3)
