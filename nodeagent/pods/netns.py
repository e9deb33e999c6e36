"""Network namespaces as the agent holds them: an open descriptor and a number never used again.

This module owns opening a namespace by name or path and telling two namespaces apart. It promises
that what it returns is a network namespace, not the agent's own, and that its cookie identifies it
for as long as the machine runs (inodes and names are used again at once, SO_NETNS_COOKIE is not;
socket(7)). It may not change anything inside.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import re
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nodeagent.pods.threads import CLONE_NEWNET, run_inside

__all__ = [
    "NAMED_DIRECTORY",
    "NetnsError",
    "NetnsHandle",
    "NetnsReason",
    "netns_path",
    "open_netns",
    "pod_uid",
    "socket_cookie",
]

NAMED_DIRECTORY: Final = Path("/run/netns")
"""Where ip-netns(8) keeps named namespaces."""

SO_NETNS_COOKIE: Final = 71
"""asm-generic/socket.h, since Linux 5.14; not in Python's socket module."""

NS_GET_NSTYPE: Final = 0xB703
"""ioctl_ns(2): the kind of a namespace."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.:-]{1,255}", re.ASCII)


Visit = Callable[[int, Callable[[], int]], int]
"""`run_inside`, or what does the same at less cost."""


class NetnsReason(enum.StrEnum):
    """Why a namespace cannot be used."""

    BAD_NAME = "bad_name"
    MISSING = "missing"
    NOT_A_NAMESPACE = "not_a_namespace"
    NODE = "node"
    DENIED = "denied"


class NetnsError(Exception):
    """A binding leads to no usable namespace. `where` is its path or name as it was written."""

    def __init__(self, where: str, reason: NetnsReason, detail: str) -> None:
        super().__init__(f"network namespace {where}: {detail}")
        self.where = where
        self.reason = reason


class _Descriptor:
    """An open descriptor and how many handles have it: threads may close theirs at any time."""

    __slots__ = ("fd", "handles", "lock")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.handles = 1
        self.lock = threading.Lock()

    def take(self) -> None:
        with self.lock:
            if not self.handles:
                raise ValueError("the namespace's descriptor is closed")
            self.handles += 1

    def leave(self) -> None:
        with self.lock:
            self.handles -= 1
            if not self.handles:
                os.close(self.fd)


class NetnsHandle:
    """An open network namespace. It keeps the namespace alive until `close`."""

    __slots__ = ("_descriptor", "cookie", "inode", "path")

    def __init__(self, fd: int, cookie: int, path: Path) -> None:
        self._descriptor: _Descriptor | None = _Descriptor(fd)
        self.cookie = cookie
        self.inode = os.fstat(fd).st_ino
        self.path = path

    def __repr__(self) -> str:
        return f"NetnsHandle({str(self.path)!r}, cookie={self.cookie:#x})"

    def _open(self) -> _Descriptor:
        if self._descriptor is None:
            raise ValueError(f"namespace {self.path} is closed")
        return self._descriptor

    @property
    def fd(self) -> int:
        """The descriptor. Raises ValueError once closed."""
        return self._open().fd

    def duplicate(self) -> NetnsHandle:
        """Return another handle of the same namespace, to be closed on its own.

        It shares the descriptor: a pod's watcher, its keeper and its capture have a handle each.
        """
        self._open().take()
        copy = object.__new__(NetnsHandle)
        copy._descriptor = self._descriptor
        copy.cookie, copy.inode, copy.path = self.cookie, self.inode, self.path
        return copy

    def is_at(self, path: Path) -> bool:
        """Whether `path` leads to this very namespace now: its inode is taken while we hold it."""
        try:
            found, held = path.stat(), os.fstat(self.fd)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            descriptor.leave()


def pod_uid(workload: str, cookie: int) -> str:
    """Return the uid of `workload` in one namespace: never the same for two namespaces."""
    return f"{workload}@{cookie:x}"


def netns_path(where: str) -> Path:
    """Return the path of a namespace given by name or absolute path. Raises NetnsError."""
    if where.startswith("/"):
        path = Path(where)
        if ".." in path.parts or "\0" in where:
            raise NetnsError(where, NetnsReason.BAD_NAME, "a path must not contain '..'")
        return path
    if not _NAME.fullmatch(where) or where in {".", ".."}:
        raise NetnsError(where, NetnsReason.BAD_NAME, "neither a name nor an absolute path")
    return NAMED_DIRECTORY / where


def socket_cookie(sock: socket.socket) -> int:
    """Return the cookie of the namespace that a socket lives in. Raises OSError before 5.14."""
    value: int = struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0]
    return value


def current_cookie() -> int:
    """Return the cookie of the calling thread's namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        return socket_cookie(sock)


def open_netns(where: str, visit: Visit = run_inside) -> NetnsHandle:
    """Open the namespace given by name or absolute path. Raises NetnsError. Blocks shortly.

    `visit` calls a function inside a namespace; the default makes a thread for it.
    """
    path = netns_path(where)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NetnsError(
            where, NetnsReason.MISSING, "does not exist (yet): create it, or correct the binding"
        ) from None
    except OSError as error:
        gone = error.errno in (errno.ENOTDIR, errno.ENXIO)
        reason = NetnsReason.MISSING if gone else NetnsReason.DENIED
        raise NetnsError(where, reason, f"cannot be opened: {error.strerror}") from None
    try:
        return _checked(fd, where, path, visit)
    except BaseException:
        os.close(fd)
        raise


def _checked(fd: int, where: str, path: Path, visit: Visit) -> NetnsHandle:
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != CLONE_NEWNET:
        # `ip netns add` makes the file first and mounts the namespace on it a moment later.
        raise NetnsError(where, NetnsReason.NOT_A_NAMESPACE, "the file is no network namespace")
    try:
        cookie = visit(fd, current_cookie)
    except OSError as error:
        raise NetnsError(where, NetnsReason.DENIED, str(error)) from None
    if cookie == current_cookie():
        raise NetnsError(
            where, NetnsReason.NODE, "is the node's own: its traffic is never captured"
        )
    return NetnsHandle(fd, cookie, path)
