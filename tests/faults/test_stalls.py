"""Readers that stop: what each may hold, and that it stops nobody else.

A stalled reader holds, besides what its own socket takes:

    in this process   the stream's window: 256 KiB, or what it has earned by reading quickly, 4 MiB
                      at most; the streams of one HBONE connection earn 16 MiB together, and all
                      readers of a pod hold 128 MiB, beyond which a stream is reset
    in the kernel     1 MiB that is not sent (TCP_NOTSENT_LOWAT), and a pipe of 256 KiB where
                      plaintext is relayed

What its sender could say beyond that lies in the sender's socket and unread in the tunnel's, as far
as the kernel lets these grow (net.ipv4.tcp_wmem, tcp_rmem): as it would without a tunnel.

A peer that does not read its HBONE connection holds one batch of ciphertext (256 KiB) and one
socket's send buffer, whatever its streams have to say.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from nodeagent.lab import Lab
from support.e2e import HBONE_PORT, Mesh, authority, reset, running, spec
from support.hbone import ACK, Client, Kind, encoded
from support.netns import DEADLINE, wait_until

KIB: Final = 1024
MIB: Final = 1024 * KIB
FIRST_WINDOW: Final = 256 * KIB
"""ZT_STREAM_WINDOW."""
WINDOW_MOST: Final = 4 * MIB
"""ZT_STREAM_WINDOW_MOST."""
GROWTH: Final = 16 * MIB
"""ZT_CONN_GROWTH."""
POD_HELD: Final = 128 * MIB
"""ZT_POD_HELD."""
UNSENT_MOST: Final = 1 * MIB + 64 * KIB
"""ZT_UNSENT_BYTES and one segment: the kernel asks before it begins one (tcp_sendmsg_locked,
sk_stream_memory_free), which is then filled, up to 64 KiB (GSO_LEGACY_MAX_SIZE)."""
PIPE: Final = 256 * KIB
"""PIPE_BYTES of the relay."""
STREAMS: Final = 199
"""One less than a connection may have."""
CHUNKS: Final = 1.05
"""What is held is counted with the chunks that it lies in."""
KEPT: Final = 8 * MIB
"""What the allocator may keep of some 50 MiB once they are free: it gives back whole pages."""
SMALL: Final = 4 * KIB
"""A receive buffer for readers that never read."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    # A sender answers PINGs only while it is at work: with three of them, on a slow machine, that
    # is longer than the tunnel waits.
    settings = {"deadlines": {"ping_interval": 300}}
    with running(spec(apps=False, settings=settings)) as made:
        yield made


class Sender:
    """A client that sends on its streams whatever their windows allow."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.windows: dict[int, int] = {}
        self._connection = 65535
        self._first = 0

    def open(self, to: str) -> int:
        stream = self.client.connect(to)
        while stream not in self.client.headers:
            self._step()
        assert self.client.status(stream) == 200
        self.windows.setdefault(stream, self._first)
        return stream

    def _step(self) -> None:
        frame = self.client.step()
        if frame.kind == Kind.SETTINGS and not frame.flags & ACK:
            self._first = dict(struct.iter_unpack("!HI", frame.payload))[4]
        elif frame.kind == Kind.WINDOW_UPDATE:
            more = int.from_bytes(frame.payload)
            if frame.stream:
                self.windows[frame.stream] = self.windows.get(frame.stream, self._first) + more
            else:
                self._connection += more

    def push(self, stream: int, most: int = 1 << 40) -> int:
        """Send what the windows allow now; how much it was."""
        self.take()
        sent = 0
        while stream not in self.client.resets:
            size = min(self.windows[stream], self._connection, 64 * KIB, most - sent)
            if size <= 0:
                return sent
            self.client.tls.send(encoded(Kind.DATA, 0, stream, bytes(size)))
            self.windows[stream] -= size
            self._connection -= size
            sent += size
            self.take()
        return sent

    def take(self) -> None:
        while self.client.has_come():
            self._step()

    def push_all(self) -> int:
        """Send on all streams until no window opens any more; how much it was."""
        total = 0
        while True:
            sent = sum(self.push(stream) for stream in list(self.windows))
            total += sent
            if not sent and not self.client.has_come(0.3):
                return total


def held(mesh: Mesh, pod: str) -> float:
    return mesh.count(pod, "ztunnel_held_bytes")


def resident(mesh: Mesh, pod: str) -> int:
    """Bytes of memory of the tunnel of this pod's node; 0 under a sanitizer, which keeps it all."""
    process = Path(f"/proc/{mesh.lab.node(mesh.node_of(pod)).process('ztunnel').pid}")
    if re.search(r"/lib[at]san\.", (process / "maps").read_text()):
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())
    assert found is not None
    return int(found[1]) * KIB


class Queues(NamedTuple):
    """What the kernel keeps of one socket, in bytes."""

    unread: int
    unacknowledged: int
    """What was sent to it and is not at the other end, sent on or not."""
    unsent: int
    memory: int
    """What the bytes to be sent lie in: in segments of 2 KiB, half of the window of readers as
    here, 1.4 times their number (measured)."""


def sockets(mesh: Mesh, pod: str, port: int) -> dict[tuple[int, int], Queues]:
    """The connections of a pod's namespace with this port at either end, by own and other port."""
    wanted = ["sport", "=", f":{port}", "or", "dport", "=", f":{port}"]
    shown = mesh.lab.run(mesh.uid(pod), ["ss", "-tnHimO", *wanted]).stdout
    row = re.compile(r"^\S+ +(\d+) +(\d+) +\S+:(\d+) +\S+:(\d+) .*,w(\d+),(.*)$", re.MULTILINE)
    found = {}
    for unread, unacknowledged, own, other, memory, rest in row.findall(shown):
        unsent = re.search(r" notsent:(\d+)", rest)
        found[int(own), int(other)] = Queues(
            int(unread), int(unacknowledged), int(unsent[1]) if unsent else 0, int(memory)
        )
    return found


def unsent_within_bounds(found: Sequence[Queues]) -> None:
    assert found
    assert max(each.unsent for each in found) <= UNSENT_MOST
    assert max(each.memory for each in found) <= 2 * UNSENT_MOST


class Still(NamedTuple):
    """Where the bytes of calls lie when nothing moves any more."""

    tunnels: list[int]
    """Of each call: neither at its ends nor in a socket of the tunnels towards them."""
    towards: list[Queues]
    """The tunnels' sockets towards the readers."""


def still(
    mesh: Mesh,
    server: str,
    calls: Sequence[tuple[socket.socket, socket.socket, int]],
    taken: Sequence[int],
) -> Still:
    """Wait until nothing moves, and account for all that the clients' sockets have taken."""
    port = calls[0][2]
    # The tunnel that speaks to an outsider is the client's own.
    speaks = "client" if server == "outsider" else server

    def seen() -> list[dict[tuple[int, int], Queues]]:
        return [sockets(mesh, pod, port) for pod in ("client", speaks, server)]

    def rests() -> list[dict[tuple[int, int], Queues]]:
        before = seen()
        return before if seen() == before else []

    ours, speaking, theirs = wait_until(rests, "nothing moves")
    tunnels, towards = [], []
    for (sock, app, _), sent in zip(calls, taken, strict=True):
        near, far = sock.getsockname()[1], app.getpeername()[1]
        tunnel = speaking[far, port]
        towards.append(tunnel)
        ends = (
            ours[near, port].unacknowledged
            + ours[port, near].unread
            + tunnel.unacknowledged
            + theirs[port, far].unread
        )
        tunnels.append(sent - ends)
    return Still(tunnels, towards)


def hbone_connections(mesh: Mesh, client: str, server: str) -> int:
    """How many HBONE connections a pod's tunnel has to another pod."""
    wanted = ["dport", "=", f":{HBONE_PORT}", "and", "dst", mesh.address(server)]
    shown = mesh.lab.run(mesh.uid(client), ["ss", "-tnH", *wanted]).stdout
    return len(shown.splitlines())


def stalled_listener(mesh: Mesh, pod: str) -> socket.socket:
    listener = mesh.listen(pod, backlog=4096)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    return listener


def fill(socks: Sequence[socket.socket]) -> list[int]:
    """Send on all until none takes more for a while; how much each has taken."""
    sent = dict.fromkeys(socks, 0)
    for sock in socks:
        sock.setblocking(False)
    while ready := select.select([], socks, [], 0.5)[1]:
        for sock in ready:
            with contextlib.suppress(BlockingIOError):
                sent[sock] += sock.send(bytes(256 * KIB))
    for sock in socks:
        sock.settimeout(DEADLINE)
    return list(sent.values())


def test_stalled_readers_of_one_connection_hold_a_bounded_number_of_bytes(mesh: Mesh) -> None:
    listener = stalled_listener(mesh, "far")
    port = listener.getsockname()[1]
    to = authority(mesh.address("far"), port)
    before = resident(mesh, "far")
    sender = Sender(mesh.hbone("twin", "far"))
    for _ in range(STREAMS):
        sender.open(to)
        mesh.accept(listener)
    assert sender.push_all() >= STREAMS * FIRST_WINDOW
    # What the reader's socket has taken at first may have earned some a wider window.
    most = (STREAMS * FIRST_WINDOW + GROWTH) * CHUNKS
    assert STREAMS * FIRST_WINDOW / 4 < held(mesh, "far") <= most
    assert resident(mesh, "far") - before <= most + GROWTH
    found = sockets(mesh, "far", port)
    unsent_within_bounds([each for (_, other), each in found.items() if other == port])
    # One more stream of the same connection is served as if nothing were.
    stream = sender.open(to)
    app, _ = mesh.accept(listener)
    for number in range(100):
        sender.client.send(stream, b"%3d" % number)
        assert app.recv(3, socket.MSG_WAITALL) == b"%3d" % number
    assert not resident(mesh, "far") or resident(mesh, "far") - before > KEPT
    sender.client.close()
    wait_until(lambda: held(mesh, "far") == 0, "everything is given back")
    wait_until(lambda: resident(mesh, "far") - before <= KEPT, "to the system too")


def test_windows_that_were_earned_are_bounded_together(mesh: Mesh) -> None:
    """Readers that were quick, and stop all at once."""
    listener = mesh.listen("far")
    to = authority(mesh.address("far"), listener.getsockname()[1])
    sender = Sender(mesh.hbone("twin", "far"))
    number, earned = 6, 0
    for _ in range(number):
        stream = sender.open(to)
        app, _ = mesh.accept(listener)
        reading = threading.Thread(target=_read, args=(app, 6 * MIB))
        reading.start()
        left = 6 * MIB
        while left:
            left -= sender.push(stream, left)
            sender.client.has_come(0.05)
        reading.join()
        sender.take()
        earned += sender.windows[stream] - FIRST_WINDOW
    # Some have earned more than the first window, and no more than all may.
    assert MIB < earned <= GROWTH
    sender.push_all()
    assert held(mesh, "far") <= (number * FIRST_WINDOW + GROWTH) * CHUNKS


def _read(sock: socket.socket, size: int) -> None:
    while size:
        size -= len(sock.recv(min(size, MIB)))


def test_stalled_readers_of_one_pod_are_bounded_and_its_neighbours_are_served(mesh: Mesh) -> None:
    """Three connections would hold 150 MiB: the streams beyond the limit are reset."""
    bystander, app, _ = mesh.call("client", "far")
    listener = stalled_listener(mesh, "near")
    port = listener.getsockname()[1]
    to = authority(mesh.address("near"), port)
    senders = [Sender(mesh.hbone("twin", "near")) for _ in range(3)]
    apps = []
    for sender in senders:
        for _ in range(STREAMS):
            sender.open(to)
            apps.append(mesh.accept(listener)[0])
    for sender in senders:
        sender.push_all()
        assert held(mesh, "near") <= POD_HELD + FIRST_WINDOW
        # Another pod of the same node, and the same worker.
        mesh.carries(bystander, app)
    cut = wait_until(
        lambda: mesh.lines("near", "inbound", port, reason="pod_held_bytes_limit"),
        "streams are reset",
    )

    def told() -> int:
        for each in senders:
            each.take()
        return sum(len(each.client.resets) for each in senders)

    wait_until(lambda: told() >= len(cut), "and the peer is told")
    for sender in senders:
        sender.client.close()
    wait_until(lambda: held(mesh, "near") == 0, "everything is given back")
    for each in apps:
        reset(each)


@pytest.mark.parametrize("server", ["far", "near", "outsider"])
def test_stalled_calls_do_not_stall_their_neighbours(mesh: Mesh, server: str) -> None:
    """Through our own pool, on the same connections; in plaintext through pipes."""
    listener = stalled_listener(mesh, server)
    calls = [mesh.call("client", server, listener=listener) for _ in range(20)]
    taken = fill([sock for sock, _, _ in calls])
    found = still(mesh, server, calls, taken)
    unsent_within_bounds(found.towards)
    if server == "outsider":
        assert max(found.tunnels) <= PIPE
        wait_until(lambda: held(mesh, "client") == 0, "this process holds nothing")
    else:
        # Each worker has a connection of its own to the peer, and each connection may grow.
        pools = hbone_connections(mesh, "client", server)
        most = len(calls) * FIRST_WINDOW + pools * GROWTH
        assert max(found.tunnels) <= WINDOW_MOST
        assert FIRST_WINDOW < sum(found.tunnels) <= most
        for pod in ("client", "far"):
            assert held(mesh, pod) <= most * CHUNKS
    sock, app, _ = mesh.call("client", server)
    for _ in range(200):
        mesh.carries(sock, app)


@pytest.mark.parametrize("how", ["its socket", "its windows"])
def test_a_client_that_does_not_read_holds_little(mesh: Mesh, how: str) -> None:
    """The application behind our server has gigabytes to say."""
    bystander, other, _ = mesh.call("client", "far")
    listener = mesh.listen("far")
    to = authority(mesh.address("far"), listener.getsockname()[1])
    client = mesh.hbone("twin", "far")
    if how == "its windows":
        # RFC 9113, 6.9.2: streams begin with nothing; what was granted is taken back.
        client.limits((4, 0))
    apps = []
    for _ in range(20):
        assert client.status(client.connect(to)) == 200
        apps.append(mesh.accept(listener)[0])
    before = resident(mesh, "far")
    assert max(fill(apps)) <= 64 * MIB
    assert held(mesh, "far") == 0
    assert resident(mesh, "far") - before <= 4 * MIB
    mesh.carries(bystander, other)
    client.close()
    for app in apps:
        with pytest.raises(ConnectionResetError):
            app.recv(1)


def test_a_server_that_does_not_read_holds_little(mesh: Mesh) -> None:
    """The applications before our client have gigabytes to say."""
    bystander, other, _ = mesh.call("client", "far")
    listener = mesh.listen("twin", HBONE_PORT)
    sock = mesh.connect("client", mesh.address("twin"), 8080)
    server = mesh.hbone_server(listener)
    stream, _ = server.request()
    server.answer(stream, 200)
    sock.sendall(b"x")
    assert server.receive(stream, 1) == b"x"
    before = resident(mesh, "client")
    assert max(fill([sock])) <= 64 * MIB
    assert held(mesh, "client") == 0
    assert resident(mesh, "client") - before <= 4 * MIB
    mesh.carries(bystander, other)
    server.close()
    with contextlib.suppress(BrokenPipeError), pytest.raises(ConnectionResetError):
        sock.recv(1)


def test_small_requests_pass_a_bulk_stream(mesh: Mesh) -> None:
    """Fairness on the same connections: no request waits for more of the bulk than its share."""
    listener = mesh.listen("far")
    bulk, sink, _ = mesh.call("client", "far", listener=listener)
    stop = threading.Event()
    moved = 0

    def send() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                bulk.sendall(bytes(256 * KIB))
        with contextlib.suppress(OSError):
            bulk.shutdown(socket.SHUT_WR)

    def receive() -> None:
        nonlocal moved
        while data := sink.recv(MIB):
            moved += len(data)

    threads = [threading.Thread(target=send), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: moved > 8 * MIB, "the bulk flows")
        # As many as there are workers, and more: some share the bulk's connection.
        calls = [mesh.call("client", "far", listener=listener)[:2] for _ in range(6)]
        waits = []
        for _ in range(30):
            for sock, app in calls:
                start = moved
                mesh.carries(sock, app)
                waits.append(moved - start)
        assert sum(waits) > 0, "the bulk flows meanwhile"
        assert sorted(waits)[len(waits) // 2] <= 16 * MIB
        assert max(waits) <= 256 * MIB
    finally:
        stop.set()
        for thread in threads:
            thread.join()
