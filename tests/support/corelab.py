"""Two pods, two cores and a judge that answers by a rule: the C core on real sockets, alone.

Owns what the core's own tests share. The capture is stood in for by a route: every foreign address
is local to the client's namespace, and the outbound listener has the service's port, so that the
kernel brings connections to it. Everything else is the product's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from OpenSSL import SSL

from support.certificates import Identity, authority, workload
from support.hbone import Client, Server, Shown, Tls
from support.netns import DEADLINE, Namespace, namespace, veth, wait_until
from ztunnel import _core, tls

CLIENT_ID: Final = "spiffe://cluster.local/ns/default/sa/sleep"
SERVER_ID: Final = "spiffe://cluster.local/ns/default/sa/httpbin"
CLIENT_V4, SERVER_V4 = "10.9.0.1", "10.9.0.2"
CLIENT_V6, SERVER_V6 = "fd09::1", "fd09::2"
PORT: Final = 8080
HBONE_PORT: Final = 15008
HAND_PORT: Final = 15018
"""Where a test speaks HBONE by hand, in the server's namespace."""
MARK_TUNNEL, MARK_DELIVER = 0x539, 0x111
SO_MARK, IP_TRANSPARENT, IPV6_TRANSPARENT = 36, 19, 75

POD, CREDENTIAL, PEER, SERIES, DECISION = 1, 1, 1, 1, 1


def packed(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


class Judged:
    """A core with one pod, and a thread that answers its questions with `rule`."""

    def __init__(self, rule: Callable[[Judged, _core.Upcall], None], workers: int = 2) -> None:
        self.core = _core.Core(workers, tls.function_table(_core.FUNCTIONS))
        self.rule = rule
        self.upcalls: list[_core.Upcall] = []
        self.ended: list[_core.Ended] = []
        self.lines: list[str] = []
        self.failed: list[_core.Failed] = []
        self.freed: list[int] = []
        self.keep: list[object] = []
        self.pod: tuple[Any, ...] = ()
        """What was told of the pod."""
        self.contexts: tuple[int, int] | None = None
        self._workers = workers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        self.core.add_series(SERIES)
        self.core.add_pod(*self.pod)
        if self.contexts is not None:
            self.core.set_credential(CREDENTIAL, *self.contexts)
        self.core.start()
        self._thread.start()

    def successor(self) -> Judged:
        """Start another core with the same pod and the same listening sockets."""
        made = Judged(self.rule, self._workers)
        made.pod, made.contexts = self.pod, self.contexts
        made.start()
        return made

    def collect(self) -> None:
        for upcall in self.core.upcalls(64):
            self.upcalls.append(upcall)
            self.rule(self, upcall)
        self.ended += self.core.ended(1000)
        self.lines += self.core.lines()[0].decode().splitlines()
        self.failed += self.core.failed(1000)
        self.freed += self.core.freed(1000)

    def _serve(self) -> None:
        while not self._stop.is_set():
            if select.select([self.core.event_fd], [], [], 0.2)[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.core.event_fd, 8)
            self.collect()

    def stop_collecting(self) -> None:
        """From here on nobody answers, and what the core reports waits in it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def stop(self) -> None:
        self.stop_collecting()
        self.core.stop()
        self.collect()

    def wait_ended(self, count: int) -> list[_core.Ended]:
        wait_until(lambda: len(self.ended) >= count, f"{count} ended connections")
        return self.ended

    def expired(self) -> dict[str, int]:
        """Return how often each deadline has ended something; those that have not are left out."""
        counts = zip(_core.DEADLINES, self.core.stats().expired, strict=True)
        return {name: count for name, count in counts if count}

    def wait_failed(self, count: int) -> list[_core.Failed]:
        wait_until(lambda: len(self.failed) >= count, f"{count} failed handshakes")
        return self.failed

    def reasons(self) -> list[str]:
        return [_core.REASONS[ended.reason] for ended in self.ended]


def reason(token: str) -> int:
    return _core.REASONS.index(token)


def transparent(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK_TUNNEL)
    sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)


def listeners(pod: Namespace, ports: tuple[int, int, int]) -> list[socket.socket]:
    def make() -> list[socket.socket]:
        made = []
        for port in ports:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            transparent(sock)
            sock.bind(("::", port))
            sock.listen(1024)
            sock.setblocking(False)
            made.append(sock)
        return made

    return pod.run(make)


def ip6_rule(pod: Namespace, rule: str) -> None:
    pod.check_output("ip", "-6", "rule", "add", "pref", *rule.split())


def outbound_rule(judged: Judged, upcall: _core.Upcall, *, port: int = HBONE_PORT) -> None:
    """Tunnel everything to the server's HBONE port; trust what OpenSSL trusted."""
    if upcall.kind == _core.SERVER_CERTIFICATE:
        judged.core.answer_certificate(upcall.id, 1, 0)
        return
    number = DECISION + upcall.id
    peer = PEER + upcall.id
    host = upcall.destination
    judged.core.add_peer(peer, POD, host, port, CREDENTIAL)
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    authority_text = f"{mapped}:{PORT}" if mapped else f"[{address}]:{PORT}"
    judged.core.decide_tunnel(number, SERIES, peer, authority_text, "k8s.cluster.name=test", "")
    judged.core.answer(upcall.id, upcall.epoch, number)


def hand_rule(judged: Judged, upcall: _core.Upcall) -> None:
    """Tunnel everything to HAND_PORT, where the test itself speaks HBONE."""
    outbound_rule(judged, upcall, port=HAND_PORT)


def inbound_rule(judged: Judged, upcall: _core.Upcall) -> None:
    """Let everybody in."""
    if upcall.kind == _core.PEER_CERTIFICATE:
        judged.core.answer_certificate(upcall.id, 7, 0)
        return
    number = DECISION + upcall.id
    judged.core.decide_deliver(number, SERIES)
    judged.core.answer(upcall.id, upcall.epoch, number)


class Pair:
    """The two pods: `client` and `server` are their cores, `left` and `right` their namespaces.

    `root` signs what both believe.
    """

    def __init__(
        self, left: Namespace, right: Namespace, client: Judged, server: Judged, root: Identity
    ) -> None:
        self.left, self.right, self.client, self.server = left, right, client, server
        self.root = root
        self.serial = 0

    def connect(self, address: str = SERVER_V4) -> socket.socket:
        return self.left.connect((address, PORT))

    def _shown(self, uri: str) -> Shown:
        now = time.time()
        return Shown(leaf=workload(self.root, uri, not_before=now - 60, not_after=now + 3600))

    def drop(self, port: int) -> None:
        """From here on the server's namespace drops what comes in for this port."""
        rules = (
            "add table inet lost; add chain inet lost in { type filter hook input priority 0; };"
            f" add rule inet lost in tcp dport {port} drop"
        )
        self.right.check_output("nft", rules)

    def count_syns(self, port: int) -> Callable[[], int]:
        """Count from here on the SYNs that reach a port of the server's namespace."""
        name = f"syns{port}"
        self.right.check_output(
            "nft",
            f"add table inet {name}; add counter inet {name} seen;"
            f" add chain inet {name} in {{ type filter hook input priority -1; }};"
            f" add rule inet {name} in tcp dport {port} tcp flags & (syn|ack) == syn"
            " counter name seen",
        )

        def seen() -> int:
            shown = self.right.check_output("nft", "-j", "list", "counter", "inet", name, "seen")
            counters = [
                each["counter"] for each in json.loads(shown)["nftables"] if "counter" in each
            ]
            return int(counters[0]["packets"])

        return seen

    def raw(self, port: int = HBONE_PORT) -> socket.socket:
        """Return a socket from the client's namespace to a port of the server core."""
        sock = self.left.make_socket()
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, MARK_TUNNEL)
        sock.connect((SERVER_V4, port))
        return sock

    def raw_tls(self) -> Tls:
        """Return TLS to the server core, before its handshake."""
        return Tls(self.raw(), self._shown(CLIENT_ID).context())

    def hand_client(self) -> Client:
        """Speak HBONE to the server core by hand."""
        return Client(self.raw(), self._shown(CLIENT_ID).context())

    def hand_listen(self) -> socket.socket:
        """Listen where `hand_rule` sends the client core."""
        return self.right.listen(SERVER_V4, HAND_PORT)

    def hand_tls(self, listener: socket.socket) -> Tls:
        """Take the client core's next HBONE connection as far as its handshake."""
        tunnel = Tls(self.right.accept(listener)[0], self.server_context(), server=True)
        tunnel.handshake()
        return tunnel

    def hand_server(self, listener: socket.socket, *extra: tuple[int, int]) -> Server:
        """Take the client core's next HBONE connection; `extra` are further SETTINGS."""
        accepted, _ = self.right.accept(listener)
        return Server(accepted, self.server_context(), extra)

    def rotate(self) -> None:
        """Give the client's pod another certificate of the same identity."""
        now = time.time()
        leaf = workload(self.root, CLIENT_ID, not_before=now - 60, not_after=now + 3600)
        made = tls.build([leaf.der], leaf.key_der, [self.root.der])
        self.client.keep.append(made)
        self.client.core.set_credential(
            CREDENTIAL, tls.context_pointer(made.client), tls.context_pointer(made.server)
        )
        self.serial = leaf.certificate.serial_number

    def server_context(self) -> SSL.Context:
        return self._shown(SERVER_ID).context(server=True)

    def accept(self, listener: socket.socket) -> tuple[socket.socket, tuple[str, int]]:
        sock, peer = listener.accept()
        sock.settimeout(DEADLINE)
        self.server.keep.append(sock)
        return sock, peer

    def listen(self, address: str = SERVER_V4, backlog: int = 128) -> socket.socket:
        sock = self.right.listen(address, PORT)
        sock.listen(backlog)
        return sock


@contextlib.contextmanager
def pair(
    outbound: Callable[[Judged, _core.Upcall], None] = outbound_rule,
    inbound: Callable[[Judged, _core.Upcall], None] = inbound_rule,
    *,
    workers: int = 2,
    certified: bool = True,
) -> Iterator[Pair]:
    """Make both pods; without `certified` the server's has no certificate yet."""
    now = time.time()
    root = authority(not_before=now - 60, not_after=now + 3600)
    with namespace("client") as left, namespace("server") as right:
        veth(
            left,
            right,
            [f"{CLIENT_V4}/24", f"{CLIENT_V6}/64"],
            [f"{SERVER_V4}/24", f"{SERVER_V6}/64"],
        )
        for pod, v4, v6 in ((left, CLIENT_V4, CLIENT_V6), (right, SERVER_V4, SERVER_V6)):
            pod.ip(
                f"route add local default dev lo src {v4} table 100",
                "rule add pref 99 fwmark 0x111 lookup 100",
                "rule add pref 100 fwmark 0x539 iif lo lookup main",
                f"route add local ::/0 dev lo src {v6} table 100",
            )
            ip6_rule(pod, "99 fwmark 0x111 lookup 100")
            ip6_rule(pod, "100 fwmark 0x539 iif lo lookup main")
            for name in ("all.rp_filter", "default.rp_filter", "lo.rp_filter", "eth0.rp_filter"):
                pod.sysctl(f"net.ipv4.conf.{name}", "0")
            pod.sysctl("net.ipv4.conf.all.accept_local", "1")
            pod.sysctl("net.ipv4.tcp_fwmark_accept", "1")
            pod.sysctl("net.ipv4.fwmark_reflect", "1")
            pod.sysctl("net.ipv6.fwmark_reflect", "1")
        left.ip("rule add pref 101 ipproto tcp iif lo not fwmark 0x539 lookup 100")
        ip6_rule(left, "101 ipproto tcp iif lo not fwmark 0x539 lookup 100")
        client, server = Judged(outbound, workers), Judged(inbound, workers)
        try:
            for judged, pod, identity, ports, addresses in (
                (client, left, CLIENT_ID, (PORT, 15006, 15008), (CLIENT_V4, CLIENT_V6)),
                (server, right, SERVER_ID, (15001, 15006, 15008), (SERVER_V4, SERVER_V6)),
            ):
                leaf = workload(root, identity, not_before=now - 60, not_after=now + 3600)
                made = tls.build([leaf.der], leaf.key_der, [root.der])
                judged.keep += [made]
                socks = listeners(pod, ports)
                judged.keep += socks
                judged.pod = (
                    POD,
                    pod.fd,
                    *(sock.fileno() for sock in socks),
                    tuple(map(packed, addresses)),
                    CREDENTIAL,
                )
                if certified or judged is client:
                    judged.contexts = (
                        tls.context_pointer(made.client),
                        tls.context_pointer(made.server),
                    )
                judged.start()
            yield Pair(left, right, client, server, root)
        finally:
            client.stop()
            server.stop()
            for each in [*client.keep, *server.keep]:
                if isinstance(each, socket.socket):
                    each.close()
