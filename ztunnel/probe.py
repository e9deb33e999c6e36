"""Probes of the capture: connections that only want to know whether the tunnel takes them.

This module owns how such a connection is recognised. It promises that nothing but the reserved
destination is: an application's connection is never taken for a probe. It may not answer it.
"""

from __future__ import annotations

from typing import Final

from ztunnel import address
from ztunnel.protocol import PROBE_ADDRESSES, PROBE_PORT

__all__ = ["is_probe"]

_ADDRESSES: Final = frozenset(map(address.pack, PROBE_ADDRESSES))


def is_probe(destination: bytes, port: int) -> bool:
    """Whether a pod's connection to there is a probe: refused like a call of the tunnel itself,
    and neither logged nor counted as a connection.
    """
    return port == PROBE_PORT and destination in _ADDRESSES
