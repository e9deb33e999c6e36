"""Sysctls of the network namespace that the calling thread is in, by name below /proc/sys/net.

This module owns reading and writing them. It promises that a sysctl of a device that has gone is no
error, and that nothing stays open after `close`. It decides nothing.

Each first directory is opened once a visit. All namespaces' directories of one name are in one
bucket of the kernel's cache of names, so that a whole path costs a comparison for each pod of the
node: with 400 pods, 14 of them for each pod took a seventh of an enrolment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["Sysctls"]

ROOT: Final = Path("/proc/sys/net")

MOST_READ: Final = 64
"""Bytes of a sysctl: all of ours are numbers."""


class Sysctls:
    """Made anywhere, and used inside one namespace until `close`; one thread at a time."""

    def __init__(self) -> None:
        self._directories: dict[str, int] = {}

    def read(self, name: str) -> str:
        """Return a value without the white space at its end, empty if there is no such sysctl.

        By descriptor: ten of them are read in each audit, and Python's files cost three times as
        much. Raises OSError.
        """
        try:
            fd = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return ""
        try:
            return os.read(fd, MOST_READ).decode("ascii").strip()
        finally:
            os.close(fd)

    def write(self, name: str, value: str) -> None:
        """Set a value, unless there is no such sysctl. Raises OSError, which says what to do."""
        try:
            fd = self._open(name, os.O_WRONLY)
            try:
                os.write(fd, value.encode("ascii"))
            finally:
                os.close(fd)
        except FileNotFoundError:
            return  # the device has gone, and the sysctl with it
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot set sysctl {ROOT / name}: {error.strerror} "
                "(is /proc/sys writable for the agent?)",
            ) from None

    def close(self) -> None:
        """Close the directories. What is used later opens them again."""
        while self._directories:
            os.close(self._directories.popitem()[1])

    def _open(self, name: str, flags: int) -> int:
        first, _, rest = name.partition("/")
        directory = self._directories.get(first)
        if directory is None:
            directory = os.open(ROOT / first, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._directories[first] = directory
        return os.open(rest, flags | os.O_CLOEXEC, dir_fd=directory)
