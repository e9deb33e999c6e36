"""What the cipher alone takes: AES-128-GCM, as TLS 1.3 of every subject here uses it.

This module owns that one measurement. It promises the processor's own cost of sealing and of
opening, next to nothing of a call's or of memory's: the part of a tunnel's work that no design
can save.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["CHUNK_BYTES", "measure"]

CHUNK_BYTES: Final = 256 * 1024
"""At once, as the relays copy; a record of 16 KiB would add the cost of Python's call to it."""
TAG_BYTES: Final = 16
NONCE_BYTES: Final = 12
KEY_BITS: Final = 128
CPU_SECONDS: Final = 0.2
"""Some thousand calls: the clock of a process counts in microseconds."""
CALLS: Final = 50


def _per_gigabyte(call: Callable[[], object]) -> float:
    calls = 0
    began = time.process_time()
    while (used := time.process_time() - began) < CPU_SECONDS:
        for _ in range(CALLS):
            call()
        calls += CALLS
    return used / (calls * CHUNK_BYTES) * 1e9


def measure() -> dict[str, float]:
    """Return CPU-seconds per GB (10⁹ bytes) of sealing and of opening."""
    aead = AESGCM(AESGCM.generate_key(KEY_BITS))
    nonce = os.urandom(NONCE_BYTES)
    plain = os.urandom(CHUNK_BYTES)
    sealed = bytearray(CHUNK_BYTES + TAG_BYTES)
    opened = bytearray(CHUNK_BYTES)
    # One nonce for all: what is sealed here is random, and leaves with this function.
    seal = _per_gigabyte(lambda: aead.encrypt_into(nonce, plain, None, sealed))
    return {
        "seal_per_gb": seal,
        "open_per_gb": _per_gigabyte(lambda: aead.decrypt_into(nonce, sealed, None, opened)),
    }
