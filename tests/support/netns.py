"""Network namespaces for tests: make them, wire them, run code and programs in them, remove them.

Owns what a test needs to stand up its own network: named namespaces with unique names, veth pairs,
addresses, and everything that runs inside. Promises that leaving a context manager removes all of
it, also after a failure, and that nothing outside the made namespaces is touched. It never enters
a namespace with the main thread.

    with namespace("client") as client, namespace("server") as server:
        veth(client, server, ["10.1.0.1/24", "fd01::1/64"], ["10.1.0.2/24", "fd01::2/64"])
        listener = server.run(lambda: socket.create_server(("10.1.0.2", 0)))
        sock = client.connect(("10.1.0.2", listener.getsockname()[1]))

On failure: `nsenter --net=/run/netns/NAME`; the names begin with `nat-` and the test's process id.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, TypeVar

__all__ = ["Namespace", "namespace", "veth", "wait_until"]

T = TypeVar("T")

CLONE_NEWNET: Final = 0x40000000
PATIENCE: Final = float(os.environ.get("NODEAGENT_TEST_PATIENCE", "1"))
"""How many times slower than usual the programs are: sanitizers take their time."""

DEADLINE: Final = 15.0 * PATIENCE
"""Seconds that a test waits for anything: far above what a loaded machine needs."""

POLL: Final = 0.01
"""Seconds between two looks at a condition that offers no event to wait for."""

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def wait_until(condition: Callable[[], T], what: str, seconds: float = DEADLINE) -> T:
    """Return the first true value of `condition()`. Raises TimeoutError, which names `what`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(POLL)


class Namespace:
    """A named network namespace with `lo` up. Made by `namespace()`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path("/run/netns") / name
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []

    def __repr__(self) -> str:
        return f"<namespace {self.name}>"

    def run(self, function: Callable[..., T], *args: object) -> T:
        """Call `function(*args)` on a thread that is inside, and return or raise what it does."""
        result: list[T] = []
        failure: list[BaseException] = []

        def body() -> None:
            try:
                self._enter()
                result.append(function(*args))
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread
                failure.append(error)

        thread = threading.Thread(target=body, name=f"in-{self.name}")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def _enter(self) -> None:
        if _libc.setns(self.fd, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"setns {self.name}: {os.strerror(code)}")

    def make_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM
    ) -> socket.socket:
        """Return a socket that lives inside; closed with the namespace at the latest."""
        sock = self.run(socket.socket, family, kind)
        sock.settimeout(DEADLINE)
        self._sockets.append(sock)
        return sock

    def listen(self, address: str, port: int = 0, *, reuse: bool = True) -> socket.socket:
        """Return a listening TCP socket inside."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self.make_socket(family)
        if reuse:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
        sock.bind((address, port))
        sock.listen(128)
        return sock

    def accept(self, listener: socket.socket) -> tuple[socket.socket, Any]:
        """Return the next connection and its peer; closed with the namespace at the latest."""
        accepted, peer = listener.accept()
        accepted.settimeout(DEADLINE)
        self._sockets.append(accepted)
        return accepted, peer

    def connect(self, address: tuple[str, int], *, timeout: float = DEADLINE) -> socket.socket:
        """Return a TCP socket inside, connected to `address`. Raises OSError as connect does."""
        sock = self.make_socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        sock.settimeout(timeout)
        sock.connect(address)
        sock.settimeout(DEADLINE)
        return sock

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program inside; ended with the namespace at the latest."""
        process = subprocess.Popen(
            ["nsenter", f"--net={self.path}", *argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
        )
        self._processes.append(process)
        return process

    def check_output(self, *argv: str, stdin: str | None = None) -> str:
        """Run a program inside to its end and return its output. Raises CalledProcessError."""
        return subprocess.run(
            ["nsenter", f"--net={self.path}", *argv],
            input=stdin,
            capture_output=True,
            text=True,
            check=True,
            timeout=DEADLINE,
        ).stdout

    def ip(self, *lines: str) -> None:
        """Run lines of the ip program inside, in order, such as "link set lo up" and "-6 rule"."""
        for six, group in itertools.groupby(lines, lambda line: line.startswith("-6 ")):
            done = subprocess.run(
                ["ip", *(["-6"] if six else []), "-netns", self.name, "-batch", "-"],
                input="".join(line.removeprefix("-6 ") + "\n" for line in group),
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE,
            )
            if done.returncode:
                raise RuntimeError(f"ip in {self.name}: {done.stderr.strip()}")

    def sysctl(self, name: str, value: str | None = None) -> str:
        """Return the value of a sysctl such as "net.ipv4.ip_forward", after setting it if given."""
        path = Path("/proc/sys") / name.replace(".", "/")

        def access() -> str:
            if value is not None:
                path.write_text(value)
            return path.read_text().strip()

        return self.run(access)

    def dump(self) -> str:
        """Return all that capture could leave behind: rules, routes, filters, sockets, sysctls."""
        links = "ip -o link | cut -d' ' -f2 | tr -d : | cut -d@ -f1"
        show = "qdisc show dev $d; tc filter show dev $d ingress; tc filter show dev $d egress"
        conf = "/proc/sys/net/ipv4/conf/*"
        commands = [
            "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all",
            f"{links} | while read d; do tc {show}; done",
            "ss -Htln",
            f"grep . {conf}/rp_filter {conf}/accept_local /proc/sys/net/ipv4/tcp_fwmark_accept",
        ]
        return self.check_output("sh", "-c", "; ".join(commands))

    def close(self) -> None:
        """Close sockets, end programs and delete the namespace."""
        for sock in self._sockets:
            sock.close()
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        os.close(self.fd)
        # A test may have removed or replaced the name itself.
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)


@contextlib.contextmanager
def namespace(label: str = "ns", *, name: str | None = None) -> Iterator[Namespace]:
    """Make a namespace of a unique name that contains `label`, and remove it at the end.

    `name` fixes the whole name, for tests that make a namespace anew under an old name.
    """
    unique = name or f"nat-{os.getpid():x}-{next(_numbers)}-{label}"
    subprocess.run(["ip", "netns", "add", unique], check=True, capture_output=True)
    made = Namespace(unique)
    try:
        made.ip("link set lo up")
        yield made
    finally:
        made.close()


def veth(
    left: Namespace,
    right: Namespace,
    left_addresses: Sequence[str] = (),
    right_addresses: Sequence[str] = (),
    *,
    left_device: str = "eth0",
    right_device: str = "eth0",
) -> None:
    """Join two namespaces by a veth pair with addresses ("10.1.0.1/24"), both ends up.

    The pair goes with either namespace. IPv6 addresses are usable at once (no duplicate detection).
    """
    left.ip(
        f"link add {left_device} type veth peer name {right_device} netns {right.name}",
    )
    for side, device, addresses in (
        (left, left_device, left_addresses),
        (right, right_device, right_addresses),
    ):
        lines = [
            f"address add {address} dev {device}"
            + (" nodad" if ipaddress.ip_interface(address).version == 6 else "")
            for address in addresses
        ]
        # Link-local addresses, too, are then usable at once.
        side.sysctl(f"net.ipv6.conf.{device}.accept_dad", "0")
        side.ip(*lines, f"link set {device} up")
