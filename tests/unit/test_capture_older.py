"""Which connections of before are cut."""

from __future__ import annotations

import socket

import pytest

from nodeagent.capture.layout import MARK_DELIVERY, MARK_OLDER, MARK_TUNNEL
from nodeagent.capture.older import Connection, to_cut

OWN = frozenset({"10.0.0.1", "fd00::1"})


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
