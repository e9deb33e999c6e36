"""`python -m nodeagent` and the console script `nodeagent`: the command line, nothing else."""

from __future__ import annotations

import sys

from nodeagent.cli import cli

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
    if sys.argv[1:2] == ["run"]:
        # structlog imports rich where it is installed, for colours that the daemon never prints:
        # three megabytes. None in sys.modules is Python's way to say "not there".
        sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # typeshed has modules only
    cli(prog_name="nodeagent")


if __name__ == "__main__":
    main()
