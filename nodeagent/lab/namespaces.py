"""Network namespaces as files, and work done inside them.

This module owns how the lab makes, enters and removes named network namespaces and the mounts
under a lab's directory. It promises that the calling thread never changes namespace (work runs on
a thread made for it) and that removal needs no record but the mount table. It may not configure
anything inside a namespace.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from nodeagent.lab.launch import CLONE_NEWNET, MS_BIND, mount, mounts, setns, unmount, unshare

__all__ = ["create", "inode", "mount_bpf", "mounted", "remove", "run_in", "unmount_below"]

T = TypeVar("T")

BPF_MODE: Final = "mode=0700"


def _on_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread of its own: what it does to its namespaces ends with it."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body, name="lab-namespace")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def create(path: Path) -> None:
    """Make a network namespace that lives as long as `path` is mounted. Raises OSError."""
    path.touch(mode=0o600, exist_ok=False)

    def work() -> None:
        unshare(CLONE_NEWNET)
        mount("/proc/thread-self/ns/net", str(path), "", MS_BIND)

    _on_thread(work)


def run_in(path: Path, work: Callable[[], T]) -> T:
    """Return what `work` returns, run inside the network namespace at `path`. Raises OSError."""

    def inside() -> T:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(descriptor, CLONE_NEWNET)
        finally:
            os.close(descriptor)
        return work()

    return _on_thread(inside)


def remove(path: Path) -> None:
    """Let go of the namespace at `path`: it ends with the last process in it."""
    unmount(str(path))
    path.unlink()


def inode(path: Path) -> tuple[int, int]:
    """Return what identifies the living namespace at `path`, as `/proc/PID/ns/net` shows it."""
    status = path.stat()
    return status.st_dev, status.st_ino


def mount_bpf(path: Path) -> None:
    """Mount a BPF file system of the lab's own: its pins end when it is unmounted."""
    path.mkdir(mode=0o700)
    mount("bpf", str(path), "bpf", 0, BPF_MODE)


def unmount_below(directory: Path) -> None:
    """Unmount everything under `directory`, newest first, until nothing is left there."""
    prefix = f"{directory}{os.sep}"
    while points := [point for point, _ in mounts() if point.startswith(prefix)]:
        for point in reversed(points):
            with contextlib.suppress(FileNotFoundError):
                unmount(point)


def mounted(directory: Path) -> list[Path]:
    """Return the namespaces below `directory` that are mounted: others are empty files."""
    prefix = f"{directory}{os.sep}"
    return [Path(point) for point, kind in mounts() if kind == "nsfs" and point.startswith(prefix)]
