"""A program in a pod that asks over and over, and says when the answer changes.

This module owns `python -m meshbench.asker ADDRESS PORT`. One connection after the other sends a
byte and waits for one; a line is printed whenever that begins or ceases to succeed: the moment of
the first answer that differs, in seconds of CLOCK_MONOTONIC, which is one for all processes of a
machine, and "yes" or "no".
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Final

PAUSE_SECONDS: Final = 0.005
"""Between two connections: leaves the processors to those who are measured."""
ANSWER_SECONDS: Final = 5.0


def _asks(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), ANSWER_SECONDS) as sock:
            sock.sendall(b"?")
            return sock.recv(1) == b"?"
    except OSError:
        return False


def main() -> None:
    address, port = sys.argv[1], int(sys.argv[2])
    known: bool | None = None
    while True:
        answered = _asks(address, port)
        if answered is not known:
            known = answered
            print(time.monotonic(), "yes" if answered else "no", flush=True)
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main()
