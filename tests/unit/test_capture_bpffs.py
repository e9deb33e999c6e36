"""Finding the mount that holds a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodeagent.capture.bpffs import BpffsError, ensure_bpffs, mount_point

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
25 22 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw
31 25 0:28 / /sys/fs/bpf rw,nosuid - bpf bpf rw,mode=700
40 22 0:40 / /mnt/with\\040space rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    "directory, point, kind",
    [
        ("/sys/fs/bpf/nodeagent", "/sys/fs/bpf", "bpf"),
        ("/sys/fs/bpf", "/sys/fs/bpf", "bpf"),
        ("/sys/fs/bpfother", "/sys", "sysfs"),
        ("/var", "/", "ext4"),
        ("/mnt/with space/x", "/mnt/with space", "tmpfs"),
    ],
)
def test_the_closest_mount_counts(directory: str, point: str, kind: str) -> None:
    assert mount_point(Path(directory), MOUNTINFO) == (Path(point), kind)


def test_the_last_mount_on_one_place_counts() -> None:
    covered = MOUNTINFO + "50 31 0:50 / /sys/fs/bpf rw - tmpfs tmpfs rw\n"
    assert mount_point(Path("/sys/fs/bpf/x"), covered)[1] == "tmpfs"


def test_names_that_bpffs_refuses_are_refused_in_words() -> None:
    with pytest.raises(BpffsError, match="dot"):
        ensure_bpffs(Path("/sys/fs/bpf/node.1"))


def test_a_directory_elsewhere_is_refused() -> None:
    with pytest.raises(BpffsError, match="not on a BPF file system"):
        ensure_bpffs(Path("/var/lib/pins"))
