"""The entry point of `ztunnel`: `python -m ztunnel`, and the console script.

This module owns what must happen before anything else is imported, and nothing more.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    # structlog imports rich where it is installed, for colours that the daemon never prints, and
    # asyncio imports ssl, with it the system's libssl, which the daemon does not use either: four
    # megabytes each. None in sys.modules is Python's way to say "not there".
    for unused in ("rich", "ssl"):
        sys.modules.setdefault(unused, None)  # type: ignore[arg-type]
    from ztunnel.daemon import command  # noqa: PLC0415 - see above

    command(prog_name="ztunnel")


if __name__ == "__main__":
    main()
