"""Whose the connections are that a pod had before its capture, and which of them are cut."""

from __future__ import annotations

import socket

import pytest

from nodeagent.capture.layout import MARK_DELIVERY, MARK_OLDER, MARK_TUNNEL
from nodeagent.capture.model import OlderCaller
from nodeagent.capture.older import MAX_CALLERS, Connection, callers, to_cut

OWN = frozenset({"10.0.0.1", "fd00::1"})
CHOSEN = range(32768, 61000)


def connection(remote: str, port: int = 8080, mark: int = MARK_OLDER) -> Connection:
    return Connection(int(socket.AF_INET), bytes(48), port, remote, mark)


@pytest.mark.parametrize("remote", ["10.0.0.2", "fd00::2", "fe80::2", "203.0.113.9"])
def test_marked_connections_to_elsewhere_are_cut(remote: str) -> None:
    found = [connection(remote)]
    assert to_cut(found, OWN, lambda _port: True) == found


@pytest.mark.parametrize("remote", ["10.0.0.1", "fd00::1", "127.0.0.1", "127.8.8.8", "::1"])
def test_connections_inside_the_pod_live_on(remote: str) -> None:
    assert to_cut([connection(remote)], OWN, lambda _port: True) == []


@pytest.mark.parametrize("mark", [0, MARK_TUNNEL, MARK_DELIVERY])
def test_only_marked_ones_are_older(mark: int) -> None:
    assert to_cut([connection("10.0.0.2", mark=mark)], OWN, lambda _port: True) == []


def test_the_mode_of_the_local_port_decides() -> None:
    strict, other = connection("10.0.0.2", 80), connection("10.0.0.2", 90)
    assert to_cut([strict, other], OWN, lambda port: port == 80) == [strict]


# --- whose they are -----------------------------------------------------------------------------


def test_callers_are_told_by_address_and_port() -> None:
    found = [
        connection("10.0.0.9", 80),
        connection("10.0.0.9", 80),
        connection("10.0.0.9", 81),
        connection("fd00::9", 80),
    ]
    assert set(callers(found, OWN, {80, 81}, CHOSEN)) == {
        OlderCaller("10.0.0.9", 80, 2),
        OlderCaller("10.0.0.9", 81, 1),
        OlderCaller("fd00::9", 80, 1),
    }


def test_newer_ones_and_those_within_the_pod_are_none() -> None:
    found = [connection("10.0.0.9", mark=0), *map(connection, ("10.0.0.1", "127.0.0.1", "::1"))]
    assert callers(found, OWN, {8080}, CHOSEN) == ()


def test_what_the_pod_called_is_told_apart_by_its_port() -> None:
    assert callers([connection("10.0.0.9", 40000)], OWN, {80}, CHOSEN) == ()
    # Somebody listens there; and a listener may have been closed behind its connections.
    assert callers([connection("10.0.0.9", 40000)], OWN, {40000}, CHOSEN) != ()
    assert callers([connection("10.0.0.9", 80)], OWN, (), CHOSEN) != ()


def test_those_without_room_are_one() -> None:
    found = [connection(f"10.1.0.{each}") for each in range(MAX_CALLERS + 3)]
    found.append(found[-1])
    told = callers(found, OWN, {80}, CHOSEN)
    assert len(told) == MAX_CALLERS + 1
    assert told[0].connections == 2
    assert told[-1] == OlderCaller("", 0, 3)
