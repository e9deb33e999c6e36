"""The BPF file system that the pins live in.

This module owns mounting it when it is missing. It promises that a directory it has accepted is on
bpffs. It may not touch what is pinned.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

__all__ = ["BpffsError", "ensure_bpffs", "mount_point"]

DEFAULT_MOUNT: Final = Path("/sys/fs/bpf")
"""Where every tool expects it; the kernel makes the empty directory."""

_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8


class BpffsError(Exception):
    """The directory for pins is not on bpffs, and cannot be made so."""


def mount_point(directory: Path, mountinfo: str) -> tuple[Path, str]:
    """Return where the file system of `directory` is mounted, and its type.

    `mountinfo` is the text of /proc/self/mountinfo (proc_pid_mountinfo(5)). Of several mounts on
    one place the last covers the others. Raises ValueError if nothing fits.
    """
    best: tuple[Path, str] | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))
        if directory.is_relative_to(point) and (
            best is None or len(point.parts) >= len(best[0].parts)
        ):
            best = point, after.split()[0]
    if best is None:
        raise ValueError(f"no mount holds {directory}")
    return best


def ensure_bpffs(directory: Path) -> None:
    """Make sure that `directory` is on bpffs, mounting that at /sys/fs/bpf if it is missing.

    Raises BpffsError, which says what to do.
    """
    if "." in str(directory):
        raise BpffsError(f"{directory}: bpffs takes no names with a dot; choose another bpf_dir")
    if _is_bpffs(directory):
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


def _is_bpffs(directory: Path) -> bool:
    mountinfo = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    return mount_point(directory, mountinfo)[1] == "bpf"
