"""A captured pod, a peer of it, and a stand-in for the tunnel: where tests of the capture start.

Owns the topology of two namespaces joined by a veth pair, dual stack, and the moves that a tunnel
makes with the sockets it is given: accept, deliver to the application, dial the peer. Promises that
all of it, pins included, is gone at the end. It may not look into the capture.

    pod (10.9.0.1, fd09::1) eth0 ---- eth0 peer (10.9.0.2, fd09::2)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import socket
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from nodeagent.capture import Enforcement, Enrolment, Listeners, PodSpec, SkLookupCapture
from nodeagent.capture.bpffs import ensure_bpffs
from nodeagent.pods import NamespaceThreads, NetnsHandle, open_netns, pod_uid
from support.netns import DEADLINE, Namespace, namespace, veth, wait_until

__all__ = ["FAMILIES", "PERMISSIVE", "STRICT", "Captured", "Family", "Tunnel", "captured", "plain"]

T = TypeVar("T")

PERMISSIVE: Final = Enforcement(strict_default=False)
STRICT: Final = Enforcement(strict_default=True)

IP_TRANSPARENT: Final = 19
IPV6_TRANSPARENT: Final = 75
MARK_TUNNEL: Final = 0x539
MARK_DELIVERY: Final = 0x111

_numbers = itertools.count()


class Family(NamedTuple):
    """Addresses of one family."""

    name: str
    family: int
    pod: str
    peer: str
    loopback: str


FAMILIES: Final = (
    Family("v4", socket.AF_INET, "10.9.0.1", "10.9.0.2", "127.0.0.1"),
    Family("v6", socket.AF_INET6, "fd09::1", "fd09::2", "::1"),
)


def plain(address: Any) -> tuple[str, int]:  # noqa: ANN401 - as the socket module gives it
    """Return address and port of a socket address, IPv4-mapped as IPv4."""
    return address[0].removeprefix("::ffff:"), address[1]


class Tunnel:
    """What ztunnel does with a pod's sockets, in the fewest lines."""

    def __init__(self, pod: Namespace, listeners: Listeners) -> None:
        self._pod = pod
        self._sockets = [socket.socket(fileno=os.dup(fd)) for fd in listeners]
        self._opened: list[socket.socket] = []
        for sock in self._sockets:
            sock.settimeout(DEADLINE)

    @property
    def fds(self) -> Listeners:
        """The descriptors, for another capture to adopt."""
        return Listeners(*(sock.fileno() for sock in self._sockets))

    def accept(self, name: str) -> socket.socket:
        """Take a connection from the listener `outbound`, `inbound` or `hbone`."""
        accepted, _ = self._sockets[Listeners._fields.index(name)].accept()
        accepted.settimeout(DEADLINE)
        self._opened.append(accepted)
        return accepted

    def deliver(self, client: str, destination: tuple[str, int], port: int = 0) -> socket.socket:
        """Connect to the application from the client's address, as docs/capture.md tells."""
        sock = self._pod.make_socket(socket.AF_INET6 if ":" in client else socket.AF_INET)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK_DELIVERY)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        sock.bind((client, port))
        sock.connect(destination)
        return sock

    def dial(self, destination: tuple[str, int], port: int = 0) -> socket.socket:
        """Connect from the pod's namespace past the capture."""
        sock = self._pod.make_socket(socket.AF_INET6 if ":" in destination[0] else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK_TUNNEL)
        if port:
            sock.bind(("", port))
        sock.connect(destination)
        return sock

    def close(self) -> None:
        for sock in [*self._sockets, *self._opened]:
            sock.close()


class Captured:
    """The topology and the capture. Nothing is enrolled before `enrol`."""

    def __init__(self, pod: Namespace, peer: Namespace, bpf_dir: Path) -> None:
        self.pod = pod
        self.peer = peer
        self.bpf_dir = bpf_dir
        self.addresses = tuple(family.pod for family in FAMILIES)
        self._runner = asyncio.Runner()
        self._tunnels: list[Tunnel] = []
        self._handles: list[NetnsHandle] = []
        self.threads = NamespaceThreads()
        self.capture = SkLookupCapture(bpf_dir, self.threads)
        self.handle = self._open()

    def _open(self) -> NetnsHandle:
        handle = open_netns(self.pod.name)
        self._handles.append(handle)
        return handle

    @property
    def uid(self) -> str:
        return pod_uid("default/pod", self.handle.cookie)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run one coroutine on this topology's event loop."""
        return self._runner.run(coroutine)

    def spec(self, enforcement: Enforcement) -> PodSpec:
        return PodSpec(self.uid, self.handle, self.addresses, enforcement)

    def enrol(self, enforcement: Enforcement = STRICT, adopt: Listeners | None = None) -> Tunnel:
        """Enrol the pod and return a tunnel that holds its sockets."""
        return self.tunnel(self.run(self.capture.enrol(self.spec(enforcement), adopt)))

    def tunnel(self, enrolment: Enrolment) -> Tunnel:
        made = Tunnel(self.pod, enrolment.listeners)
        self._tunnels.append(made)
        return made

    def restart(self) -> None:
        """Replace the capture by a new one, as a restarted agent would."""
        self.run(self.capture.close())
        self.capture = SkLookupCapture(self.bpf_dir, self.threads)

    def count(self, name: str) -> int:
        return self.run(self.capture.counters(self.uid))[name]

    def wait_count(self, name: str) -> None:
        """Wait until a counter is no longer zero."""
        wait_until(lambda: self.count(name), f"counter {name}")

    def deviations(self) -> set[str]:
        return {item.kind for item in self.run(self.capture.audit(self.uid))}

    def pins(self) -> list[str]:
        return sorted(str(p.relative_to(self.bpf_dir)) for p in self.bpf_dir.rglob("*"))

    def close(self) -> None:
        for tunnel in self._tunnels:
            tunnel.close()
        self.run(self.capture.close())
        self._runner.close()
        self.threads.close()
        for handle in self._handles:
            handle.close()


def _is_settled(side: Namespace) -> bool:
    """Whether the kernel has noticed that the other end is up, and its own link-local address is
    ready: both come a moment later, and change routes that tests compare.
    """
    shown = "ip route show table all; ip -6 route show table all; ip -6 address show tentative"
    routes = side.check_output("sh", "-c", shown)
    return not any(word in routes for word in ("linkdown", "inet6")) and "local fe80:" in routes


@contextlib.contextmanager
def captured() -> Iterator[Captured]:
    """Make the topology, and remove it."""
    bpf_dir = Path(f"/sys/fs/bpf/nat-{os.getpid():x}-{next(_numbers)}")
    ensure_bpffs(bpf_dir)
    with namespace("pod") as pod, namespace("peer") as peer:
        four, six = FAMILIES
        veth(
            pod,
            peer,
            [f"{four.pod}/24", f"{six.pod}/64"],
            [f"{four.peer}/24", f"{six.peer}/64"],
        )
        wait_until(lambda: _is_settled(pod) and _is_settled(peer), "the link of pod and peer")
        made = Captured(pod, peer, bpf_dir)
        try:
            yield made
        finally:
            made.close()
            shutil.rmtree(bpf_dir, ignore_errors=True)
