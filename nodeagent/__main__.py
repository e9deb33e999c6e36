"""`python -m nodeagent` and the console script `nodeagent`: the command line, nothing else."""

from __future__ import annotations

from nodeagent.cli import cli

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process."""
    cli(prog_name="nodeagent")


if __name__ == "__main__":
    main()
