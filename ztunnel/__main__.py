"""The entry point of `ztunnel`: `python -m ztunnel`, and the console script.

This module owns what must happen before anything else is imported, and nothing more.
"""

from __future__ import annotations

import signal

from ztunnel.lean import leave_out

__all__ = ["main"]


def main() -> None:
    # It would end the process until the daemon's handlers are there, which unblock it: logrotate
    # does not know who is just starting.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    leave_out()
    from ztunnel.daemon import command  # noqa: PLC0415 - see above

    command(prog_name="ztunnel")


if __name__ == "__main__":
    main()
