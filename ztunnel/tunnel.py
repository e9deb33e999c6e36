"""Joins the snapshot and the core: answers the core's questions, and puts changes in force.

This module owns the loop between the two. It promises, in this order, for every change of state:

1. what can fail (contexts, pods) is tried first; a failure leaves the state before it in force;
2. the new snapshot replaces the old one, pods leave and enter the core;
3. the epoch is advanced: from there no answer made from an older snapshot is used, because an
   answer carries the epoch of its snapshot and the core refuses any other;
4. live connections that are no longer allowed are cut, identities no longer trusted with them;
5. only then does `apply` return, and the change is acknowledged.

Steps 2 and 3 happen without a pause in between. A judgement that fails by an error of ours refuses
the connection. Nothing here blocks: work comes in bounded portions, and the loop turns in between.
It may not format logs or metrics, nor read the control socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from ztunnel import protocol
from ztunnel.audit import AuditLog
from ztunnel.authorize import Request, Verdict, authorize
from ztunnel.corelike import Kind
from ztunnel.decisions import Decisions, Key, Numbers, Peers, Record
from ztunnel.events import Events
from ztunnel.identities import Identities, Proven
from ztunnel.judge import NUMBER_OF, Judge
from ztunnel.observe.arrivals import Arrivals
from ztunnel.observe.counted import Counted
from ztunnel.observe.flows import FlowTable
from ztunnel.observe.series import SeriesTable
from ztunnel.observe.traces import Tracer
from ztunnel.pods import Builder, Held, PodError, Pods, PodSockets, build_pair
from ztunnel.proofs import CertificateRefusedError, check_server, verify
from ztunnel.reasons import Reason
from ztunnel.recheck import Recheck
from ztunnel.route import Balance, Refuse, Route, route
from ztunnel.route import Tunnel as TunnelRoute
from ztunnel.same_node import Join
from ztunnel.state import EMPTY, Change, State, StateError, apply, is_large

if TYPE_CHECKING:
    from ztunnel._core import Upcall
    from ztunnel.corelike import CoreLike
    from ztunnel.observe.access_log import Sink

__all__ = ["START_WAIT", "Tunnel"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.tunnel")

START_WAIT: Final = 10.0
"""Seconds after a pod's arrival during which its connections wait for its workload, policy and
first certificate. Below the core's own deadline for a decision (15 s), so that what is refused
then has its reason; an identity provider that answers at all answers in less."""

MAX_WAITING: Final = 4096
"""Questions that wait so; more are refused at once. A node that starts 100 pods has a few each."""

UPCALLS_A_TURN: Final = 64
"""Questions answered before the loop turns: at most about 30 ms, if each verifies a new chain."""

EVENTS_A_TURN: Final = 512
"""Ended connections, failures and freed decisions taken before the loop turns."""

MICROSECONDS: Final = 1_000_000

FAILURE_LINES: Final = "failure_lines"
"""The limit that is kept here and not by the core."""

_COUNTER_BYTES: Final = 8
"""An eventfd's counter (eventfd(2))."""

TICK: Final = 1.0
"""Seconds between looks at deadlines and ends of certificates."""

PEER_MARGIN: Final = 20.0
"""Seconds that an unused peer outlives the idle deadline of its connections, so that it is the core
that closes them."""

STALLED: Final = 2.0
"""Seconds that questions may lie uncollected before the decision path counts as stuck."""

FAILURE_MEMORY: Final = 30.0
"""Seconds for which an internal error keeps the decision path from being called healthy."""


class Tunnel:
    """The control side of one core. `clock` is monotonic, `wall` since the epoch; both seconds."""

    def __init__(
        self,
        core: CoreLike,
        sink: Sink,
        clock: Callable[[], float],
        wall: Callable[[], float],
        build: Builder = build_pair,
        audit: AuditLog | None = None,
    ) -> None:
        self._core = core
        self._sink = sink
        self._clock = clock
        self._wall = wall
        numbers = Numbers()
        self.state: State = EMPTY
        self._rechecked: State = EMPTY
        """The last state by which all that lives was judged: the one before, but for failures."""
        self.epoch = core.epoch
        self.committed = False
        """True once a change has been put in force."""
        self.counted = Counted(clock)
        self.series = SeriesTable(core, numbers, clock)
        self.arrivals = Arrivals()
        self.flows = FlowTable(
            core,
            numbers,
            wall,
            came_in=self.counted.came_in,
            gone=self.arrivals.flow_gone,
        )
        self.peers = Peers(core, numbers)
        self.decisions = Decisions(core, self.series, self.flows, self.peers)
        self.identities = Identities(numbers, self._evicted)
        self.pods = Pods(core, numbers, clock, build)
        self._join = Join(self.identities, self.pods, wall)
        self.recheck = Recheck(core, self.decisions, self.identities, self.peers, self.pods, wall)
        self._judge = Judge(
            core, numbers, self.decisions, self.series, self.flows, self.peers, self.counted
        )
        self.audit = audit if audit is not None else AuditLog(clock, wall)
        self.traces = Tracer(core)
        self.events = Events(self, self._judge, sink, self.audit, self.traces, clock, wall)
        self._waiting: deque[tuple[Upcall, float]] = deque()
        self._peers_evicted = 0
        self._peer_idle = _peer_idle(protocol.Deadlines())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._collected_at = clock()
        self._failed_at = -FAILURE_MEMORY
        self.on_pump: Callable[[], None] = lambda: None
        """Called whenever the core has something to say: it may be for others too."""
        self.internal_errors = 0
        self.waited_too_long = 0

    # --- changes of state ---------------------------------------------------------------------

    async def apply(self, change: Change, sockets: Mapping[str, PodSockets]) -> str:
        """Put `change` in force and return "", or return why it cannot be; see the promises.

        `sockets` are the descriptors of the pods in `change`. They are owned here from the call
        on. Calls may not overlap.
        """
        owned = dict(sockets)
        try:
            await self._commit(change, owned)
            await self.recheck.after(self._rechecked, self.state)
            self._rechecked = self.state
            await self._ask_again()
        except (StateError, PodError) as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - the data path must outlive a bad change
            self._internal("a change of state failed", version=change.version)
            return f"internal error ({type(error).__name__}): see the log of ztunnel"
        finally:
            for unused in owned.values():
                unused.close()
        return ""

    def held(self) -> list[tuple[protocol.HeldPod, tuple[int, ...]]]:
        """Return the pods in service and their listeners, which stay ours."""
        return [
            (
                protocol.HeldPod(held.pod.uid, held.pod.netns_cookie),
                () if self.pods.deaf else held.sockets.listeners,
            )
            for held in self.pods
        ]

    def drain(self) -> None:
        """Accept nothing more, here and in the core; serve what is there. Again: no effect."""
        self._core.drain()
        self.pods.deafen()

    async def _commit(self, change: Change, owned: dict[str, PodSockets]) -> None:
        """Steps 1 to 3. What is left in `owned` was not needed."""
        if is_large(change):
            after = await asyncio.to_thread(apply, self.state, change)
        else:
            after = apply(self.state, change)
        credentials = {
            resource.uid: resource
            for resource in change.upserts
            if isinstance(resource, protocol.Credential)
        }
        stage = self.pods.stage(self.state, after, credentials, owned)
        for uid in list(owned):
            if uid in stage.added or owned[uid] in stage.surplus:
                del owned[uid]
        if after.settings is not None and after.settings is not self.state.settings:
            self._set(after.settings)
        self.state = after
        for gone in self.pods.commit(stage):
            self._drop_peers(gone)
        for held in stage.shown:
            self.arrivals.certificate(held.pod.workload)
        self._new_epoch()
        self.committed = True

    def _set(self, settings: protocol.Settings) -> None:
        for name, seconds in msgspec.structs.asdict(settings.deadlines).items():
            self._core.set_deadline(name, seconds * MICROSECONDS)
        self._peer_idle = _peer_idle(settings.deadlines)
        for name, most in msgspec.structs.asdict(settings.limits).items():
            if name == FAILURE_LINES:
                self.events.failure_lines.most = most
            else:
                self._core.set_limit(name, most)
        self.audit.configure(settings.audit, settings.node)
        self.traces.configure(settings)

    def _evicted(self, proven: Proven) -> None:
        self.recheck.evicted(proven)

    def _new_epoch(self) -> None:
        self.epoch = self._core.advance_epoch()
        self.decisions.drop_cache()

    def _drop_peers(self, held: Held) -> None:
        for peer in self.peers:
            if peer.pod == held.number:
                self.peers.remove(peer)

    # --- the core's questions and reports -----------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._core.start()
        loop.add_reader(self._core.event_fd, self.pump)
        self._loop = loop

    def stop(self) -> None:
        """End every connection, and report their ends."""
        if self._loop is not None:
            self._loop.remove_reader(self._core.event_fd)
            self._loop = None
        self._core.stop()
        while self._collect():
            pass
        self.events.tick(last=True)
        self.pods.close()

    def pump(self) -> None:
        """Serve a portion of what the core has to say, and come again while there is more."""
        self._collected_at = self._clock()
        # Before collecting: what is reported from here on makes it readable again.
        with contextlib.suppress(BlockingIOError):
            os.read(self._core.event_fd, _COUNTER_BYTES)
        self.on_pump()
        upcalls = self._core.upcalls(UPCALLS_A_TURN)
        for upcall in upcalls:
            self._handle(upcall, may_wait=True)
        more = self._collect()
        if (upcalls or more) and self._loop is not None:
            self._loop.call_soon(self.pump)

    def _collect(self) -> bool:
        """Take in a portion of what ended; True when there may be more."""
        ended = self._core.ended(EVENTS_A_TURN)
        failed = self._core.failed(EVENTS_A_TURN)
        text, count = self._core.lines()
        if count:
            self._sink.put(text, count)
        try:
            self.events.take(self.state, ended, failed)
        except Exception:  # noqa: BLE001 - a log line lost must not stop the data path
            self._internal("an ended connection could not be recorded")
        freed = self._core.freed(EVENTS_A_TURN)
        now = self._clock()
        for number in freed:
            self.decisions.freed(number, now)
        return bool(ended or failed or freed)

    def tick(self) -> None:
        """Serve deadlines; call every TICK seconds."""
        try:
            self._tick(self._clock())
        except Exception:  # noqa: BLE001 - the next tick must come
            self._internal("deadlines could not be served")

    def _tick(self, now: float) -> None:
        ended = {proven.number for proven in self.identities.ended(self._wall()) if proven.refs}
        if ended:
            # Their open streams live on. Of new ones, a client's are asked about, and refused;
            # those to a server get another pool, for which it must show what it has now.
            self.peers.retire_proven(ended)
            self._new_epoch()
        for _ in range(len(self._waiting)):
            upcall, deadline = self._waiting.popleft()
            if deadline <= now:
                self.waited_too_long += 1
                self._handle(upcall, may_wait=False)
            else:
                self._waiting.append((upcall, deadline))
        self.peers.remove_idle(now - self._peer_idle)
        self.counted.expire(self.state, self.series, self.events.early)
        self.events.tick()

    async def _ask_again(self) -> None:
        """Answer the waiting questions by the state of now; those it does not help wait on."""
        for count in range(1, len(self._waiting) + 1):
            upcall, _ = self._waiting.popleft()
            self._handle(upcall, may_wait=True)
            if count % UPCALLS_A_TURN == 0:
                await asyncio.sleep(0)

    def _handle(self, upcall: Upcall, *, may_wait: bool) -> None:
        try:
            match upcall.kind:
                case Kind.PEER_CERTIFICATE | Kind.SERVER_CERTIFICATE:
                    self._certificate(upcall)
                case Kind.OUTBOUND:
                    self._outbound(upcall, may_wait=may_wait)
                case _:
                    self._inbound(upcall, may_wait=may_wait)
        except Exception:  # noqa: BLE001 - whatever went wrong, the answer is no
            self._internal("a question of the core could not be answered", kind=upcall.kind)
            self._refuse(upcall, Reason.INTERNAL)

    def _outbound(self, upcall: Upcall, *, may_wait: bool) -> None:
        key = Key(
            upcall.kind, upcall.pod, b"", upcall.destination, upcall.destination_port, identity=0
        )
        record = self.decisions.lookup(key)
        if record is None:
            held = self.pods.by_number(upcall.pod)
            if held is None:
                self._refuse(upcall, Reason.POD_REMOVED)
                return
            outcome = route(self.state, held.pod, key.destination, key.port)
            missing = self._missing(outcome)
            if missing is not None:
                if may_wait and self._wait(upcall, held):
                    return
                outcome = Refuse(missing)
            outcome = self._join(self.state, held, outcome)
            record = self._judge.outbound(self.state, held, key, outcome, self._clock())
            if self.peers.evicted_in_use != self._peers_evicted:
                self._peers_evicted = self.peers.evicted_in_use
                self._new_epoch()
            self.decisions.cache(record)
            self.events.decided(self._core, record)
        self._answer(upcall, record)

    def _inbound(self, upcall: Upcall, *, may_wait: bool) -> None:
        key = Key(
            upcall.kind,
            upcall.pod,
            upcall.source,
            upcall.destination,
            upcall.destination_port,
            upcall.identity,
        )
        held = self.pods.by_number(upcall.pod)
        if held is None:
            self._refuse(upcall, Reason.POD_REMOVED)
            return
        proven: Proven | None = None
        if upcall.kind == Kind.INBOUND_HBONE:
            proven = self.identities.get(upcall.identity)
            problem = self._problem_with(proven)
            if problem is not None:
                self._refuse(upcall, problem, proven)
                return
        record = self.decisions.lookup(key)
        if record is None:
            identity = proven.id if proven is not None else None
            verdict = authorize(
                self.state, Request(held.pod, identity, key.source, key.destination, key.port)
            )
            if verdict.reason is Reason.POLICY_MISSING and may_wait and self._wait(upcall, held):
                return
            record = self._judge.inbound(self.state, held, key, proven, verdict)
            self.decisions.cache(record)
            self.events.decided(self._core, record)
        self._answer(upcall, record)

    def _problem_with(self, proven: Proven | None) -> Reason | None:
        """Return why nothing new may rest on an identity that the core names."""
        if proven is None:
            return Reason.CERT_UNTRUSTED
        now = self._wall()
        if now >= proven.not_after:
            return Reason.CERT_EXPIRED
        if not self.identities.still_trusted(proven, self.state.bundles, now):
            return Reason.TRUST_WITHDRAWN
        return None

    def _certificate(self, upcall: Upcall) -> None:
        try:
            proven = verify(upcall, self.identities, self.state.bundles, self._wall())
            if upcall.kind == Kind.SERVER_CERTIFICATE:
                check_server(self.peers.get(upcall.peer), proven)
        except CertificateRefusedError as refused:
            self.events.explain(upcall, refused.detail)
            self._core.answer_certificate(upcall.id, 0, NUMBER_OF[refused.reason])
            return
        if upcall.kind == Kind.PEER_CERTIFICATE:
            self.arrivals.handshake(self.pods.workload(upcall.pod))
        self._core.answer_certificate(upcall.id, proven.number, 0)

    def _missing(self, outcome: Route) -> Reason | None:
        """Return what of the pod's own state a route lacks and that may yet come."""
        choices = [outcome]
        if isinstance(outcome, Balance):
            choices = [choice for choice, _ in outcome.choices]
        for choice in choices:
            if isinstance(choice, TunnelRoute) and choice.identity not in self.state.identities:
                return Reason.NO_CREDENTIAL
            if isinstance(choice, Refuse) and choice.reason is Reason.UNKNOWN_WORKLOAD:
                return Reason.UNKNOWN_WORKLOAD
        return None

    def _wait(self, upcall: Upcall, held: Held) -> bool:
        """Let `upcall` wait for the rest of a young pod's state; False when it may not."""
        deadline = held.added + START_WAIT
        if self._clock() >= deadline or len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting.append((upcall, deadline))
        return True

    def _answer(self, upcall: Upcall, record: Record) -> None:
        # False: the epoch moved on under us, and the core asks again.
        self._core.answer(upcall.id, self.epoch, record.number)

    def _refuse(self, upcall: Upcall, reason: Reason, proven: Proven | None = None) -> None:
        """Refuse by an answer that is not kept: the reason may pass, or the pod has gone."""
        try:
            if upcall.kind in (Kind.PEER_CERTIFICATE, Kind.SERVER_CERTIFICATE):
                self._core.answer_certificate(upcall.id, 0, NUMBER_OF[reason])
                return
            key = Key(
                upcall.kind,
                upcall.pod,
                upcall.source,
                upcall.destination,
                upcall.destination_port,
                upcall.identity,
            )
            held = self.pods.by_number(upcall.pod)
            verdict = Verdict(allow=False, reason=reason)
            record = self._judge.inbound(self.state, held, key, proven, verdict)
            self._answer(upcall, record)
            self.decisions.release(record)
        except Exception:  # noqa: BLE001 - without an answer the core's deadline refuses
            self._internal("a refusal could not be given", kind=upcall.kind)

    def _internal(self, what: str, **context: object) -> None:
        self.internal_errors += 1
        self._failed_at = self._clock()
        _log.exception(what, **context)

    # --- health ---------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Questions that wait for a young pod's state."""
        return len(self._waiting)

    def decision_problem(self) -> str:
        """Return what is wrong with the decision path, or ""."""
        now = self._clock()
        if now - self._failed_at < FAILURE_MEMORY:
            return f"an internal error in the last {FAILURE_MEMORY:.0f} s (see the log)"
        poll = select.poll()
        poll.register(self._core.event_fd, select.POLLIN)
        if poll.poll(0) and now - self._collected_at > STALLED:
            return f"questions of the core lie uncollected for {now - self._collected_at:.0f} s"
        return ""


def _peer_idle(deadlines: protocol.Deadlines) -> float:
    """Seconds until an unused peer is forgotten: the core looks for idle connections by pings."""
    return deadlines.idle + deadlines.ping_interval + PEER_MARGIN
