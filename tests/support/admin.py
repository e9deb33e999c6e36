"""A command beside an agent's admin socket: the real server, over answers that a test gives.

Owns the socket and the server, which are gone when the command has ended. It promises that an
answer that no test gave is an empty one.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import msgspec
from click.testing import CliRunner, Result

from nodeagent.admin import AdminServer, Configuration, Status
from nodeagent.cli import cli
from nodeagent.flows import Recording
from ztunnel import protocol

__all__ = ["Answers", "beside"]


class Answers:
    """What the agent says; `ages` are the ages, in seconds, of the flows that it was asked for."""

    def __init__(
        self,
        *,
        status: Status | None = None,
        configuration: Configuration | None = None,
        flows: Recording | None = None,
    ) -> None:
        self._status = status
        self._configuration = configuration
        self._flows = flows
        self.ages: list[int] = []

    async def status(self) -> Status:
        if self._status is None:
            raise NotImplementedError
        return self._status

    async def missing(self) -> tuple[str, ...]:
        return self._status.missing if self._status else ()

    def stuck(self) -> str:
        return ""

    async def metrics(self, *, openmetrics: bool) -> bytes:  # noqa: ARG002 - the interface's
        return b""

    def resources(self) -> tuple[protocol.Resource, ...]:
        return ()

    def configuration(self) -> Configuration | None:
        return self._configuration

    async def flows(self, age: int) -> bytes:
        self.ages.append(age)
        return msgspec.json.encode(self._flows)


def beside(directory: Path, answers: Answers, *arguments: str) -> Result:
    """Return how `nodeagent` with these arguments ended, the agent's run directory given to it."""

    async def main() -> Result:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(directory / "admin.sock"))
        admin = AdminServer(answers)
        await admin.serve(listening)
        try:
            command = [*arguments, "--run-dir", str(directory)]
            return await asyncio.to_thread(CliRunner().invoke, cli, command)
        finally:
            await admin.close()

    return asyncio.run(main())
