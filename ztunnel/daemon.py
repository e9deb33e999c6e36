"""The daemon: builds the parts, runs them, and stops them in order.

This module owns the process: options, limits, signals, and the only place where the C core and
the sockets to the outside are made. It promises that the service manager hears READY only once
traffic would pass, and WATCHDOG only while the core's workers turn; that no secret can be dumped
from the process; that it holds its ports only while it serves, so that a successor gets them; and
that its end is bounded, every connection's end in the access log. It may not decide anything about
connections.

SIGHUP, SIGTERM, SIGINT   a successor, stop, end now: `ztunnel.upgrade`.
SIGUSR1                   reopen the access log and the audit log's file (logrotate).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import click
import msgspec
import structlog

from ztunnel import _core, logs, tls
from ztunnel.admin import Asked, Page, Server, health_page, parse_address
from ztunnel.audit import AuditLog
from ztunnel.control import Control
from ztunnel.corelike import Kind
from ztunnel.health import Health
from ztunnel.log_writer import STDOUT
from ztunnel.observe import access_log, envoy_stats, stats
from ztunnel.observe.arrivals import whole
from ztunnel.observe.beginnings import LOOK_SECONDS, Beginnings
from ztunnel.observe.flows import REPORT_SECONDS
from ztunnel.observe.listing import Listing
from ztunnel.reasons import ReasonsMismatchError
from ztunnel.reasons import check as check_reasons
from ztunnel.sdnotify import Notifier
from ztunnel.settings import AuditForm
from ztunnel.successor import launch
from ztunnel.tunnel import TICK, Tunnel
from ztunnel.upgrade import Upgrade

__all__ = ["Daemon", "command"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel")

MAX_WORKERS: Final = 64
"""The core's own limit."""

SWITCH_SECONDS: Final = 0.0005
"""For which the slow thread keeps the interpreter when a question of the core waits for it: a tenth
of Python's own, so that a scrape or a large change adds half a millisecond to a decision, not five.
A thread that nobody waits for is not interrupted."""

WATCH_SECONDS: Final = 1.0
START_WATCH_SECONDS: Final = 0.1
"""Between looks at one's own health; shorter until the first success, which others wait for."""

PORT_SECONDS: Final = 5.0
"""After which a port in use is no predecessor's that is about to give it up."""

PORT_POLL_SECONDS: Final = 0.05
"""Between attempts: for so long a probe may find nobody."""

LOG_DRAIN_SECONDS: Final = 5.0
"""For the last lines of either log at the end."""

LAST_REPORT_SECONDS: Final = 1.0
"""For the last counts at the end; a nodeagent that is there takes them at once."""

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
        self,
        control: str,
        workers: int,
        log: access_log.AccessLog,
        audit: AuditLog,
        notifier: Notifier,
        *,
        starts: bool,
    ) -> None:
        self._notifier = notifier
        self._log = log
        self._audit = audit
        self._core = _core.Core(workers, tls.function_table(_core.FUNCTIONS))
        self._tunnel = Tunnel(self._core, log, time.monotonic, time.time, audit=audit)
        started = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self._control = Control(control, self._tunnel, self._answer, started)
        self._upgrade = Upgrade(
            self._core,
            self._drain,
            lambda: launch(notifier.environment),
            self._control.tell,
            self._cut,
            notifier,
            time.monotonic,
        )
        self._health = Health(
            self._core,
            self._tunnel,
            self._control,
            time.monotonic,
            time.time,
            self._upgrade.status,
            log.path if log.path == STDOUT else str(Path(log.path).absolute()),
        )
        self._listing = Listing(
            self._core, self._tunnel, _core.CONNECTION_STATES, time.monotonic, time.time
        )
        self._beginnings: Beginnings | None = None
        if starts:
            state = _core.CONNECTION_STATES.index("open")
            self._beginnings = Beginnings(self._tunnel.events, log, state)
        self._servers: list[Server] = []
        self._bound = False
        self._failure: OSError | None = None
        self._scraping = asyncio.Lock()
        self._told_ready = False

    def capacity(self) -> dict[str, int]:
        """Return how many connections the limit of descriptors gives, at two for each."""
        most = self._core.stats().descriptors_most
        return {"descriptors": most, "connections": most // 2}

    async def _answer(self, what: str, args: Mapping[str, str]) -> bytes:
        if what == "drain":
            pid = args.get("successor", "")
            self._upgrade.hand_over(int(pid) if pid.isdecimal() else 0)
            return b"{}"
        if what == "report":
            await self._tell_flows(asked=True)
            return b"{}"
        if what == "stats":
            page = await self._stats(Asked(args.get("query", ""), ""))
            body = page.body.decode()
            return msgspec.json.encode({"status": page.status, "media": page.media, "body": body})
        if what == "connections":
            return await self._listing.answer(args)
        return await self._health.answer(what, args)

    def _drain(self) -> None:
        self._control.draining = True
        self._tunnel.drain()
        self._release()

    def _cut(self) -> int:
        return dict(zip(_core.DEADLINES, self._core.stats().expired, strict=True))["drain"]

    async def run(self, stats_at: tuple[str, int], ready_at: tuple[str, int]) -> None:
        """Serve until the end. Raises OSError when a port cannot be had."""
        loop = asyncio.get_running_loop()
        for number, order in (
            (signal.SIGTERM, self._upgrade.stop),
            (signal.SIGINT, self._upgrade.end),
            (signal.SIGHUP, self._upgrade.reload),
            (signal.SIGUSR1, self._reopen),
        ):
            loop.add_signal_handler(number, order)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        sys.setswitchinterval(SWITCH_SECONDS)
        # One thread: large changes and scrapes, which may wait for each other.
        loop.set_default_executor(ThreadPoolExecutor(1, "ztunnel-slow"))
        health = {"/healthz/ready": self._ready, "/healthz/live": self._live}
        self._servers = [
            Server({"/metrics": self._metrics, "/stats": self._stats}),
            Server(health),
        ]
        async with contextlib.AsyncExitStack() as stack:
            for server in self._servers:
                stack.push_async_callback(server.stop)
            self._log.start()
            stack.callback(self._log.stop, LOG_DRAIN_SECONDS)
            # Before the access log, which it may write to.
            stack.callback(self._audit.stop, LOG_DRAIN_SECONDS)
            stack.callback(self._tunnel.traces.stop, LOG_DRAIN_SECONDS)
            self._tunnel.start(loop)
            stack.callback(self._tunnel.stop)
            stack.callback(self._notifier.stopping)
            # What has been imported and built by now lives for ever: the collector need not look.
            gc.freeze()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._converse()),
                    group.create_task(self._listen((stats_at, ready_at))),
                    group.create_task(self._tick()),
                    group.create_task(self._watch()),
                    group.create_task(self._upgrade.run()),
                    group.create_task(self._upgrade.reloads()),
                    group.create_task(self._report()),
                ]
                if self._beginnings is not None:
                    tasks.append(group.create_task(self._tell(self._beginnings)))
                await self._upgrade.over.wait()
                # Nobody is let in behind the last report.
                self._tunnel.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._tell_flows(last=True), LAST_REPORT_SECONDS)
                for task in tasks:
                    task.cancel()
        if self._failure is not None:
            raise self._failure

    def _reopen(self) -> None:
        self._log.reopen()
        self._audit.reopen()

    async def _converse(self) -> None:
        await self._control.run()
        _log.warning("sent away by nodeagent: what is still carried is cut")
        self._upgrade.end()

    async def _listen(self, addresses: Sequence[tuple[str, int]]) -> None:
        """Have the ports as soon as nobody else has them; end if they cannot be had."""
        try:
            pairs = zip(self._servers, addresses, strict=True)
            bound = [await self._have(server, *address) for server, address in pairs]
        except OSError as error:
            self._failure = error
            self._upgrade.end()
            return
        if self._upgrade.draining:
            self._release()
            return
        self._bound = True
        _log.info("listening", stats=bound[0], ready=bound[1])

    async def _have(self, server: Server, host: str, port: int) -> str:
        """Bind; wait for a predecessor, which gives its ports up when it drains.

        Raises OSError, but not because a port is in use while connections are carried.
        """
        since = time.monotonic()
        said = False
        while not self._upgrade.draining:
            try:
                chosen, number = await server.start(host, port)
            except OSError as error:
                late = time.monotonic() - since > PORT_SECONDS
                if error.errno != errno.EADDRINUSE or (late and not self._tunnel.committed):
                    raise
                if late and not said:
                    said = True
                    _log.error("not ready: a port is in use", port=port, error=str(error))
                await asyncio.sleep(PORT_POLL_SECONDS)
            else:
                return f"[{chosen}]:{number}" if ":" in chosen else f"{chosen}:{number}"
        return ""

    def _release(self) -> None:
        for server in self._servers:
            server.release()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._tunnel.tick()

    async def _tell(self, beginnings: Beginnings) -> None:
        """Have a line in the access log for each connection that has opened."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await beginnings.look(self._listing.look)
            except Exception:  # noqa: BLE001 - a line lost must not end the tunnel
                _log.exception("connections that have opened could not be told")

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self._tell_flows()

    async def _tell_flows(self, *, asked: bool = False, last: bool = False) -> None:
        """Tell nodeagent who has called."""
        try:
            await self._tunnel.flows.report(self._control.report, asked=asked, last=last)
        except Exception:  # noqa: BLE001 - a report lost must not end the tunnel
            _log.exception("callers could not be reported")

    async def _watch(self) -> None:
        """Tell the service manager of readiness, and that the workers turn."""
        pause = min(WATCH_SECONDS, self._notifier.watchdog_seconds / 3 or WATCH_SECONDS)
        while not self._upgrade.draining:
            if not any(problem for _, problem in self._health.live()):
                self._notifier.alive()
            problems = [f"{name}: {problem}" for name, problem in self._health.ready() if problem]
            if not problems and self._bound and not self._told_ready:
                self._told_ready = True
                self._notifier.ready()
                _log.info("ready", pods=len(self._tunnel.pods))
            if not self._bound:
                problems.append("ports: still another process's")
            if self._upgrade.problem:
                problems.append(f"the last reload failed: {self._upgrade.problem}")
            self._notifier.status("; ".join(problems) or f"serving {len(self._tunnel.pods)} pods")
            await asyncio.sleep(pause if self._told_ready else START_WATCH_SECONDS)

    async def _metrics(self, asked: Asked) -> Page:
        async with self._scraping:
            picture = await stats.take(
                self._tunnel,
                self._core,
                self._control.status,
                self._log,
                time.monotonic,
                _core.HISTOGRAM_BOUNDS_US,
                tuple(_core.DEADLINES),
            )
        media, portions = stats.render(picture, asked.accept)
        return Page(200, media, b"", portions)

    async def _stats(self, asked: Asked) -> Page:
        tunnel = self._tunnel
        try:
            query = envoy_stats.parse(asked.query)
        except envoy_stats.QueryError as error:
            return Page(400, "text/plain; charset=utf-8", f"{error}\n".encode())
        arrived = await whole(tunnel.arrivals, tunnel.flows, query.workload)
        pods = [held for held in tunnel.pods if query.workload in (None, held.pod.workload)]
        if query.workload is not None and not pods and query.workload not in tunnel.arrivals:
            text = "workload: no pod of this node has it; write NAMESPACE/NAME\n"
            return Page(404, "text/plain; charset=utf-8", text.encode())
        handshaking = sum(self._core.read_pod(held.number).handshakes for held in pods)
        body = envoy_stats.render(query, envoy_stats.statistics(arrived, handshaking))
        media = "application/json" if query.as_json else "text/plain; charset=utf-8"
        return Page(200, media, body)

    async def _ready(self, _asked: Asked) -> Page:
        return health_page(self._health.ready())

    async def _live(self, _asked: Asked) -> Page:
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
    help="Where /metrics and /stats are served.",
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
    default=STDOUT,
    show_default=True,
    help="File of the access log, '-' for standard output. SIGUSR1 reopens it.",
)
@click.option(
    "--access-log-starts",
    is_flag=True,
    help="Have a line for each connection when it has opened, too, within a second.",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Form of the access log, of the daemon's own log, and of audit lines among them.",
)
@click.option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)
def command(
    control: str,
    workers: int | None,
    stats_address: tuple[str, int],
    ready_address: tuple[str, int],
    access_log_path: str,
    access_log_starts: bool,  # noqa: FBT001 - click's own
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
        audit = AuditLog(
            time.monotonic,
            time.time,
            AuditForm(log_format),
            log if access_log_path == STDOUT else None,
        )
        notifier = Notifier(os.environ)
        count = workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS)
        daemon = Daemon(
            str(Path(control).absolute()), count, log, audit, notifier, starts=access_log_starts
        )
        _log.info("starting", workers=count, control=control, **daemon.capacity())
        asyncio.run(daemon.run(stats_address, ready_address))
    except (OSError, tls.TlsError, ReasonsMismatchError) as error:
        _log.error("cannot run", error=str(error))
        sys.exit(1)
    _log.info("stopped")
