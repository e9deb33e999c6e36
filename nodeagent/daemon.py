"""The daemon around the agent: sockets, signals, service manager, watchdog, ordered end.

This module owns the order of starting and ending. It promises READY=1 only once the configuration
is in force, what an earlier run left is found, the sockets listen and every pod has been tried; a
watchdog beat only while the event loop and the worker threads answer; and that ending undoes
nothing: pods stay captured, and ztunnel goes on. It may not decide anything about pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec
import structlog

from nodeagent.admin import (
    AdminServer,
    Configuration,
    NoAnswerError,
    Page,
    Question,
    Relay,
    Relayed,
    Status,
    Window,
)
from nodeagent.admin.model import PodState
from nodeagent.admin.settings import SettingsReport
from nodeagent.agent import Agent
from nodeagent.capture import CaptureError
from nodeagent.certificates_report import certificates_report
from nodeagent.connections import Carried
from nodeagent.control import QueryError
from nodeagent.page import AccessError, Gate, read_token, tls_context
from nodeagent.reports import Reports
from nodeagent.rundir import ADMIN_SOCKET, CONTROL_SOCKET, RunDirectory
from nodeagent.sdnotify import ServiceManager
from nodeagent.settings.page import Page as WebPage
from ztunnel import protocol

__all__ = ["DaemonError", "serve"]

DEFAULT_BEAT_SECONDS: Final = 10.0
"""Between two looks at the worker threads when no service manager asks for a watchdog."""

STUCK_SECONDS: Final = 20.0
"""Without an answer of the worker threads: they work for at most a few seconds on a pod."""

SWITCH_SECONDS: Final = 0.0005
"""For which a worker thread keeps the event loop waiting for Python's lock (5 ms by default): while
pods are enrolled the loop would answer nobody in time, with a wait at each of its system calls."""

SUMMARY_SECONDS: Final = 1.0

ADMIN_BACKLOG: Final = 16

log = structlog.get_logger()


class DaemonError(Exception):
    """The daemon cannot start. The message says what is wrong and what to do."""


async def serve(
    agent: Agent,
    directory: RunDirectory,
    manager: ServiceManager,
    probe: Callable[[], Awaitable[None]],
    objection: Callable[[], str],
    settings: SettingsReport,
) -> None:
    """Run until SIGTERM or SIGINT. `probe` returns once a worker thread has answered. `settings`
    is what is told of them.

    SIGHUP ends the daemon too, to be started again by the service manager with its settings read
    anew, unless there is an `objection` to them: then it goes on with those in force, and says so.

    Raises DaemonError when the start fails; ends with an exception, to be
    restarted, when one of the agent's loops does.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)

    def reload() -> None:
        wrong = objection()
        if wrong:
            log.error("reload refused; the settings in force stay", error=wrong)
        else:
            log.info("reload: ending, to be started with the new settings")
            ending.set()

    loop.add_signal_handler(signal.SIGHUP, reload)
    async with contextlib.AsyncExitStack() as stack:
        control = directory.listen(CONTROL_SOCKET)
        stack.callback(control.close)
        local = directory.listen(ADMIN_SOCKET)
        stack.callback(local.close)
        backend = _Backend(agent, settings)
        reports = backend.reports
        admin = AdminServer(
            backend,
            {
                "/graph": Window("who talked to whom, and how", reports.graph),
                "/report/plaintext": Window(
                    "who called without identity, and whether STRICT is safe", reports.plaintext
                ),
                "/asdex": Window("how well connections are protected", reports.asdex),
            },
            {
                "/certificates": Page("identities, chains and roots", backend.certificates),
                "/settings": Page("the settings, and where each comes from", backend.settings),
            },
            {"/stats": Relay(STATS, backend.stats)},
            {
                "/connections": Question(
                    "what is open; ?pod=, direction=, security=, identity=, limit=",
                    backend.connections,
                )
            },
        )
        stack.push_async_callback(admin.close)
        await admin.serve(local.socket)
        await admin.serve(_listen(agent.settings.admin_address, "admin_address"))
        if agent.settings.page.address:
            await _show_page(admin, agent.settings.page)
        manager.status("finding what an earlier run has enrolled")
        try:
            await agent.recover()
        except CaptureError as error:
            raise DaemonError(str(error)) from error
        # What has been imported and built by now lives for ever: the collector need not look. With
        # a thousand pods that come at once it would, several times, for a tenth of a second.
        gc.collect()
        gc.freeze()
        tasks = [
            asyncio.ensure_future(agent.run(control.socket)),
            asyncio.ensure_future(_announce(agent, manager)),
            asyncio.ensure_future(_beat(manager, probe, backend)),
            asyncio.ensure_future(ending.wait()),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            manager.stopping()
            log.info("ending; pods stay captured")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _show_page(admin: AdminServer, page: WebPage) -> None:
    """Show the page where the settings say; without its token or key the daemon does not start."""
    context = None
    try:
        gate = Gate(read_token(page.token_file))
        if page.certificate_file is not None and page.key_file is not None:
            context = tls_context(page.certificate_file, page.key_file)
    except AccessError as error:
        raise DaemonError(str(error)) from error
    await admin.serve_page(_listen(page.address, "page.address"), gate, context)


def _listen(address: str, setting: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        listening = socket.create_server(
            (host.strip("[]"), int(port)), family=family, backlog=ADMIN_BACKLOG
        )
    except OSError as error:
        raise DaemonError(
            f"{setting} {address}: cannot listen: {error.strerror}; "
            f"stop what uses the port, or set another {setting}"
        ) from error
    listening.settimeout(0)
    return listening


async def _announce(agent: Agent, manager: ServiceManager) -> None:
    manager.status("reading the configuration and enrolling pods")
    await agent.settled()
    manager.ready()
    log.info("started", node=agent.settings.node, pods=len(agent.picture().pods))
    while True:
        seen = agent.progress
        manager.status(_summary(agent.picture()))
        # Not more often than a person reads: a picture of a thousand pods has its price.
        await asyncio.sleep(SUMMARY_SECONDS)
        await agent.progress_after(seen)


def _summary(status: Status) -> str:
    enrolled = sum(pod.state is PodState.ENROLLED for pod in status.pods)
    pods = f"{enrolled} of {len(status.pods)} pods enrolled"
    return f"{pods}; ready" if status.ready else f"{pods}; not ready: {status.missing[0]}"


async def _beat(
    manager: ServiceManager, probe: Callable[[], Awaitable[None]], backend: _Backend
) -> None:
    # Three beats within the manager's patience: one may be late.
    every = (manager.watchdog_seconds or 3 * DEFAULT_BEAT_SECONDS) / 3
    answered = time.monotonic()
    pending: asyncio.Task[None] | None = None
    while True:
        if pending is None:
            pending = asyncio.ensure_future(probe())
        await asyncio.wait({pending}, timeout=every)
        if pending.done():
            pending.result()
            pending = None
            answered = time.monotonic()
        silent = time.monotonic() - answered
        backend.trouble = ""
        if silent < STUCK_SECONDS:
            manager.watchdog()
        else:
            backend.trouble = f"worker threads have not answered for {silent:.0f} s"
            log.error("stuck", reason=backend.trouble)
        if pending is None:
            await asyncio.sleep(every)


STATS: Final = "what came in, by Envoy's names; ?workload=NAMESPACE/NAME&filter=REGEX"


class _Backend:
    """The agent as the admin listeners see it."""

    def __init__(self, agent: Agent, settings: SettingsReport) -> None:
        self._agent = agent
        self._settings = settings
        self.reports = Reports(agent)
        self._carried = Carried(agent.settings.node, agent.control.carrying)
        self.trouble = ""

    async def status(self) -> Status:
        return await self._agent.status()

    async def missing(self) -> tuple[str, ...]:
        return await self._agent.missing()

    def stuck(self) -> str:
        return self.trouble

    async def metrics(self, *, openmetrics: bool) -> bytes:
        await self.reports.score()
        status = self._agent.picture()
        render = self._agent.instruments.render
        # A second or so of a large node's numbers must not hold up a change.
        return await asyncio.to_thread(render, status, openmetrics=openmetrics)

    def resources(self) -> tuple[protocol.Resource, ...]:
        return tuple(self._agent.control.state.values())

    def configuration(self) -> Configuration | None:
        return self._agent.configuration()

    async def flows(self, age: int) -> bytes:
        recorder = self._agent.parts.flows
        asked = await self.reports.reported()
        node = self._agent.settings.node

        def made() -> bytes:
            return msgspec.json.encode(recorder.read(node, age, asked=asked))

        return await asyncio.to_thread(made)

    async def certificates(self) -> bytes:
        agent = self._agent
        workloads = {pod.workload: pod.identity for pod in agent.picture().pods}
        status = agent.identities.status()
        resources = self.resources()
        return await asyncio.to_thread(
            lambda: msgspec.json.encode(
                certificates_report(
                    datetime.now(UTC),
                    agent.settings.node,
                    agent.settings.trust_domain,
                    status,
                    resources,
                    workloads,
                )
            )
        )

    async def settings(self) -> bytes:
        return msgspec.json.encode(self._settings)

    async def connections(self, query: Mapping[str, str]) -> bytes:
        """Return the JSON of the connections that the query admits."""
        wanted = protocol.ConnectionFilter.read(query)
        try:
            found = await self._carried.take(wanted)
        except (QueryError, msgspec.DecodeError) as error:
            raise NoAnswerError(str(error)) from error
        return await asyncio.to_thread(msgspec.json.encode, found)

    async def stats(self, query: str) -> Relayed:
        try:
            answer = await self._agent.control.query("stats", {"query": query})
            return msgspec.json.decode(answer, type=Relayed)
        except (QueryError, msgspec.DecodeError) as error:
            return Relayed(503, "text/plain; charset=utf-8", f"{error}\n")
