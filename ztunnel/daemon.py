"""The daemon: builds the parts, runs them, and stops them in order.

This module owns the process: options, limits, signals, and the only place where the C core and
the sockets to the outside are made. It promises that the service manager hears READY only once
traffic would pass, and WATCHDOG only while the core's workers turn; that no secret can be dumped
from the process; and that SIGTERM ends it in bounded time, every connection's end in the access
log. It may not decide anything about connections.

SIGTERM, SIGINT   stop: connections end, their lines are written.
SIGHUP            reopen the access log (logrotate).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import click
import structlog
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ztunnel import _core, access_log, logs, stats, tls
from ztunnel.admin import Page, Server, health_page, parse_address
from ztunnel.control import Control
from ztunnel.corelike import Kind
from ztunnel.health import Health
from ztunnel.reasons import ReasonsMismatchError
from ztunnel.reasons import check as check_reasons
from ztunnel.sdnotify import Notifier
from ztunnel.tunnel import TICK, Tunnel

__all__ = ["Daemon", "command"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel")

MAX_WORKERS: Final = 64
"""The core's own limit."""

WATCH_SECONDS: Final = 1.0
START_WATCH_SECONDS: Final = 0.1
"""Between looks at one's own health; shorter until the first success, which others wait for."""

LOG_DRAIN_SECONDS: Final = 5.0
"""For the access log's last lines at the end."""

_PR_SET_DUMPABLE: Final = 4
_UMASK: Final = 0o077


def _harden() -> None:
    """Keep keys from dumps and from other processes of the same user, and lift our own limit."""
    os.umask(_UMASK)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A piped core handler ignores RLIMIT_CORE; an undumpable process is not dumped at all, and its
    # memory, environment and descriptors are closed to ptrace and /proc. (prctl(2); after exec.)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_DUMPABLE")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_core() -> None:
    """Refuse a core that was built from other sources than the Python around it."""
    check_reasons(_core.REASONS)
    for kind in Kind:
        if getattr(_core, kind.name) != kind.value:
            raise ReasonsMismatchError(f"ztunnel._core numbers {kind.name} differently: rebuild it")


class Daemon:
    """One running tunnel."""

    def __init__(
        self, control: str, workers: int, log: access_log.AccessLog, notifier: Notifier
    ) -> None:
        self._notifier = notifier
        self._log = log
        self._core = _core.Core(workers, tls.function_table(_core.FUNCTIONS))
        self._tunnel = Tunnel(self._core, log, time.monotonic, time.time)
        self._control = Control(control, self._tunnel, self._answer)
        self._health = Health(self._core, self._tunnel, self._control, time.monotonic, time.time)
        self._stopping = asyncio.Event()
        self._scraping = asyncio.Lock()
        self._told_ready = False

    def capacity(self) -> dict[str, int]:
        """Return how many connections the limit of descriptors gives, at two for each."""
        most = self._core.stats().descriptors_most
        return {"descriptors": most, "connections": most // 2}

    async def _answer(self, what: str, args: Mapping[str, str]) -> bytes:
        return await self._health.answer(what, args)

    async def run(self, stats_at: tuple[str, int], ready_at: tuple[str, int]) -> None:
        """Serve until a signal asks to stop. Raises OSError when a port cannot be had."""
        loop = asyncio.get_running_loop()
        for order in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(order, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._log.reopen)
        # One thread: large changes and scrapes, which may wait for each other.
        loop.set_default_executor(ThreadPoolExecutor(1, "ztunnel-slow"))
        health = {"/healthz/ready": self._ready, "/healthz/live": self._live}
        servers = (Server({"/metrics": self._metrics}), Server(health))
        async with contextlib.AsyncExitStack() as stack:
            bound: list[str] = []
            for server, (host, port) in zip(servers, (stats_at, ready_at), strict=True):
                stack.push_async_callback(server.stop)
                chosen, number = await server.start(host, port)
                bound.append(f"[{chosen}]:{number}" if ":" in chosen else f"{chosen}:{number}")
            _log.info("listening", stats=bound[0], ready=bound[1])
            self._log.start()
            stack.callback(self._log.stop, LOG_DRAIN_SECONDS)
            self._tunnel.start(loop)
            stack.callback(self._tunnel.stop)
            stack.callback(self._notifier.stopping)
            # What has been imported and built by now lives for ever: the collector need not look.
            gc.freeze()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._control.run()),
                    group.create_task(self._tick()),
                    group.create_task(self._watch()),
                ]
                await self._stopping.wait()
                _log.info("stopping")
                for task in tasks:
                    task.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._tunnel.tick()

    async def _watch(self) -> None:
        """Tell the service manager of readiness, and that the workers turn."""
        pause = min(WATCH_SECONDS, self._notifier.watchdog_seconds / 3 or WATCH_SECONDS)
        while True:
            if not any(problem for _, problem in self._health.live()):
                self._notifier.alive()
            problems = [f"{name}: {problem}" for name, problem in self._health.ready() if problem]
            if not problems and not self._told_ready:
                self._told_ready = True
                self._notifier.ready()
                _log.info("ready", pods=len(self._tunnel.pods))
            self._notifier.status("; ".join(problems) or f"serving {len(self._tunnel.pods)} pods")
            await asyncio.sleep(pause if self._told_ready else START_WATCH_SECONDS)

    async def _metrics(self) -> Page:
        async with self._scraping:
            picture = stats.take(
                self._tunnel,
                self._core,
                self._control.status,
                self._log,
                _core.HISTOGRAM_BOUNDS_US,
                tuple(_core.DEADLINES),
            )
            body = await asyncio.to_thread(stats.render, picture)
        return Page(200, CONTENT_TYPE_PLAIN_0_0_4, body)

    async def _ready(self) -> Page:
        return health_page(self._health.ready())

    async def _live(self) -> Page:
        return health_page(self._health.live())


def _address(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[str, int]:
    try:
        return parse_address(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--control",
    required=True,
    type=click.Path(dir_okay=False),
    help="nodeagent's control socket (its directory must be writable by its owner only).",
)
@click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    default=None,
    help="Threads of the data path.  [default: the CPUs that this process may use]",
)
@click.option(
    "--stats-address",
    default="127.0.0.1:15020",
    show_default=True,
    callback=_address,
    help="Where /metrics is served.",
)
@click.option(
    "--ready-address",
    default="127.0.0.1:15021",
    show_default=True,
    callback=_address,
    help="Where /healthz/ready and /healthz/live are served.",
)
@click.option(
    "--access-log",
    "access_log_path",
    default=access_log.STDOUT,
    show_default=True,
    help="File of the access log, '-' for standard output. SIGHUP reopens it.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Form of the access log and of the daemon's own log.",
)
@click.option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)
def command(
    control: str,
    workers: int | None,
    stats_address: tuple[str, int],
    ready_address: tuple[str, int],
    access_log_path: str,
    log_format: str,
    log_level: str,
) -> None:
    """Carry the connections of this node's pods, by mutual TLS, as nodeagent says."""
    logs.setup(log_level, log_format)
    try:
        _harden()
        _check_core()
        form = access_log.json_line if log_format == "json" else access_log.text_line
        log = access_log.AccessLog(access_log_path, form)
        notifier = Notifier(os.environ)
        count = workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
        daemon = Daemon(str(Path(control).absolute()), count, log, notifier)
        _log.info("starting", workers=count, control=control, **daemon.capacity())
        asyncio.run(daemon.run(stats_address, ready_address))
    except (OSError, tls.TlsError, ReasonsMismatchError) as error:
        _log.error("cannot run", error=str(error))
        sys.exit(1)
    _log.info("stopped")
