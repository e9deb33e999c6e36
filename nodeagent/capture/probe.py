"""Does this kernel have what the capture needs? Tried, not guessed from version numbers.

This module owns the list of features. It promises to leave nothing behind but, where it is asked
to, a mounted bpffs. It blocks, and runs in the agent's own namespace.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable
from pathlib import Path

from nodeagent.capture import _libbpf, older
from nodeagent.capture.bpffs import BpffsError, ensure_bpffs, is_bpffs
from nodeagent.capture.model import Finding
from nodeagent.capture.shared import load_code, load_marker
from nodeagent.pods.netns import current_cookie

__all__ = ["probe"]


def _load(name: str) -> str:
    loaded = _libbpf.Object(load_code(name), name)
    try:
        loaded.load()
    finally:
        loaded.close()
    return "loads"


def _marker() -> str:
    os.close(load_marker())
    return "loads"


def _sysctl() -> str:
    path = Path("/proc/sys/net/ipv4/tcp_fwmark_accept")
    return f"{path} is {path.read_text(encoding='ascii').strip()}"


def _destroy() -> str:
    code = older.probe_destroy()
    if code not in (0, errno.ENOENT):
        raise OSError(code, os.strerror(code))
    return "works"


def probe(bpf_dir: Path, *, mount: bool = True) -> list[Finding]:
    """Try each feature. `mount`: a bpffs that is missing is mounted where it belongs."""

    def bpffs() -> str:
        if mount:
            ensure_bpffs(bpf_dir)
        elif not is_bpffs(bpf_dir):
            raise BpffsError(f"{bpf_dir} is not on a mounted BPF file system")
        return str(bpf_dir)

    older_use = "older connections living on under PERMISSIVE: without it they are reset"
    trials: list[tuple[str, Callable[[], str], str]] = [
        ("bpffs", bpffs, ""),
        ("sk_lookup", lambda: _load("capture"), ""),
        ("tc_guard", lambda: _load("guard"), ""),
        ("netns_cookie", lambda: f"{current_cookie():#x}", ""),
        ("tcp_fwmark_accept", _sysctl, ""),
        ("tcp_iterator", _marker, older_use),
        ("sock_destroy", _destroy, "resetting older connections: without it they hang"),
    ]
    findings = []
    for name, trial, use in trials:
        detail, present = "", False
        try:
            detail = trial()
            present = True
        except (OSError, BpffsError) as error:
            detail = f"Linux {platform.release()}: {error}"
        findings.append(Finding(name, present, detail, use))
    return findings
