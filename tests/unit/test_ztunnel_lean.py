"""What the daemon does not load: it is most of what an idle one would hold."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from ztunnel import lean
lean.leave_out()
import hashlib, random, ztunnel.daemon
from pathlib import Path
print(hashlib.sha256(b"abc").hexdigest())
print(hashlib.blake2b(b"abc", digest_size=8).hexdigest())
maps = Path("/proc/self/maps").read_text()
print([name for name in ("libssl.so", "libcrypto.so") if name in maps])
"""


def test_the_systems_openssl_is_left_out_and_digests_work() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [
        # FIPS 180-4, B.1.
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "d8bb14d833d59559",
        "[]",
    ]
