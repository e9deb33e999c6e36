"""What lives is judged anew after a change of state: what the new state does not allow is cut.

This module owns the way from two snapshots to what must end: decisions that are no longer allowed,
identities that are no longer trusted, and pools towards workloads that have gone. It promises that
only what the change touches is looked at, that the loop turns between portions, and that new
connections, judged meanwhile by the new state, are left alone. It may not judge by itself
(`judge.still_allowed` does), nor answer the core's questions.

A workload that left the mesh may live on, and then so do the connections to it. If it does not, its
callers learn so in seconds: its pools are asked for an answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ztunnel.authorize import Verdict
from ztunnel.judge import NUMBER_OF, Cut, still_allowed
from ztunnel.reasons import Reason
from ztunnel.route import HandOver
from ztunnel.same_node import is_direct

if TYPE_CHECKING:
    from ztunnel.corelike import CoreLike
    from ztunnel.decisions import Decisions, Peers, Record
    from ztunnel.identities import Identities, Proven
    from ztunnel.pods import Pods
    from ztunnel.state import State

__all__ = ["Recheck"]

PORTION: Final = 256
"""Decisions re-judged before the loop turns: a few microseconds each."""

TRUST_PORTION: Final = 16
"""Chains verified anew before the loop turns: about half a millisecond each."""


class Recheck:
    """`wall` is seconds since the epoch. Everything else is shared with the tunnel."""

    def __init__(
        self,
        core: CoreLike,
        decisions: Decisions,
        identities: Identities,
        peers: Peers,
        pods: Pods,
        wall: Callable[[], float],
    ) -> None:
        self._core = core
        self._decisions = decisions
        self._identities = identities
        self._peers = peers
        self._pods = pods
        self._wall = wall
        self.cut = 0
        """Decisions whose live connections a change has cut."""

    async def after(self, before: State, state: State) -> None:
        """Cut what `state`, in force since before this call, does not allow any more."""
        if before.bundles is not state.bundles:
            await self._trust(before, state)
        if not (
            before.bundles is state.bundles
            and before.settings == state.settings
            and is_direct(before) is is_direct(state)
        ):
            await self._allowed(state, lambda _record: True)
        elif not (
            before.policies is state.policies
            and before.scopes is state.scopes
            and before.workloads is state.workloads
        ):
            await self._allowed(state, lambda record: self._concerned(before, state, record))
        if before.workloads is not state.workloads:
            await self._gone(state)

    def _concerned(self, before: State, state: State, record: Record) -> bool:
        """True where what `still_allowed` looks at for `record` is not what it was.

        That is: the policies of whom it leads to, and where an identity is expected, the workload
        at that address.
        """
        over = record.outcome
        held = (
            self._pods.by_number(over.pod)
            if isinstance(over, HandOver)
            else self._pods.get(record.pod)
        )
        if held is None or (
            before.workloads is not state.workloads and not isinstance(over, Verdict)
        ):
            return True
        workload = held.pod.workload
        return before.policies.get(workload) != state.policies.get(workload) or before.scopes.of(
            workload
        ) != state.scopes.of(workload)

    async def _allowed(self, state: State, concerned: Callable[[Record], bool]) -> None:
        for count, record in enumerate(self._decisions, start=1):
            if count % PORTION == 0:
                await asyncio.sleep(0)
            if record.killed or not concerned(record):
                continue
            cut = still_allowed(state, self._pods, record)
            if cut is not None:
                self._end(record, cut)

    def _end(self, record: Record, cut: Cut) -> None:
        record.killed = True
        record.cut_by = cut.origin
        # KeyError: nothing was left of it, and the core's report of that is on its way.
        with contextlib.suppress(KeyError):
            self._core.kill_decision(record.number, NUMBER_OF[cut.reason])
            self.cut += 1

    async def _gone(self, state: State) -> None:
        for count, peer in enumerate(self._peers, start=1):
            if count % PORTION == 0:
                await asyncio.sleep(0)
            if self._peers.get(peer.number) is not peer:
                continue  # removed while the loop turned
            gone = state.workload_at(peer.address) is None
            if gone and not peer.gone:
                self._core.suspect_peer(peer.number)
            peer.gone = gone

    async def _trust(self, before: State, state: State) -> None:
        changed = {
            domain
            for domain in before.bundles.keys() | state.bundles.keys()
            if before.bundles.get(domain) != state.bundles.get(domain)
        }
        withdrawn: set[int] = set()
        count = 0
        for proven in self._identities:
            if proven.id.trust_domain not in changed:
                continue
            count += 1
            if count % TRUST_PORTION == 0:
                await asyncio.sleep(0)
            if not self._identities.still_trusted(proven, state.bundles, self._wall()):
                withdrawn.add(proven.number)
                self._core.kill_identity(proven.number, NUMBER_OF[Reason.TRUST_WITHDRAWN])
        for peer in self._peers:
            if not withdrawn.isdisjoint(peer.proven):
                self._core.close_peer(peer.number, NUMBER_OF[Reason.TRUST_WITHDRAWN])
                peer.forget()

    def evicted(self, proven: Proven) -> None:
        """End what rests on an identity that is forgotten: it could not be checked again."""
        self._core.kill_identity(proven.number, NUMBER_OF[Reason.TRUST_WITHDRAWN])
        for record in self._decisions:
            if isinstance(record.outcome, HandOver) and proven in record.proofs:
                self._end(record, Cut(Reason.TRUST_WITHDRAWN))
