"""Pinned maps of another version's shape harm nobody: they are refused, not read past their end."""

from __future__ import annotations

import os

import pytest

from nodeagent.capture import _libbpf

KEY = bytes(4)


@pytest.mark.parametrize("kind", [_libbpf.MAP_TYPE_ARRAY, _libbpf.MAP_TYPE_PERCPU_ARRAY])
def test_sizes_are_the_maps_own(kind: int) -> None:
    fd = _libbpf.create_map(kind, "shape", 4, 4096, 1)
    try:
        with pytest.raises(OSError, match="shape"):
            _libbpf.read_map(fd, KEY, 16)
        with pytest.raises(OSError, match="shape"):
            _libbpf.update_map(fd, KEY, bytes(16))
        with pytest.raises(OSError, match="shape"):
            _libbpf.read_map(fd, b"", 1 << 20)
    finally:
        os.close(fd)
