"""The run directory: its permissions, its lock and the unix sockets in it.

This module owns `<run dir>` (0700, ours), the lock that keeps it to one daemon, and the binding of
unix sockets there. It promises that no other user can reach a socket at any moment, that a stale
socket of a killed daemon is replaced without a gap, and that nothing but a socket is ever removed.
 It may not accept connections.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["ADMIN_SOCKET", "CONTROL_SOCKET", "RunDirectory", "RunDirectoryError", "UnixListener"]

CONTROL_SOCKET: Final = "ztunnel.sock"
ADMIN_SOCKET: Final = "admin.sock"
LOCK_FILE: Final = "nodeagent.lock"

BACKLOG: Final = 16
"""Connections waiting on a socket that only the operator and one ztunnel use."""

MAX_SOCKET_PATH: Final = 107
"""Bytes of a unix socket's path (sun_path, unix(7)), less the terminating zero."""


class RunDirectoryError(Exception):
    """The run directory cannot be used; the message says what is wrong and what to do."""


class UnixListener:
    """A listening unix stream socket, 0600. `close` removes its file if it is still ours."""

    def __init__(self, path: Path, listening: socket.socket) -> None:
        self.path = path
        self.socket = listening
        self._inode = path.lstat().st_ino

    def close(self) -> None:
        """Close the socket; remove the file unless a successor has already replaced it."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.lstat().st_ino == self._inode:
                self.path.unlink()
        self.socket.close()


class RunDirectory:
    """The prepared directory, locked for this process until `close`."""

    def __init__(self, path: Path) -> None:
        """Create or check the directory and take its lock. Raises RunDirectoryError."""
        self.path = path
        _prepare(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._lock = os.open(path / LOCK_FILE, flags, 0o600)
        except OSError as error:
            raise RunDirectoryError(f"{path / LOCK_FILE}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunDirectoryError(
                f"{path}: another nodeagent is running with this run directory; "
                "stop it first, or give this one a run_dir of its own"
            ) from None

    def listen(self, name: str) -> UnixListener:
        """Listen on `<dir>/<name>`, replacing a dead daemon's socket. Raises RunDirectoryError."""
        path = self.path / name
        if len(os.fsencode(path)) > MAX_SOCKET_PATH - 4:
            raise RunDirectoryError(
                f"{path}: longer than a unix socket's path may be; shorten run_dir"
            )
        _refuse_other_than_socket(path)
        # Bound and protected under another name first: at no moment does `path` name a socket that
        # others may open, and a client never finds the path missing.
        temporary = self.path / f".{name}"
        _refuse_other_than_socket(temporary)
        temporary.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listening.settimeout(0)
            previous = os.umask(0o177)
            try:
                listening.bind(os.fspath(temporary))
            finally:
                os.umask(previous)
            listening.listen(BACKLOG)
            temporary.rename(path)
            return UnixListener(path, listening)
        except OSError as error:
            listening.close()
            raise RunDirectoryError(f"{path}: cannot listen: {error.strerror}") from error

    def close(self) -> None:
        """Release the lock. The file stays: removing it would let two daemons lock two files."""
        os.close(self._lock)


def _prepare(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise RunDirectoryError(f"{path}: not a directory (a symbolic link is refused)")
    if found.st_uid != os.geteuid():
        raise RunDirectoryError(
            f"{path}: owned by user {found.st_uid}, not by this daemon's {os.geteuid()}"
        )
    if found.st_mode & 0o077:
        raise RunDirectoryError(
            f"{path}: mode {found.st_mode & 0o7777:04o} lets others in; run `chmod 0700 {path}`"
        )


def _refuse_other_than_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirectoryError(f"{path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise RunDirectoryError(f"{path}: exists and is no socket; move it away")
