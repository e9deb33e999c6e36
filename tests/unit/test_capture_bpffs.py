"""Finding out whether a directory is on bpffs."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.capture import _libbpf
from nodeagent.capture.bpffs import BPF_FS_MAGIC, BpffsError, ensure_bpffs

PROC_SUPER_MAGIC = 0x9FA0


def test_names_that_bpffs_refuses_are_refused_in_words() -> None:
    with pytest.raises(BpffsError, match="dot"):
        ensure_bpffs(Path("/sys/fs/bpf/node.1"))


@pytest.mark.parametrize("directory", ["/var/lib/pins", "/proc/self/status/pins", "/"])
def test_a_directory_elsewhere_is_refused(directory: str) -> None:
    with pytest.raises(BpffsError, match="not on a BPF file system"):
        ensure_bpffs(Path(directory))


@pytest.mark.parametrize("kind, accepted", [(BPF_FS_MAGIC, True), (PROC_SUPER_MAGIC, False)])
def test_what_is_not_there_yet_is_on_the_file_system_of_what_is(
    monkeypatch: pytest.MonkeyPatch, kind: int, accepted: bool
) -> None:
    asked: list[str] = []

    def file_system(path: str) -> int:
        asked.append(path)
        if path != "/pins":
            raise FileNotFoundError(2, "no such file", path)
        return kind

    monkeypatch.setattr(_libbpf, "file_system", file_system)
    if accepted:
        ensure_bpffs(Path("/pins/here/agent"))
    else:
        with pytest.raises(BpffsError, match="not on a BPF file system"):
            ensure_bpffs(Path("/pins/here/agent"))
    assert asked == ["/pins/here/agent", "/pins/here", "/pins"]


def test_the_kernel_names_the_file_system() -> None:
    assert _libbpf.file_system("/proc/self/status") == PROC_SUPER_MAGIC
    with pytest.raises(FileNotFoundError):
        _libbpf.file_system("/proc/self/nothing")
