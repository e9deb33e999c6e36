"""The entry point of `ztunnel`: `python -m ztunnel`, and the console script.

This module owns what must happen before anything else is imported, and nothing more.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    # structlog imports rich where it is installed, for colours that the daemon never prints:
    # four of its 45 MB. None in sys.modules is Python's way to say "not there".
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
    from ztunnel.daemon import command  # noqa: PLC0415 - see above

    command(prog_name="ztunnel")


if __name__ == "__main__":
    main()
