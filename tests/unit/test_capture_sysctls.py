"""Sysctls by name, with what they open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.capture.sysctls import Sysctls


@pytest.fixture
def sysctls() -> Iterator[Sysctls]:
    made = Sysctls()
    yield made
    made.close()


def test_a_value_is_read_without_white_space(sysctls: Sysctls) -> None:
    expected = Path("/proc/sys/net/ipv4/conf/lo/rp_filter").read_text(encoding="ascii").strip()
    assert sysctls.read("ipv4/conf/lo/rp_filter") == expected


def test_a_device_that_has_gone_is_no_error(sysctls: Sysctls) -> None:
    assert sysctls.read("ipv4/conf/nothing-there/rp_filter") == ""
    sysctls.write("ipv4/conf/nothing-there/rp_filter", "0")


def test_a_family_that_the_kernel_has_not_is_no_error(sysctls: Sysctls) -> None:
    assert sysctls.read("ipv5/conf/lo/rp_filter") == ""
    sysctls.write("ipv5/conf/lo/rp_filter", "0")


def test_what_cannot_be_set_is_said_with_its_name(sysctls: Sysctls) -> None:
    with pytest.raises(OSError, match=r"cannot set sysctl /proc/sys/net/ipv4/conf/lo/rp_filter"):
        sysctls.write("ipv4/conf/lo/rp_filter", "no number")


def test_a_directory_is_opened_once_and_closed(
    sysctls: Sysctls, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    closed: list[int] = []
    real_open, real_close = os.open, os.close

    def note_open(path: os.PathLike[str] | str, flags: int, **rest: int) -> int:
        opened.append(os.fspath(path))
        return real_open(path, flags, **rest)

    def note_close(fd: int) -> None:
        closed.append(fd)
        real_close(fd)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "close", note_close)
    for name in ("all", "default", "lo"):
        sysctls.read(f"ipv4/conf/{name}/rp_filter")
    sysctls.close()
    assert opened.count("/proc/sys/net/ipv4") == 1
    assert len(opened) == len(closed) == 4
