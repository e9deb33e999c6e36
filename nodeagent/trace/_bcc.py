"""bcc: finding it, having it compile, and saying what is missing where it cannot.

This module owns what the operating system must provide. It promises that each missing thing is
named with the command that brings it, that the compiler's own words do not run into the answer, and
that nothing stays in the kernel after `close`. It may not know what events mean.

bcc is a package of the distribution's Python (Debian: python3-bpfcc); this command may run on
another, and takes that one package from there and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from nodeagent.capture.layout import MARK_TUNNEL
from nodeagent.trace import _btf

__all__ = ["MissingError", "Program"]

SOURCE: Final = Path(__file__).with_name("observe.c")
BTF: Final = Path("/sys/kernel/btf/vmlinux")
MODULES: Final = Path("/lib/modules")
KHEADERS: Final = Path("/sys/kernel/kheaders.tar.xz")
PACKAGES: Final = (Path("/usr/lib/python3/dist-packages"),)
"""Where Debian keeps packages of its own Python."""

SOURCE_VARIABLE: Final = "BCC_KERNEL_SOURCE"
"""bcc's own: headers that lie elsewhere."""

FIELDS: Final[Mapping[str, str]] = {
    "AT_SOCK_NET": "sock.__sk_common.skc_net.net",
    "AT_SOCK_FAMILY": "sock.__sk_common.skc_family",
    "AT_SOCK_NUM": "sock.__sk_common.skc_num",
    "AT_SOCK_DPORT": "sock.__sk_common.skc_dport",
    "AT_SOCK_LOCAL4": "sock.__sk_common.skc_rcv_saddr",
    "AT_SOCK_REMOTE4": "sock.__sk_common.skc_daddr",
    "AT_SOCK_LOCAL6": "sock.__sk_common.skc_v6_rcv_saddr",
    "AT_SOCK_REMOTE6": "sock.__sk_common.skc_v6_daddr",
    "AT_SOCK_MARK": "sock.sk_mark",
    "AT_TCP_ACKED": "tcp_sock.bytes_acked",
    "AT_TCP_RECEIVED": "tcp_sock.bytes_received",
    "AT_TCP_RETRANSMITS": "tcp_sock.total_retrans",
    "AT_NET_INUM": "net.ns.inum",
    "AT_DEV_INDEX": "net_device.ifindex",
    "AT_DEV_NET": "net_device.nd_net.net",
    "AT_SKB_DEV": "sk_buff.dev",
    "AT_SKB_MARK": "sk_buff.mark",
    "AT_SKB_PROTOCOL": "sk_buff.protocol",
    "AT_SKB_HEAD": "sk_buff.head",
    "AT_SKB_NETWORK": "sk_buff.network_header",
}
"""What observe.c reads, by the macro that it names the offset by."""

MOST_AT_ONCE: Final = 1000
"""Events that are taken before they are said: the kernel may fill the ring for ever."""
ENOUGH: Final = -1
"""What has libbpf go back to its caller (ring_buffer_sample_fn); the rest stays in the ring."""

MOST_SAID: Final = 400
"""Characters of the compiler's words in an error: its first complaint."""


class MissingError(Exception):
    """Tracing cannot begin: the message says what is missing, `remedy` how to get it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


class Program:
    """The compiled program, running. `take` is called with each event's bytes."""

    def __init__(self, pods: Iterable[int], take: Callable[[bytes], None]) -> None:
        """Compile and attach; `pods` are inodes of network namespaces. Raises MissingError."""
        bcc = _package()
        flags = [
            f"-D{name}={value}"
            for name, value in {**_offsets(), "MARK_TUNNEL": MARK_TUNNEL}.items()
        ]
        _headers()
        with _quiet() as said:
            try:
                self._bpf: Any = bcc.BPF(text=SOURCE.read_bytes(), cflags=flags)
            except Exception as error:  # noqa: BLE001 - bcc raises bare Exceptions
                raise _failed(error, said()) from None
        for inode in pods:
            table = self._bpf[b"pods"]
            table[table.Key(inode)] = table.Leaf(1)

        waiting: list[bytes] = []

        def took(_context: object, data: int, size: int) -> int:
            # Called by the library, which loses an exception: nothing is done here that has any.
            waiting.append(ctypes.string_at(data, size))
            return 0 if len(waiting) < MOST_AT_ONCE else ENOUGH

        self._waiting = waiting
        self._take = take
        self._bpf[b"events"].open_ring_buffer(took)

    def wait(self, seconds: float) -> None:
        """Take events for at most so long; returns earlier once there were some. Raises what `take`
        raises.
        """
        self._bpf.ring_buffer_poll(int(seconds * 1000))
        taken = self._waiting[:]
        self._waiting.clear()
        for each in taken:
            self._take(each)

    def lost(self) -> int:
        """Return how many events found no room."""
        return int(self._bpf[b"lost"][0].value)

    def close(self) -> None:
        self._bpf.cleanup()


def _package() -> ModuleType:
    """Return the module bcc. Raises MissingError."""
    with contextlib.suppress(ImportError):
        import bcc  # noqa: PLC0415 - not a requirement of ours

        found: ModuleType = bcc
        return found
    for directory in PACKAGES:
        start = directory / "bcc/__init__.py"
        if start.exists():
            return _loaded(start)
    raise MissingError(
        "the Python package bcc is not installed",
        "apt-get install --no-install-recommends python3-bpfcc",
    )


def _loaded(start: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bcc", start, submodule_search_locations=[str(start.parent)]
    )
    if spec is None or spec.loader is None:
        raise MissingError(
            f"{start} is no Python package", "apt-get install --reinstall python3-bpfcc"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        del sys.modules["bcc"]
        raise MissingError(
            f"bcc cannot be loaded: {error}", "apt-get install --reinstall python3-bpfcc libbpfcc"
        ) from None
    return module


def _headers() -> None:
    """Raise MissingError unless the kernel's headers are where bcc looks."""
    release = platform.release()
    if SOURCE_VARIABLE in os.environ or KHEADERS.exists():
        return
    if not (MODULES / release / "build").exists():
        raise MissingError(
            f"the headers of the running kernel ({release}) are not installed",
            f"apt-get install linux-headers-{release}; or name a directory with a kernel's headers "
            f"in {SOURCE_VARIABLE} (any recent version will do)",
        )


def _offsets() -> dict[str, int]:
    try:
        data = BTF.read_bytes()
    except OSError as error:
        raise MissingError(
            f"{BTF}: {error.strerror}",
            "boot a kernel with CONFIG_DEBUG_INFO_BTF, as Debian's are",
        ) from None
    try:
        found = _btf.offsets(data, FIELDS.values())
    except _btf.BtfError as error:
        raise MissingError(
            f"this kernel is not understood: {error}", "use a release of nodeagent that knows it"
        ) from None
    return {name: found[path] for name, path in FIELDS.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], str]]:
    """Keep what compiler and library write to both outputs; yields how to read it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever called
            stream.flush()
    kept: dict[int, int] = {}
    for number in (1, 2):
        with contextlib.suppress(OSError):  # the same
            kept[number] = os.dup(number)
    with tempfile.TemporaryFile() as said:
        for number in kept:
            os.dup2(said.fileno(), number)

        def read() -> str:
            # The library is of C, and buffers for itself.
            ctypes.CDLL(None).fflush(None)
            said.seek(0)
            return said.read().decode(errors="replace")

        try:
            yield read
        finally:
            ctypes.CDLL(None).fflush(None)
            for number, descriptor in kept.items():
                os.dup2(descriptor, number)
                os.close(descriptor)


def _failed(error: Exception, said: str) -> MissingError:
    complaint = next((line for line in said.splitlines() if "error:" in line), "").strip()
    text = complaint or said.strip().partition("\n")[0] or str(error)
    denied = os.geteuid() != 0 or os.strerror(errno.EPERM) in f"{error} {said}"
    if denied and not complaint:
        return MissingError(
            f"not allowed to load programs into the kernel: {text[:MOST_SAID]}",
            "run this command as root, with CAP_BPF and CAP_PERFMON, outside a container",
        )
    return MissingError(
        f"the program cannot be compiled or loaded: {text[:MOST_SAID]}",
        "it needs Linux 5.8 with CONFIG_BPF_EVENTS, and headers that clang understands: "
        f"apt-get install linux-headers-{platform.release()}",
    )
