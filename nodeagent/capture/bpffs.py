"""The BPF file system that the pins live in.

This module owns mounting it when it is missing. It promises that a directory it has accepted is on
bpffs. It may not touch what is pinned.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

from nodeagent.capture import _libbpf

__all__ = ["BpffsError", "ensure_bpffs", "is_bpffs"]

DEFAULT_MOUNT: Final = Path("/sys/fs/bpf")
"""Where every tool expects it; the kernel makes the empty directory."""

BPF_FS_MAGIC: Final = 0xCAFE4A11
"""linux/magic.h."""

_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8


class BpffsError(Exception):
    """The directory for pins is not on bpffs, and cannot be made so."""


def ensure_bpffs(directory: Path) -> None:
    """Make sure that `directory` is on bpffs, mounting that at /sys/fs/bpf if it is missing.

    Raises BpffsError, which says what to do.
    """
    if "." in str(directory):
        raise BpffsError(f"{directory}: bpffs takes no names with a dot; choose another bpf_dir")
    if is_bpffs(directory):
        return
    if not directory.is_relative_to(DEFAULT_MOUNT):
        raise BpffsError(f"{directory} is not on a BPF file system: mount one, or set bpf_dir")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", bytes(DEFAULT_MOUNT), b"bpf", _MS_NOSUID_NODEV_NOEXEC, b"mode=0700"):
        code = ctypes.get_errno()
        raise BpffsError(
            f"cannot mount bpffs at {DEFAULT_MOUNT} ({os.strerror(code)}): "
            f"run `mount -t bpf bpf {DEFAULT_MOUNT}`"
        )


def is_bpffs(directory: Path) -> bool:
    """Whether `directory` is, or would be made, on a BPF file system."""
    # Asked before each enrolment. The table of mounts has a line or two for each pod's namespace:
    # read once a pod, it took most of the time of enrolling a thousand.
    for path in (directory, *directory.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return _libbpf.file_system(str(path)) == BPF_FS_MAGIC
    return False
