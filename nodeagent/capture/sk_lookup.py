"""Capture by sk_lookup programs and policy routing: the implementation for Linux 5.17 and later.

This module owns which pods are captured, and one executor for each. It promises that calls about
one pod run one after the other, that an enrolment that fails leaves the pod as it was (or, where
mutual TLS is due and a port is taken, closed), and that a restarted agent finds its pods again. It
may not enter a namespace itself: its threads do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from nodeagent.capture import plan as planning
from nodeagent.capture.actions import KINDS, Action, FillSlot, OpenListener
from nodeagent.capture.bpffs import BpffsError, ensure_bpffs
from nodeagent.capture.executor import PodExecutor
from nodeagent.capture.layout import MAX_ADDRESSES, PORTS, SLOTS
from nodeagent.capture.listeners import PortTakenError, adopt_listener
from nodeagent.capture.model import (
    CaptureError,
    CaptureReason,
    Deviation,
    Enforcement,
    Enrolment,
    Finding,
    Listeners,
    OlderCaller,
    PodSpec,
    Recovered,
    Repair,
)
from nodeagent.capture.objects import PodObjects, Record
from nodeagent.capture.probe import probe
from nodeagent.capture.shared import NodeObjects, load_marker
from nodeagent.pods import NamespaceThreads, NetnsError, NetnsHandle, open_netns
from nodeagent.pods.netlink import Rtnetlink

__all__ = ["SkLookupCapture"]

T = TypeVar("T")

log = structlog.get_logger()


class SkLookupCapture:
    """The capture of this node's pods. Pins are kept under `bpf_dir`, one directory a pod."""

    def __init__(self, bpf_dir: Path, threads: NamespaceThreads) -> None:
        self._bpf_dir = bpf_dir
        self._threads = threads
        self._node = NodeObjects(bpf_dir)
        self._pods: dict[str, PodExecutor] = {}
        self._lost: dict[str, PodObjects] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._marker: int | None = None
        self._marker_failed = False

    # --- the interface (Capture) ---

    async def enrol(self, spec: PodSpec, adopt: Listeners | None = None) -> Enrolment:
        async with self._locked(spec.uid):
            pod = self._pods.get(spec.uid)
            if pod is None:
                with _errors(spec.uid):
                    ensure_bpffs(self._bpf_dir)
                    pod = self._executor(spec.uid, spec.netns.duplicate(), spec.addresses)
            pod.addresses, pod.enforcement = spec.addresses, spec.enforcement
            try:
                remaining = await self._inside(pod, self._enrol, pod, adopt)
            except BaseException:
                # Listening sockets of a pod that is not enrolled would only be in the way.
                if spec.uid not in self._pods and not pod.objects.exists():
                    pod.close()
                else:
                    self._pods[spec.uid] = pod
                raise
            self._pods[spec.uid] = pod
            return msgspec.structs.replace(_enrolment(pod), remaining=remaining)

    async def remove(self, uid: str) -> None:
        async with self._locked(uid):
            lost = self._lost.pop(uid, None)
            if lost is not None:
                with _errors(uid):
                    await self._threads.run_home(lost.remove)
            pod = self._pods.get(uid)
            if pod is not None:
                await self._inside(pod, pod.remove)
                del self._pods[uid]
        self._locks.pop(uid, None)

    async def set_enforcement(self, uid: str, enforcement: Enforcement) -> int:
        async with self._locked(uid):
            pod = self._known(uid)
            pod.enforcement = enforcement
            return await self._inside(pod, self._enforce, pod)

    async def audit(self, uid: str) -> list[Deviation]:
        async with self._locked(uid):
            pod = self._known(uid)
            return await self._inside(pod, self._audit, pod)

    async def repair(self, uid: str) -> Repair:
        async with self._locked(uid):
            pod = self._known(uid)
            repaired, reopened = await self._inside(pod, self._repair, pod)
            complete = all(sock is not None for sock in pod.listeners)
            return Repair(repaired, _enrolment(pod) if reopened and complete else None)

    async def recover(self) -> list[Recovered]:
        with _errors("(all)"):
            ensure_bpffs(self._bpf_dir)
            found = await self._threads.run_home(self._find)
        recovered = []
        for record, objects, netns in found:
            if record.uid in self._pods:
                objects.close()
                if netns is not None:
                    netns.close()
                continue
            if netns is None:
                self._lost[record.uid] = objects
            else:
                pod = self._executor(record.uid, netns, record.addresses, objects)
                self._pods[record.uid] = pod
            recovered.append(
                Recovered(
                    record.uid,
                    record.netns_cookie,
                    record.netns_path,
                    alive=netns is not None,
                    listening=all(objects.held()),
                )
            )
            objects.close()
        return recovered

    async def older(self, uid: str) -> tuple[OlderCaller, ...]:
        async with self._locked(uid):
            pod = self._known(uid)
            return await self._inside(pod, pod.older_callers)

    async def counters(self, uid: str) -> dict[str, int]:
        async with self._locked(uid):
            pod = self._known(uid)
            with _errors(uid):
                try:
                    return pod.objects.counters()
                finally:
                    pod.rest()

    async def probe(self) -> list[Finding]:
        return await self._threads.run_home(probe, self._bpf_dir)

    async def close(self) -> None:
        for pod in self._pods.values():
            pod.close()
        for objects in self._lost.values():
            objects.close()
        self._pods.clear()
        self._lost.clear()
        if self._marker is not None:
            os.close(self._marker)
            self._marker = None
        self._node.close()

    # --- pods ---

    def enrolled(self) -> tuple[str, ...]:
        """Return the uids of the pods that are captured, recovered ones included."""
        return tuple(self._pods)

    def _known(self, uid: str) -> PodExecutor:
        pod = self._pods.get(uid)
        if pod is None:
            raise CaptureError(uid, CaptureReason.NOT_ENROLLED, "is not enrolled")
        return pod

    def _executor(
        self,
        uid: str,
        netns: NetnsHandle,
        addresses: tuple[str, ...],
        objects: PodObjects | None = None,
    ) -> PodExecutor:
        objects = objects or PodObjects(self._bpf_dir, netns.cookie, self._node)
        return PodExecutor(uid, netns, addresses, None, objects, self._get_marker)

    def _get_marker(self) -> int | None:
        """Return the iterator program, loaded at its first use; None where the kernel has none."""
        if self._marker is None and not self._marker_failed:
            try:
                self._marker = load_marker()
            except OSError as error:
                self._marker_failed = True
                log.warning(
                    "older connections will be reset on enrolment: the kernel cannot mark them",
                    error=str(error),
                )
        return self._marker

    @contextlib.asynccontextmanager
    async def _locked(self, uid: str) -> AsyncIterator[None]:
        async with self._locks.setdefault(uid, asyncio.Lock()):
            yield

    async def _inside(self, pod: PodExecutor, function: Callable[..., T], *args: object) -> T:
        with _errors(pod.uid):
            try:
                return await self._threads.run(pod.netns.fd, function, *args)
            finally:
                pod.rest()

    # --- inside the namespace, on a thread ---

    def _enrol(self, pod: PodExecutor, adopt: Listeners | None) -> tuple[Deviation, ...]:
        fresh = not pod.objects.exists()
        pod.note_connections(fresh=fresh)
        with Rtnetlink() as route:
            found = pod.read(route)
            _check(pod, found, fresh=fresh)
            if adopt is not None:
                _adopt(pod, adopt)
                found = pod.read(route)
            elif any(pod.objects.held()) and not any(pod.listeners):
                raise CaptureError(
                    pod.uid,
                    CaptureReason.LISTENERS_HELD,
                    "a running tunnel holds its listening sockets: enrol again with them, once "
                    "that tunnel has handed them over, or after it has ended",
                )
            try:
                pod.remember(found)
                self._apply(pod, found)
                pod.cut()
                pod.prune()
            except BaseException as error:
                closed = isinstance(error, CaptureError) and error.reason is (
                    CaptureReason.PORT_TAKEN
                )
                if fresh and not (closed and _any_strict(pod)):
                    pod.objects.remove()
                raise
        return tuple(_beyond_us(found))

    def _apply(self, pod: PodExecutor, found: planning.Found) -> list[Action]:
        """Plan and apply. A port that is taken leaves the pod closed where mutual TLS is due."""
        actions = planning.plan(pod.wanted(found), found)
        try:
            pod.apply(actions)
        except PortTakenError as error:
            detail = str(error)
            if not found.link:
                # The others would keep callers waiting for a tunnel that does not come.
                pod.release_listeners()
            if _any_strict(pod) or found.link:
                rest = [
                    action for action in actions if not isinstance(action, OpenListener | FillSlot)
                ]
                pod.apply(rest)
                detail += "; until then the pod is closed: no TCP enters or leaves it"
            raise CaptureError(pod.uid, CaptureReason.PORT_TAKEN, detail) from None
        return actions

    def _enforce(self, pod: PodExecutor) -> int:
        with Rtnetlink() as route:
            pod.read(route)
        pod.enforce()
        return pod.cut()

    def _audit(self, pod: PodExecutor) -> list[Deviation]:
        with Rtnetlink() as route:
            found = pod.read(route)
        return _deviations(found, planning.plan(pod.wanted(found), found))

    def _repair(self, pod: PodExecutor) -> tuple[tuple[Deviation, ...], bool]:
        with Rtnetlink() as route:
            found = pod.read(route)
            deviations = _deviations(found, planning.plan(pod.wanted(found), found))
            pod.remember(found)
            actions = self._apply(pod, found)
            pod.cut()
            pod.prune()
        reopened = any(isinstance(action, OpenListener) for action in actions)
        return tuple(deviations), reopened

    # --- at home, on a thread ---

    def _find(self) -> list[tuple[Record, PodObjects, NetnsHandle | None]]:
        found = []
        if not self._bpf_dir.is_dir():
            return []
        for directory in sorted(self._bpf_dir.iterdir()):
            try:
                objects = PodObjects(self._bpf_dir, int(directory.name, 16), self._node)
            except ValueError:
                continue
            record = objects.record()
            if record is None:
                # The record is pinned before anything is changed: nothing of the pod was.
                objects.remove()
                continue
            netns: NetnsHandle | None = None
            with contextlib.suppress(NetnsError):
                netns = open_netns(record.netns_path)
            if netns is not None and netns.cookie != record.netns_cookie:
                netns.close()
                netns = None
            found.append((record, objects, netns))
        self._node.tidy()
        return found


@contextlib.contextmanager
def _errors(uid: str) -> Iterator[None]:
    """Turn what the kernel and the system say into CaptureError."""
    try:
        yield
    except (OSError, BpffsError, ExceptionGroup) as error:
        detail = str(error)
        if isinstance(error, ExceptionGroup):
            detail += ": " + "; ".join(str(part) for part in error.exceptions)
        detail += "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        raise CaptureError(uid, CaptureReason.KERNEL, detail) from error


def _any_strict(pod: PodExecutor) -> bool:
    return pod.enforcement is None or pod.enforcement.any_strict


def _enrolment(pod: PodExecutor) -> Enrolment:
    fds = [sock.fileno() for sock in pod.listeners if sock is not None]
    return Enrolment(pod.uid, pod.netns.cookie, pod.netns.fd, Listeners(*fds))


def _deviations(found: planning.Found, actions: list[Action]) -> list[Deviation]:
    deviations = [Deviation(KINDS.get(type(action), "other"), str(action)) for action in actions]
    return deviations + _beyond_us(found)


def _beyond_us(found: planning.Found) -> list[Deviation]:
    """Return what is not as it should be, and not ours to put right."""
    return [
        Deviation("rule_before_ours", f"{rule} comes before ours; what it turns away is dropped")
        for rule in planning.foreign_rules(found)
    ]


def _check(pod: PodExecutor, found: planning.Found, *, fresh: bool) -> None:
    """Refuse what cannot be captured, before anything is changed. Raises CaptureError."""
    missing = found.interfaces.missing(pod.addresses)
    if missing or not pod.addresses:
        there = ", ".join(address.text for address in found.interfaces.addresses) or "none"
        raise CaptureError(
            pod.uid,
            CaptureReason.ADDRESS_MISSING,
            f"its namespace has not the address {', '.join(missing) or '(none given)'} "
            f"(it has: {there}): correct the WorkloadEntry, or configure the namespace",
        )
    count = len(planning.local_addresses(pod.addresses, found.interfaces))
    if count > MAX_ADDRESSES:
        raise CaptureError(
            pod.uid,
            CaptureReason.BAD_REQUEST,
            f"its namespace has {count} addresses, more than the {MAX_ADDRESSES} supported",
        )
    foreign = planning.conflicts(found) if fresh else []
    if foreign:
        raise CaptureError(
            pod.uid,
            CaptureReason.CONFLICT,
            f"its namespace has what the capture would put there itself ({'; '.join(foreign)}): "
            "another mesh or an earlier agent with another bpf_dir; remove that first",
        )


def _adopt(pod: PodExecutor, adopt: Listeners) -> None:
    """Take over listening sockets, for the ports where we hold none. Raises CaptureError."""
    for slot in range(SLOTS):
        if pod.listeners[slot] is None:
            try:
                pod.listeners[slot] = adopt_listener(adopt[slot], PORTS[slot], pod.netns.cookie)
            except ValueError as error:
                raise CaptureError(pod.uid, CaptureReason.BAD_REQUEST, str(error)) from None
