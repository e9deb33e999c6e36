"""What the core was told: decisions and peers by number, and what each number stands for.

This module owns the numbers. It promises that a number is never used twice, that each table is
bounded (the limits are named and say what happens beyond), and that nothing is forgotten while the
core may still speak of it. It may not judge, and calls nothing of
the core but what adds and removes these objects.

A decision's life: made by `Decisions.install`, held by the cache (the caller's reference of the
core's API) until the cache drops it, alive in the core while its table or a connection refers to
it, and forgotten when the core reports it freed. Between the last two it can still be re-judged
and killed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from ztunnel.identities import Proven
from ztunnel.observe.labels import Labels

if TYPE_CHECKING:
    from ztunnel.authorize import Verdict
    from ztunnel.corelike import CoreLike
    from ztunnel.observe.flows import FlowTable, LiveFlow
    from ztunnel.observe.series import Series, SeriesTable
    from ztunnel.route import Route

__all__ = [
    "MAX_CACHED",
    "MAX_PEERS",
    "Decisions",
    "Key",
    "Numbers",
    "Peer",
    "Peers",
    "Record",
]

MAX_CACHED: Final = 8192
"""Answers kept for the same question asked again (by another worker, or after its table started
afresh). About 1 KB each; the core's own tables are what serves the data path."""

MAX_PEERS: Final = 8192
"""Pools of HBONE connections: pods of this node times the workloads that they call."""

MAX_PEER_IDENTITIES: Final = 64
"""Chains remembered for one peer: one for each worker's connection, old and new at rotation."""


class Numbers(Iterator[int]):
    """Positive numbers, each given once in the life of the process."""

    def __init__(self) -> None:
        self._next = itertools.count(1)

    def __next__(self) -> int:
        return next(self._next)


class Key(NamedTuple):
    """The question that a decision answers: what the core's table is keyed by."""

    kind: int
    pod: int
    source: bytes
    destination: bytes
    port: int
    identity: int


class Peer:
    """A pool of the core: from one pod to one address; servers must prove one of `expected`."""

    __slots__ = ("address", "expected", "gone", "number", "pod", "port", "proven", "refs", "used")

    def __init__(
        self, number: int, pod: int, expected: frozenset[str], address: bytes, port: int
    ) -> None:
        self.number = number
        self.pod = pod
        self.expected = expected
        self.address = address
        self.port = port
        self.refs = 0
        self.used = 0.0
        self.gone = False
        """No workload of the mesh has its address any more."""
        self.proven: OrderedDict[int, Proven] = OrderedDict()
        """Identities that servers of this pool have proved, to be looked at again when trust
        changes."""

    @property
    def key(self) -> tuple[int, frozenset[str], bytes, int]:
        return self.pod, self.expected, self.address, self.port

    def remember(self, proven: Proven) -> None:
        if proven.number not in self.proven:
            proven.refs += 1
        self.proven[proven.number] = proven
        self.proven.move_to_end(proven.number)
        while len(self.proven) > MAX_PEER_IDENTITIES:
            _, oldest = self.proven.popitem(last=False)
            oldest.refs -= 1

    def forget(self) -> None:
        for proven in self.proven.values():
            proven.refs -= 1
        self.proven.clear()


class Peers:
    """Peers by key, the longest unused first.

    A peer that is retired has no key any more, so nothing new names it; it keeps its number, and so
    the core's ear, until the last decision that names it is freed: its streams can still be cut.
    """

    def __init__(self, core: CoreLike, numbers: Iterator[int], limit: int = MAX_PEERS) -> None:
        self._core = core
        self._numbers = numbers
        self._limit = limit
        self._by_key: OrderedDict[tuple[int, frozenset[str], bytes, int], Peer] = OrderedDict()
        self._by_number: dict[int, Peer] = {}
        self.evicted_in_use = 0
        """Peers removed for room while decisions named them: the epoch must be advanced."""

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Peer]:
        """Retired ones too."""
        return iter(list(self._by_number.values()))

    def get(self, number: int) -> Peer | None:
        return self._by_number.get(number)

    def acquire(
        self,
        pod: int,
        credential: int,
        expected: frozenset[str],
        address: bytes,
        port: int,
        now: float,
    ) -> Peer:
        """Return the peer, added to the core if it is new. `now` is monotonic, seconds."""
        key = (pod, expected, address, port)
        peer = self._by_key.get(key)
        if peer is None:
            if len(self._by_key) >= self._limit:
                self._evict()
            peer = Peer(next(self._numbers), pod, expected, address, port)
            self._core.add_peer(peer.number, pod, address, port, credential)
            self._by_key[key] = peer
            self._by_number[peer.number] = peer
        peer.refs += 1
        peer.used = now
        self._by_key.move_to_end(key)
        return peer

    def release(self, peer: Peer, now: float) -> None:
        peer.refs -= 1
        peer.used = now
        if self._by_key.get(peer.key) is peer:
            self._by_key.move_to_end(peer.key)
        elif not peer.refs:
            self.remove(peer)

    def retire(self, peer: Peer) -> None:
        """Let nothing new name `peer`; the next to ask for its key gets another, without pool."""
        if self._by_key.get(peer.key) is peer:
            del self._by_key[peer.key]
        if not peer.refs:
            self.remove(peer)

    def remove(self, peer: Peer) -> None:
        """Take `peer` out of the core, which cannot be asked to cut its streams any more."""
        if self._by_number.pop(peer.number, None) is None:
            return
        if self._by_key.get(peer.key) is peer:
            del self._by_key[peer.key]
        peer.forget()
        self._core.remove_peer(peer.number)

    def retire_proven(self, ended: Collection[int]) -> None:
        """Retire the peers of which a server has proved one of the identities `ended`."""
        for peer in self:
            if not peer.proven.keys().isdisjoint(ended):
                self.retire(peer)

    def remove_idle(self, before: float) -> None:
        """Remove the peers that no decision names and that were last used before `before`."""
        for peer in list(self._by_key.values()):
            if peer.used >= before:
                break
            if not peer.refs:
                self.remove(peer)

    def _evict(self) -> None:
        oldest = next((peer for peer in self._by_key.values() if not peer.refs), None)
        if oldest is None:
            oldest = next(iter(self._by_key.values()))
            self.evicted_in_use += 1
        self.retire(oldest)


class Record:
    """One decision of the core: the question, the judgement, and what it holds."""

    __slots__ = (
        "cached",
        "choices",
        "cut_by",
        "flow",
        "key",
        "killed",
        "labels",
        "mirror",
        "mirror_labels",
        "number",
        "outcome",
        "peer",
        "pod",
        "proofs",
        "proven",
        "series",
    )

    def __init__(
        self, number: int, key: Key, pod: str, outcome: Route | Verdict, labels: Labels
    ) -> None:
        self.number = number
        self.key = key
        self.pod = pod
        self.outcome = outcome
        self.labels = labels
        """This decision's own, also where its series is the one of the overflow."""
        self.series: Series | None = None
        self.mirror: Series | None = None
        self.flow: LiveFlow | None = None
        """What is counted of who called whom, for `series` or, of a hand-over, for `mirror`."""
        self.mirror_labels: Labels = ()
        """The destination's report of a hand-over, beside the source's."""
        self.peer: Peer | None = None
        self.proven: Proven | None = None
        """Whom the caller proved to be, of what comes in."""
        self.proofs: tuple[Proven, ...] = ()
        """Everybody whose certificate the decision rests on."""
        self.choices: tuple[int, ...] = ()
        self.cached = True
        self.killed = False
        self.cut_by = ""
        """The policy that ended its live connections, if one did."""


class Decisions:
    """Records by number, and the cache of those that may be answered again."""

    def __init__(
        self,
        core: CoreLike,
        series: SeriesTable,
        flows: FlowTable,
        peers: Peers,
        limit: int = MAX_CACHED,
    ) -> None:
        self._core = core
        self._series = series
        self._flows = flows
        self._peers = peers
        self._limit = limit
        self._records: dict[int, Record] = {}
        self._cache: OrderedDict[Key, Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    @property
    def cached(self) -> int:
        return len(self._cache)

    def get(self, number: int) -> Record | None:
        return self._records.get(number)

    def lookup(self, key: Key) -> Record | None:
        record = self._cache.get(key)
        if record is not None:
            self._cache.move_to_end(key)
        return record

    def add(self, record: Record) -> None:
        """Take a record whose decision the core has; its series, peer and identity are held."""
        for proven in record.proofs:
            proven.refs += 1
        self._records[record.number] = record

    def cache(self, record: Record) -> None:
        """Keep `record` as the answer to its key."""
        self._cache[record.key] = record
        while len(self._cache) > self._limit:
            _, oldest = self._cache.popitem(last=False)
            self.release(oldest)

    def release(self, record: Record) -> None:
        """Give our reference back; the record stays until the core reports it freed."""
        if not record.cached:
            return
        record.cached = False
        if self._cache.get(record.key) is record:
            del self._cache[record.key]
        self._core.release_decision(record.number)

    def drop_cache(self) -> None:
        records = list(self._cache.values())
        self._cache.clear()
        for record in records:
            self.release(record)

    def freed(self, number: int, now: float) -> None:
        """The core has nothing left of this decision. `now` is monotonic, seconds."""
        record = self._records.pop(number, None)
        if record is None:
            return
        if record.flow is not None:
            self._flows.release(record.flow)
        for series in (record.series, record.mirror):
            if series is not None:
                self._series.release(series)
        if record.peer is not None:
            self._peers.release(record.peer, now)
        for proven in record.proofs:
            proven.refs -= 1
