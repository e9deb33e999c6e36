"""The node itself: clock, disks, who may read what, and the embedded CA's certificates.

This module owns reading them. It promises to change nothing, and to keep no key: whether those of
the CA fit their certificates the CA's own code says.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from cryptography import x509

from nodeagent.doctor.facts import Authority, CaCertificate, Clock, Disk, Loose, Network
from nodeagent.identity import EmbeddedCa, ProviderError
from nodeagent.rundir import ADMIN_SOCKET, CONTROL_SOCKET
from nodeagent.settings import Settings

__all__ = ["authority", "clock", "disks", "loose", "network"]

FORWARDING: Final = {4: "ipv4/ip_forward", 6: "ipv6/conf/all/forwarding"}
TRACKED: Final = ("netfilter/nf_conntrack_count", "netfilter/nf_conntrack_max")

MAX_PEM_BYTES: Final = 256 * 1024
"""Of a file of the CA: what the CA itself reads."""

_STA_UNSYNC: Final = 0x0040
"""sys/timex.h: no NTP client or PTP clock disciplines the clock."""
_STATUS: Final = "status"
_MICROSECONDS: Final = 1_000_000

_PRIVATE: Final = 0o077

_libc = ctypes.CDLL(None, use_errno=True)


class _Timex(ctypes.Structure):
    """struct timex of adjtimex(2), as far as it is read; the rest is room."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        (_STATUS, ctypes.c_int),
        ("rest", ctypes.c_long * 32),
    )


def clock() -> Clock:
    """Return whether something disciplines the clock, by the kernel's word. Changes nothing."""
    found = _Timex()
    if _libc.adjtimex(ctypes.byref(found)) < 0:
        return Clock()
    return Clock(not found.status & _STA_UNSYNC, found.maxerror / _MICROSECONDS)


def network() -> Network:
    """Return whether the calling thread's namespace forwards, and how full its conntrack is."""
    forwards = {
        version: text == "1"
        for version, name in FORWARDING.items()
        if (text := _sysctl(name)) is not None
    }
    tracked, most = (int(_sysctl(name) or 0) for name in TRACKED)
    return Network(forwards, tracked, most)


def _sysctl(name: str) -> str | None:
    """Return a value of /proc/sys/net of the calling thread's namespace, None without it."""
    try:
        return Path("/proc/sys/net", name).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None


def disks(settings: Settings) -> tuple[Disk, ...]:
    """Return the room where the daemons write; one entry for each file system."""
    found: dict[int, Disk] = {}
    for wanted in (settings.state_dir, settings.ca_dir, settings.run_dir, _audit_file(settings)):
        path = _existing(wanted) if wanted is not None else None
        if path is None:
            continue
        room = os.statvfs(path)
        found.setdefault(
            path.stat().st_dev,
            Disk(
                str(path),
                room.f_bavail * room.f_frsize,
                room.f_blocks * room.f_frsize,
                room.f_favail,
                room.f_files,
            ),
        )
    return tuple(found.values())


def _audit_file(settings: Settings) -> Path | None:
    return Path(settings.audit.file) if settings.audit.file else None


def _existing(path: Path) -> Path | None:
    return next((each for each in (path, *path.parents) if each.exists()), None)


def loose(settings: Settings, settings_file: Path | None) -> tuple[Loose, ...]:
    """Return what others may read or change that they must not."""
    secret = [settings.state_dir, settings.run_dir, settings.ca_dir]
    secret += [settings.ca_dir / name for name in ("root-key.pem", "intermediate.pem")]
    secret += [settings.run_dir / name for name in (ADMIN_SOCKET, CONTROL_SOCKET)]
    found = [each for path in secret if (each := _judged(path, _PRIVATE)) is not None]
    for path in (settings_file, settings.config_dir):
        if path is not None and (each := _judged(path, stat.S_IWGRP | stat.S_IWOTH)) is not None:
            found.append(each)
    return tuple(found)


def _judged(path: Path, forbidden: int) -> Loose | None:
    try:
        seen = path.lstat()
    except OSError:
        return None
    quoted = shlex.quote(str(path))
    if stat.S_ISLNK(seen.st_mode):
        return None  # whoever uses it refuses links, or follows them by its own rules
    if seen.st_uid not in (0, os.geteuid()):
        return Loose(str(path), f"belongs to user {seen.st_uid}", f"chown root: {quoted}")
    if seen.st_mode & forbidden:
        what = "read or change" if forbidden == _PRIVATE else "change"
        mode = stat.S_IMODE(seen.st_mode)
        letters = "go-rwx" if forbidden == _PRIVATE else "go-w"
        return Loose(
            str(path), f"mode {mode:04o}: others may {what} it", f"chmod {letters} {quoted}"
        )
    return None


def authority(settings: Settings) -> Authority:
    """Return the certificates of the embedded CA."""
    directory = settings.ca_dir
    root, intermediate = directory / "root.pem", directory / "intermediate.pem"
    if not root.exists():
        problem = "root.pem is gone, while its CA is in use" if intermediate.exists() else ""
        return Authority(str(directory), made=bool(problem), problem=problem)
    found: list[CaCertificate] = []
    problem = ""
    for kind, path in (("root", root), ("intermediate", intermediate)):
        try:
            found += _certificates(kind, path)
        except FileNotFoundError:
            continue  # made at the next start
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is damaged or cut short"
            problem = problem or f"{path.name} cannot be read: {reason}"
    problem = problem or _unusable(settings)
    return Authority(
        str(directory), True, tuple(found), (directory / "root-key.pem").exists(), problem
    )


def _unusable(settings: Settings) -> str:
    ca = EmbeddedCa(
        settings.ca_dir,
        settings.trust_domain,
        ttl_seconds=settings.svid_ttl_seconds,
        permitted=lambda _: False,
    )
    try:
        ca.check()
    except ProviderError as error:
        return error.detail
    return ""


def _certificates(kind: str, path: Path) -> Iterable[CaCertificate]:
    with path.open("rb") as file:
        content = file.read(MAX_PEM_BYTES)
    for each in x509.load_pem_x509_certificates(content):
        yield CaCertificate(kind, path.name, each.not_valid_before_utc, each.not_valid_after_utc)
