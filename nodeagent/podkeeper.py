"""The life of one bound workload's pod: wait, enrol, audit, tighten, loosen, remove.

This module owns the state that `/status` shows of a pod, and the order of effects on it. It
promises that a failing or hanging pod holds up no other, that every failure is logged, counted and
tried again with backoff, and that ztunnel lets go of a pod before its capture is removed. It
decides nothing (`reconcile` does) and touches the kernel only through `Capture`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import structlog

from nodeagent import reconcile
from nodeagent.admin.model import PodState
from nodeagent.capture.model import (
    Capture,
    CaptureError,
    CaptureReason,
    Enforcement,
    Enrolment,
    Listeners,
    OlderCaller,
    PodSpec,
)
from nodeagent.control import PodDescriptors
from nodeagent.pods import NetnsHandle, pod_uid
from nodeagent.reconcile import Closed, Enrolled, Step, Wanted
from ztunnel import protocol

__all__ = ["Owner", "PodKeeper", "PodView", "Seam"]

DROP_SECONDS: Final = 5.0
"""For ztunnel to let go of a pod; then the capture is removed all the same."""

OLDER_AUDITS: Final = 12
"""From one look for connections that are older than the capture to the next, while there are any: a
minute on most nodes. A look takes milliseconds, and a node that has just joined has many pods."""

_SOON: Final = frozenset({CaptureReason.ADDRESS_MISSING, CaptureReason.LISTENERS_HELD})
"""What somebody else is about to put right: whoever makes the pod, and ztunnel."""

log = structlog.get_logger()


class Seam(Protocol):
    """The part of the control server that a keeper uses."""

    def put_pod(self, pod: protocol.Pod, descriptors: PodDescriptors) -> int: ...

    def drop_pod(self, uid: str) -> int: ...

    async def acknowledged(self, version: int, seconds: float) -> bool: ...


class Owner(Protocol):
    """Whom a keeper asks and tells."""

    def adoptable(self, uid: str) -> Listeners | None:
        """Return listeners of the pod that somebody kept; they stay the owner's."""

    def enrolled(self, enrolment: Enrolment) -> None:
        """These are the pod's descriptors now."""

    def removed(self, uid: str) -> None:
        """The pod's descriptors are closed."""

    def pods(self) -> int:
        """How many pods are kept, this one with them."""

    def repaired(self, workload: str, kind: str) -> None: ...

    def failed(self, workload: str) -> None: ...

    def progressed(self) -> None:
        """Something that readiness depends on may have changed."""


class PodView(msgspec.Struct, frozen=True):
    """One coherent picture of a pod. `since` is in seconds of the keeper's clock."""

    wanted: Wanted | None
    state: PodState
    since: float
    enrolled: Enrolled | None
    error: str
    deviations: tuple[str, ...]
    repaired: int
    drops: dict[str, int]
    older: tuple[OlderCaller, ...] | None = ()
    """Who is connected since before the capture; None: nobody knows."""


class PodKeeper:
    """Keeps one workload's pod as wanted, until it is wanted no more and is gone."""

    def __init__(
        self,
        workload: str,
        capture: Capture,
        seam: Seam,
        owner: Owner,
        clock: Callable[[], float],
    ) -> None:
        self.workload = workload
        self.finished = False
        self.settled = asyncio.Event()
        """Set once the first attempt is over, well or badly."""
        self._capture = capture
        self._seam = seam
        self._owner = owner
        self._clock = clock
        self._wake = asyncio.Event()
        self._busy = asyncio.Lock()
        self._wanted: Wanted | None = None
        self._netns: NetnsHandle | None = None
        self._looked = False
        self._absent = True
        self._enrolled: Enrolled | None = None
        self._enforced: Closed | None = None
        self._due: Closed | None = None
        """What the next step is to put in force."""
        self._left: tuple[str, ...] = ()
        self._state = PodState.ENROLLING
        self._since = clock()
        self._error = ""
        self._deviations: tuple[str, ...] = ()
        self._repaired = 0
        self._drops: dict[str, int] = {}
        self._older: tuple[OlderCaller, ...] | None = None
        self._audits = 0
        self._failures = 0

    # --- what the agent says ---------------------------------------------------------------

    def want(self, wanted: Wanted | None) -> None:
        """Change what is wanted; None removes the pod and ends `run`."""
        if wanted != self._wanted:
            self._wanted = wanted
            self.wake()

    def appeared(self, netns: NetnsHandle) -> None:
        """The binding leads to `netns` now, which becomes this keeper's."""
        self._place(netns)

    def gone(self) -> None:
        """The binding leads nowhere, or elsewhere, now."""
        self._place(None)

    def unusable(self, error: str, *, absent: bool) -> None:
        """The binding leads nowhere for this reason; unless `absent`, a pod may be there."""
        self._error = error
        self._place(None, absent=absent)

    def left(self, uids: tuple[str, ...]) -> None:
        """Name captures of an earlier run; those that are not taken over are removed."""
        self._left = uids

    def wake(self) -> None:
        """Try now: something outside has changed."""
        self._failures = 0
        self._wake.set()

    async def tighten(self, coming: Closed) -> None:
        """Close what `coming` closes, open nothing. Called before ztunnel hears of the change."""
        async with self._busy:
            if self._enrolled is None or self._enforced is None:
                return
            closed = reconcile.together(self._enforced, coming)
            self._due = None
            if closed == self._enforced:
                return
            try:
                await self._set_enforcement(self._enrolled.uid, closed)
            except CaptureError as error:
                # ztunnel judges all the same, and the next audit tries again.
                self._due = closed
                self._failure(f"cannot set which ports are strict: {error.detail}")
                self._wake.set()

    def permit(self) -> None:
        """Say that ztunnel has in force what is wanted now: what that opens may be opened."""
        if self._wanted is not None and self._enforced not in (None, self._wanted.closed):
            self._due = self._wanted.closed
            self._wake.set()

    @property
    def view(self) -> PodView:
        return PodView(
            wanted=self._wanted,
            state=self._state,
            since=self._since,
            enrolled=self._enrolled,
            error=self._error,
            deviations=self._deviations,
            repaired=self._repaired,
            drops=self._drops,
            older=self._older,
        )

    # --- the loop --------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until the pod is wanted no more and removed; a cancellation leaves it captured."""
        try:
            while not self.finished:
                self._wake.clear()
                delay = await self._turn()
                if delay == 0:
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._wake.wait()
        finally:
            self.finished = True
            self._place(None)

    async def _turn(self) -> float | None:
        """Do one step; return the seconds until the next, None to wait to be woken."""
        try:
            async with self._busy:
                delay = await self._step()
        except CaptureError as error:
            return self._failure(error.detail, soon=error.reason in _SOON)
        except Exception as error:
            # A defect of ours must not end the care for this pod, nor for the others.
            log.exception("pod: unexpected failure", workload=self.workload)
            return self._failure(f"internal error: {type(error).__name__}: {error}")
        self._failures = 0
        return delay

    async def _step(self) -> float | None:
        wanted, netns = self._wanted, self._netns
        step = reconcile.decide(wanted, self._enrolled, netns.cookie if netns else None)
        if step is Step.ENROL and wanted is not None and netns is not None:
            await self._enrol(wanted, netns)
            return reconcile.first_audit_seconds(self.workload, self._owner.pods())
        if step is Step.AUDIT and self._enrolled is not None:
            await self._audit(self._enrolled.uid)
            return reconcile.audit_seconds(self._owner.pods())
        if step is Step.REMOVE and self._enrolled is not None:
            await self._remove(self._enrolled.uid)
            return 0
        if step is Step.FINISH:
            await self._clear_left(keep="")
            # While the watcher holds the namespace it would not report it again to a successor.
            self.finished = self._wanted is None and self._netns is None
            return 0 if self.finished else None
        # Captures of an earlier run stay: the namespace may exist and merely not be readable now.
        if self._looked:
            self._now(PodState.WAITING if self._absent else PodState.FAILED)
            self._settle()
        return None

    async def _enrol(self, wanted: Wanted, netns: NetnsHandle) -> None:
        if self._enrolled is None:
            self._now(PodState.ENROLLING)
        uid = pod_uid(self.workload, netns.cookie)
        closed = wanted.closed
        if self._enforced is not None:
            closed = reconcile.together(self._enforced, closed)
        # A duplicate: the watcher may take ours back while a worker thread is inside. A
        # cancellation (the daemon ends) leaves it open, for the thread goes on.
        handle = netns.duplicate()
        spec = PodSpec(uid, handle, wanted.addresses, _enforcement(closed))
        try:
            enrolment = await self._capture.enrol(spec, self._owner.adoptable(uid))
        except CaptureError:
            handle.close()
            raise
        handle.close()
        self._enrolled = Enrolled(uid, netns.cookie, wanted.addresses)
        self._enforced = closed
        self._due = None
        log.info("pod enrolled", pod=uid, netns=wanted.netns, addresses=",".join(wanted.addresses))
        self._publish(enrolment)
        await self._look_for_older(uid)
        await self._clear_left(keep=uid)
        self._audited(tuple(each.detail for each in enrolment.remaining))

    def _publish(self, enrolment: Enrolment) -> None:
        enrolled = self._enrolled
        assert enrolled is not None  # noqa: S101 - published right after it was enrolled
        self._owner.enrolled(enrolment)
        self._seam.put_pod(
            protocol.Pod(enrolled.uid, self.workload, enrolled.addresses, enrolled.cookie),
            PodDescriptors(enrolment.netns, *enrolment.listeners),
        )

    async def _audit(self, uid: str) -> None:
        if self._due is not None:
            await self._set_enforcement(uid, self._due)
        try:
            repair = await self._capture.repair(uid)
        except CaptureError as error:
            found = await self._capture.audit(uid)
            self._deviations = tuple(each.detail for each in found) or (error.detail,)
            raise
        remaining = await self._capture.audit(uid) if repair.repaired else []
        for deviation in repair.repaired:
            if deviation in remaining:
                continue
            self._repaired += 1
            self._owner.repaired(self.workload, deviation.kind)
            log.warning(
                "pod capture put right", pod=uid, kind=deviation.kind, reason=deviation.detail
            )
        if repair.enrolment is not None:
            self._publish(repair.enrolment)
        self._audits += 1
        if self._older != () and self._audits % OLDER_AUDITS == 0:
            await self._look_for_older(uid)
        counters = await self._capture.counters(uid)
        self._drops = {name: n for name, n in counters.items() if not name.startswith("captured_")}
        self._audited(tuple(each.detail for each in remaining))

    async def _look_for_older(self, uid: str) -> None:
        """Who was there before is served all the same: not knowing it is no failure of the pod."""
        try:
            self._older = await self._capture.older(uid)
        except CaptureError as error:
            self._older = None
            log.warning("cannot see older connections", pod=uid, error=error.detail)

    def _audited(self, wrong: tuple[str, ...]) -> None:
        """The capture is there, but for what is `wrong`."""
        if wrong and wrong != self._deviations:
            log.error("pod capture is wrong", workload=self.workload, reasons="; ".join(wrong))
        self._deviations = wrong
        self._error = ""
        self._now(PodState.DEGRADED if wrong else PodState.ENROLLED)
        self._settle()

    async def _remove(self, uid: str) -> None:
        self._now(PodState.REMOVING)
        version = self._seam.drop_pod(uid)
        await self._seam.acknowledged(version, DROP_SECONDS)
        await self._capture.remove(uid)
        self._enrolled = None
        self._enforced = self._due = None
        self._deviations = ()
        self._older = None
        self._owner.removed(uid)
        log.info("pod removed", pod=uid)

    async def _clear_left(self, keep: str) -> None:
        for uid in self._left:
            if uid != keep:
                if self._enrolled is None:
                    self._now(PodState.REMOVING)
                await self._seam.acknowledged(self._seam.drop_pod(uid), DROP_SECONDS)
                await self._capture.remove(uid)
                self._owner.removed(uid)
                log.info("capture of an earlier run removed", pod=uid)
            self._left = tuple(other for other in self._left if other != uid)

    async def _set_enforcement(self, uid: str, closed: Closed) -> None:
        cut = await self._capture.set_enforcement(uid, _enforcement(closed))
        self._enforced = closed
        self._due = None
        log.info("pod enforcement set", pod=uid, older_connections_cut=cut)

    def _place(self, netns: NetnsHandle | None, *, absent: bool = True) -> None:
        if self._netns is not None:
            self._netns.close()
        self._netns = netns
        self._absent = absent
        self._looked = True
        self.wake()

    def _failure(self, error: str, *, soon: bool = False) -> float:
        self._failures += 1
        delay = reconcile.retry_seconds(self._failures, soon=soon)
        if error != self._error:
            log.error("pod: failed", workload=self.workload, error=error, retry_seconds=delay)
        self._owner.failed(self.workload)
        self._error = error
        self._now(PodState.DEGRADED if self._enrolled is not None else PodState.FAILED)
        self._settle()
        return delay

    def _settle(self) -> None:
        if not self.settled.is_set():
            self.settled.set()
            self._owner.progressed()

    def _now(self, state: PodState) -> None:
        if state is not self._state:
            self._state = state
            self._since = self._clock()
            self._owner.progressed()


def _enforcement(closed: Closed) -> Enforcement:
    if closed.default:
        return Enforcement(strict_default=True, permissive_ports=closed.ports)
    return Enforcement(strict_default=False, strict_ports=closed.ports)
