"""Following the namespaces that the bindings name, as they come, go and are made anew.

This module owns the question whether the namespace of each bound workload exists now. It promises
that each appearance and disappearance is reported once, in order, and that a namespace made anew
under an old name is another pod, reported as gone and appeared. It may not capture anything.

It looks once a second: a bind mount on a file in /run/netns, or a process's namespace given as
/proc/PID/ns/net, sends no notification that says when it is usable.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Final

import msgspec

from nodeagent.pods.netns import (
    NetnsError,
    NetnsHandle,
    NetnsReason,
    netns_path,
    open_netns,
    pod_uid,
)
from nodeagent.pods.threads import NamespaceThreads

__all__ = ["Appeared", "Change", "Gone", "PodWatcher", "Unusable"]

POLL: Final = 1.0
"""Seconds between two looks. Whoever cannot wait for it calls `look` (as a CNI plugin would)."""


class Appeared(msgspec.Struct, frozen=True):
    """A namespace is there. `netns` is the receiver's to close; `uid` is unique for ever."""

    uid: str
    workload: str
    netns: NetnsHandle


class Gone(msgspec.Struct, frozen=True):
    """The pod's namespace has gone, or its name leads elsewhere, or its binding was removed."""

    uid: str
    workload: str


_ABSENT: Final = frozenset({NetnsReason.MISSING, NetnsReason.NOT_A_NAMESPACE})
"""The second is so for a moment while a namespace is made."""


class Unusable(msgspec.Struct, frozen=True):
    """A binding leads to no usable namespace; said once until the reason changes."""

    workload: str
    error: str
    absent: bool = True
    """There is no namespace; else there may be one, and a pod in it that is not captured."""


Change = Appeared | Gone | Unusable


class _Held(msgspec.Struct):
    where: str
    uid: str
    netns: NetnsHandle


class PodWatcher:
    """Call `set_bindings` at will, and iterate over `changes` in one task."""

    def __init__(self, threads: NamespaceThreads, poll: float = POLL) -> None:
        self._threads = threads
        self._poll = poll
        self._bindings: dict[str, str] = {}
        self._held: dict[str, _Held] = {}
        self._holders: dict[int, str] = {}
        """Namespace cookie to workload."""
        self._errors: dict[str, str] = {}
        self._wake = asyncio.Event()

    def set_bindings(self, bindings: Mapping[str, str]) -> None:
        """Follow these: workload uid to namespace, a name or an absolute path."""
        self._bindings = dict(bindings)
        self._wake.set()

    def look(self) -> None:
        """Look now instead of at the next second."""
        self._wake.set()

    async def changes(self) -> AsyncIterator[Change]:
        """Yield changes for ever. Cancel to stop; the watcher's own descriptors are closed then."""
        try:
            while True:
                self._wake.clear()
                for change in await self._compare():
                    yield change
                try:
                    async with asyncio.timeout(self._poll):
                        await self._wake.wait()
                except TimeoutError:
                    pass
        finally:
            for held in self._held.values():
                held.netns.close()
            self._held.clear()
            self._holders.clear()

    async def _compare(self) -> list[Change]:
        changes: list[Change] = []
        bindings = dict(self._bindings)
        for workload, held in list(self._held.items()):
            where = bindings.get(workload)
            if where != held.where or not held.netns.is_at(netns_path(where)):
                held.netns.close()
                del self._held[workload]
                del self._holders[held.netns.cookie]
                changes.append(Gone(held.uid, workload))
        for workload in set(self._errors) - set(bindings):
            del self._errors[workload]
        for workload, where in bindings.items():
            if workload not in self._held:
                change = await self._try(workload, where)
                if change is not None:
                    changes.append(change)
        return changes

    async def _try(self, workload: str, where: str) -> Change | None:
        try:
            netns = await self._threads.run_home(open_netns, where, self._threads.visit)
        except NetnsError as error:
            text = str(error)
            if self._errors.get(workload) == text:
                return None
            self._errors[workload] = text
            return Unusable(workload, text, absent=error.reason in _ABSENT)
        self._errors.pop(workload, None)
        holder = self._holders.get(netns.cookie)
        if holder is not None:
            netns.close()
            return self._refuse(workload, where, holder)
        uid = pod_uid(workload, netns.cookie)
        self._held[workload] = _Held(where, uid, netns)
        self._holders[netns.cookie] = workload
        return Appeared(uid, workload, netns.duplicate())

    def _refuse(self, workload: str, where: str, holder: str) -> Change | None:
        text = f"network namespace {where}: already bound to workload {holder}; bind each to one"
        if self._errors.get(workload) == text:
            return None
        self._errors[workload] = text
        return Unusable(workload, text, absent=False)
