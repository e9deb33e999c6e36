"""What runs out, for the core alone: each pod has its share, is told why, and recovers by itself.

Two cores of one process each (support.corelab); the limits are made small by the core's own call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.corelab import (
    DECISION,
    POD,
    PORT,
    SERIES,
    SERVER_V4,
    Judged,
    Pair,
    pair,
)
from support.e2e import reset
from support.netns import DEADLINE, Namespace, wait_until
from ztunnel import _core

TICKS = os.sysconf("SC_CLK_TCK")


def forward_rule(judged: Judged, upcall: _core.Upcall) -> None:
    """Send everything on in plaintext."""
    number = DECISION + upcall.id
    judged.core.decide_forward(number, SERIES, b"", 0)
    judged.core.answer(upcall.id, upcall.epoch, number)


def refused(judged: Judged, reason: str) -> int:
    return judged.core.read_pod(POD).refused[_core.REASONS.index(reason)]


def is_reset(sock: socket.socket) -> bool:
    """Wait for the end of a connection on which nothing comes."""
    try:
        return not sock.recv(1)
    except ConnectionResetError:
        return True


def attempt(lab: Pair) -> socket.socket | None:
    """Connect; None when the reset of a refusal was quicker than the answer of connect()."""
    try:
        return lab.connect()
    except ConnectionResetError:
        return None


def works(lab: Pair, listener: socket.socket) -> None:
    """Assert that a new connection carries bytes."""
    sock = lab.connect()
    sock.sendall(b"x")
    assert lab.accept(listener)[0].recv(1) == b"x"
    sock.close()


@contextlib.contextmanager
def descriptors(most: int) -> Iterator[None]:
    """Let this process, which holds both cores, have so many descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_connections_beyond_a_limit_are_reset_and_counted_and_others_go_on() -> None:
    with pair(workers=1) as lab:
        listener = lab.listen()
        lab.client.core.set_limit("connections", 3)
        socks = [lab.connect() for _ in range(3)]
        for sock in socks:
            sock.sendall(b"x")
            assert lab.accept(listener)[0].recv(1) == b"x"
        turned_away = attempt(lab)
        assert turned_away is None or is_reset(turned_away)
        wait_until(lambda: refused(lab.client, "pod_connection_limit") == 1, "it is counted")
        lab.client.wait_ended(1)
        assert lab.client.reasons() == ["pod_connection_limit"]
        socks[0].sendall(b"y")
        reset(socks.pop())
        wait_until(lambda: lab.client.core.read_pod(POD).connections == 2, "one has ended")
        works(lab, listener)


def test_a_connect_request_beyond_a_limit_is_refused_and_others_go_on() -> None:
    with pair(workers=1) as lab:
        listener = lab.listen()
        lab.server.core.set_limit("connections", 1)
        first = lab.connect()
        first.sendall(b"x")
        served = lab.accept(listener)[0]
        assert served.recv(1) == b"x"
        turned_away = attempt(lab)
        assert turned_away is None or is_reset(turned_away)
        lab.client.wait_ended(1)
        assert lab.client.reasons() == ["unavailable_by_peer"]
        lab.server.wait_ended(1)
        assert lab.server.reasons() == ["pod_connection_limit"]
        first.sendall(b"y")
        assert served.recv(1) == b"y"
        reset(first)
        wait_until(lambda: lab.server.core.read_pod(POD).connections == 0, "it has ended")
        works(lab, listener)


def test_dials_to_nobody_are_bounded() -> None:
    with pair(forward_rule, workers=1) as lab:
        lab.client.core.set_limit("dials", 4)
        lab.client.core.set_deadline("connect", 60_000_000)
        lab.drop(PORT)
        socks = [attempt(lab) for _ in range(12)]
        lab.client.wait_ended(8)
        assert set(lab.client.reasons()) == {"pod_dial_limit"}
        assert lab.client.core.read_pod(POD).dials == 4
        lab.client.core.set_deadline("connect", 1)
        lab.client.wait_ended(12)
        assert lab.client.reasons()[8:] == ["connect_timeout"] * 4
        assert lab.client.core.read_pod(POD).dials == 0
        lab.client.core.set_deadline("connect", 10_000_000)
        lab.right.check_output("nft", "delete table inet lost")
        works(lab, lab.listen())
        del socks


def test_hbone_dials_count_too_and_those_that_wait_are_told() -> None:
    with pair(workers=1) as lab:
        lab.client.core.set_limit("dials", 1)
        lab.client.core.set_deadline("connect", 60_000_000)
        lab.drop(15008)
        first = lab.connect()
        wait_until(lambda: lab.client.core.read_pod(POD).dials == 1, "the peer is dialled")
        # Another destination, another peer: another dial.
        second = lab.connect("10.9.0.3")
        lab.client.wait_ended(1)
        assert lab.client.reasons() == ["pod_dial_limit"]
        assert refused(lab.client, "pod_dial_limit") >= 1
        first.close()
        second.close()


def test_one_greedy_pod_gets_half_of_the_descriptors() -> None:
    with descriptors(600), pair(workers=1) as lab:
        most = lab.client.core.stats().descriptors_most
        assert most < 600
        listener = lab.listen(backlog=600)
        greedy: list[socket.socket] = []
        with descriptors(2000):  # for the test's own sockets; the cores keep the first number
            while not refused(lab.client, "pod_descriptor_limit"):
                sock = attempt(lab)
                greedy += [sock] if sock is not None else []
                assert len(greedy) < most
            held = lab.client.core.read_pod(POD).descriptors
            # A half, less what HBONE connections keep for themselves.
            assert most / 2 * 0.85 < held <= most / 2 + 1
            listener.close()
            for each in greedy:
                reset(each)
            wait_until(lambda: lab.client.core.read_pod(POD).connections == 0, "all are closed")
            # The pool's: a hundred streams each.
            assert lab.client.core.read_pod(POD).descriptors <= 1 + most // 200
            works(lab, lab.listen())


def test_without_ports_the_reason_says_so_and_it_recovers() -> None:
    with pair(forward_rule, workers=1) as lab:
        listener = lab.listen()
        # Only the tunnel's own sockets may use them: the applications' are chosen by the test.
        lab.left.sysctl("net.ipv4.ip_local_port_range", "40000 40003")

        def connect(port: int) -> socket.socket:
            sock = lab.left.make_socket()
            sock.bind(("0.0.0.0", port))
            with contextlib.suppress(ConnectionResetError):
                sock.connect((SERVER_V4, PORT))
            return sock

        socks = [connect(30000 + number) for number in range(8)]
        wait_until(lambda: refused(lab.client, "no_ephemeral_ports"), "ports have run out")
        lab.client.wait_ended(1)
        assert set(lab.client.reasons()) == {"no_ephemeral_ports"}
        for sock in socks:
            sock.close()
        lab.left.sysctl("net.ipv4.ip_local_port_range", "41000 41999")
        again = connect(30100)
        again.sendall(b"again")
        got = b""
        while got != b"again":
            with contextlib.suppress(ConnectionResetError):
                got = lab.accept(listener)[0].recv(16)


def test_too_many_handshakes_end_the_oldest_and_streams_go_on() -> None:
    with pair(workers=1) as lab:
        listener = lab.listen()
        works(lab, listener)
        lab.server.core.set_limit("handshakes", 16)
        storm = [lab.raw() for _ in range(64)]
        wait_until(lambda: refused(lab.server, "pod_handshake_limit") >= 48, "the oldest give way")
        # One more while it is counted and the oldest is not yet: the worker does both, in turn.
        assert lab.server.core.read_pod(POD).handshakes <= 17
        wait_until(lambda: lab.server.core.read_pod(POD).handshakes == 16, "the limit is kept")
        works(lab, listener)
        for sock in storm:
            sock.close()
        wait_until(lambda: lab.server.core.read_pod(POD).handshakes == 0, "all have ended")


def cpu(pid: str = "self") -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def test_a_listener_that_cannot_be_served_wakes_nobody_without_end() -> None:
    """Every descriptor is taken, the workers' spare ones too: callers wait in the kernel."""
    with pair(workers=2) as lab:
        listener = lab.listen()
        works(lab, listener)
        waiting = [lab.left.make_socket() for _ in range(4)]
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        # Below what is open: not even a closed descriptor's number may be used again.
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            for sock in waiting:
                sock.connect((SERVER_V4, PORT))
            began, used = time.monotonic(), os.times()
            turns = lab.client.core.stats().last_loop_us
            wait_until(lambda: time.monotonic() > began + 1.0, "a second has passed")
            after = os.times()
            spent = after.user + after.system - used.user - used.system
            passed = time.monotonic() - began
            assert lab.client.core.stats().last_loop_us != turns
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        # The wait above looks a hundred times a second; a spinning worker uses all of a processor.
        assert spent < 0.5 * passed
        for sock in waiting:
            sock.sendall(b"x")
        assert {lab.accept(listener)[0].recv(1) for _ in waiting} == {b"x"}


# --- queues of listeners --------------------------------------------------------------------------


def overflows(pod: Namespace) -> int:
    """Return how often a listener of the namespace had no room for a connection (TcpExt)."""
    names, values = (
        line.split()
        for line in pod.check_output("cat", "/proc/net/netstat").splitlines()
        if line.startswith("TcpExt:")
    )
    return int(values[names.index("ListenOverflows")])


def test_callers_whom_our_own_queue_does_not_hold_are_served_in_the_end() -> None:
    """A burst while nobody accepts: the kernel drops what has no room, and callers ask again."""
    callers = 64
    with pair(workers=2) as lab:
        listener = lab.listen()
        works(lab, listener)
        (ours,) = (
            sock
            for sock in lab.client.keep
            if isinstance(sock, socket.socket) and sock.getsockname()[1] == PORT
        )
        ours.listen(8)
        waiting = [lab.left.make_socket() for _ in range(callers)]
        before, known = resource.getrlimit(resource.RLIMIT_NOFILE), overflows(lab.left)
        # Below what is open: the workers can accept nobody.
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            for sock in waiting:
                sock.setblocking(False)
                assert sock.connect_ex((SERVER_V4, PORT)) == errno.EINPROGRESS
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert overflows(lab.left) - known > callers / 2
        for number, sock in enumerate(waiting):
            assert select.select([], [sock], [], DEADLINE)[1]
            sock.settimeout(DEADLINE)
            sock.sendall(bytes([number]))
        served = [lab.accept(listener)[0] for _ in waiting]
        said = [sock.recv(1) for sock in served]
        assert sorted(said) == [bytes([number]) for number in range(callers)]
        for sock, byte in zip(served, said, strict=True):
            sock.sendall(byte)
        assert [sock.recv(1) for sock in waiting] == sorted(said)


def test_callers_whom_an_applications_queue_does_not_hold_are_told() -> None:
    """It accepts nobody: who has no room in its queue ends by the deadline, with a reason."""
    callers, backlog = 12, 2
    with pair(workers=1) as lab:
        listener = lab.listen(backlog=backlog)
        lab.server.core.set_deadline("connect", 1_000_000)
        socks = [lab.connect() for _ in range(callers)]
        for number, sock in enumerate(socks):
            sock.sendall(bytes([number]))
        # A queue holds one more than it is said to (listen(2), sk_acceptq_is_full).
        refused = callers - backlog - 1
        lab.server.wait_ended(refused)
        assert overflows(lab.right) >= refused
        lab.client.wait_ended(refused)
        assert lab.server.reasons() == ["connect_timeout"] * refused
        assert lab.server.expired() == {"connect": refused}
        assert lab.client.reasons() == ["unavailable_by_peer"] * refused
        kept = {
            number: sock
            for number, sock in enumerate(socks)
            if not select.select([sock], [], [], 0)[0]
        }
        assert len(kept) == backlog + 1
        assert all(is_reset(sock) for number, sock in enumerate(socks) if number not in kept)
        # Those who had room in it were connected, and what they said is there.
        assert {lab.accept(listener)[0].recv(1) for _ in kept} == {bytes([each]) for each in kept}
        works(lab, listener)


@pytest.mark.parametrize("name", ["connections", "dials", "questions", "handshakes", "held_bytes"])
def test_every_limit_has_a_name(name: str) -> None:
    with pair(workers=1) as lab:
        assert name in _core.LIMITS
        lab.client.core.set_limit(name, 7)
        with pytest.raises(KeyError, match="no limit is called lunch"):
            lab.client.core.set_limit("lunch", 7)
        with pytest.raises(KeyError, match="pod: unknown number"):
            lab.client.core.read_pod(99)
