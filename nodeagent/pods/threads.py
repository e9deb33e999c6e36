"""Code inside other network namespaces, on threads of its own.

This module owns `setns` for the daemon. It promises that only its own threads ever change their
namespace and that they are back home, holding no reference to a pod's namespace, when a call
returns. It may not know what it runs.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

__all__ = ["NamespaceThreads", "run_inside"]

T = TypeVar("T")

CLONE_NEWNET: Final = 0x40000000
"""linux/sched.h; os.setns comes with Python 3.12 only."""

THREADS: Final = 2
"""Pods that are worked on at once: the work is system calls and Python, so more gain nothing."""

_libc = ctypes.CDLL(None, use_errno=True)


def _enter(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}")


def _inside(home: int, fd: int, function: Callable[..., T], args: tuple[object, ...]) -> T:
    _enter(fd)
    try:
        return function(*args)
    finally:
        _enter(home)


class NamespaceThreads:
    """A few threads that visit namespaces. `home` is the namespace of the thread that makes it."""

    def __init__(self, threads: int = THREADS) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="netns")

    async def run(self, fd: int, function: Callable[..., T], *args: object) -> T:
        """Call `function(*args)` inside the namespace `fd`. Raises what it raises, and OSError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _inside, self._home, fd, function, args)

    def visit(self, fd: int, function: Callable[..., T], *args: object) -> T:
        """Call `function(*args)` inside the namespace `fd`, on one of these threads. Only from what
        `run_home` runs.
        """
        return _inside(self._home, fd, function, args)

    async def run_home(self, function: Callable[..., T], *args: object) -> T:
        """Call a blocking function on one of the threads, at home."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def close(self) -> None:
        """Wait for running calls and end the threads."""
        self._pool.shutdown()
        os.close(self._home)


def run_inside(fd: int, function: Callable[..., T], *args: object) -> T:
    """Call `function(*args)` inside the namespace `fd` on a thread made for it, and wait."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="netns") as pool:
            return pool.submit(_inside, home, fd, function, args).result()
    finally:
        os.close(home)
