"""A core that only remembers: what was told to it, and what a test wants it to ask or report.

Owns a stand-in for `ztunnel._core.Core` with the same methods. It keeps the core's promises that
the control side relies on, and fails the test where the control side breaks one of its own:
numbers are never used twice, objects are known before they are referred to, an answer carries the
epoch, a released decision is reported freed once nothing refers to it. It opens no socket.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, TypeVar

from ztunnel._core import Ended, Failed, Listed, PodCounters, SeriesCounters, Stats, Upcall
from ztunnel.corelike import Kind
from ztunnel.reasons import Reason

T = TypeVar("T")

REASONS: Final = tuple(Reason)
BOUNDS_US: Final = (100, 1000, 10_000)


def record(kind: Callable[..., T], *values: object) -> T:
    """Return one of the core's records: its types are made from one sequence, as the core does."""
    return kind(values)


def carried(**fields: Any) -> Listed:  # noqa: ANN401 - the record's
    """Return a connection as the core lists it, by default one that nothing is known of yet."""
    values: dict[str, Any] = {
        "number": 1,
        "kind": Kind.OUTBOUND,
        "state": 3,
        "pod": 0,
        "decision": 0,
        "identity": 0,
        "source": b"",
        "source_port": 4000,
        "destination": b"",
        "destination_port": 8080,
        "upstream": b"",
        "upstream_port": 0,
        "started_us": 0,
        "moved_us": 0,
        "received": 10,
        "sent": 20,
        "tls_version": "",
        "cipher": "",
        "group": "",
    }
    return record(Listed, *(values | fields).values())


class Decision(NamedTuple):
    action: str
    series: int = 0
    arguments: tuple[Any, ...] = ()


class FakeCore:
    """`calls` is everything that was told, in order, as (method, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.used: set[int] = set()
        self.pods: dict[int, tuple[Any, ...]] = {}
        self.credentials: dict[int, tuple[int, int]] = {}
        self.peers: dict[int, tuple[int, bytes, int, int]] = {}
        self.series: dict[int, SeriesCounters] = {}
        self.decisions: dict[int, Decision] = {}
        self.released: set[int] = set()
        self.answers: dict[int, int] = {}
        """Upcall to the decision that answered it."""
        self.certificates: dict[int, tuple[int, Reason]] = {}
        self.killed: dict[int, Reason] = {}
        self.killed_identities: dict[int, Reason] = {}
        self.closed_peers: dict[int, Reason] = {}
        self.deadlines: dict[str, int] = {}
        self.emptied = False
        """What `drained` says."""
        self.limits: dict[str, int] = {}
        self.pod_counters: dict[int, PodCounters] = {}
        self.fail_add_pod: Exception | None = None
        self.last_loop_us: tuple[int, ...] = (0,)
        self._epoch = 1
        self._upcalls: deque[Upcall] = deque()
        self.forms: dict[int, bytes] = {}
        self.ready: tuple[bytes, int] = (b"", 0)
        """What `lines` returns next."""
        self.carried: list[Listed] = []
        """What the next listing has."""
        self.missed = 0
        self.tracing = (False, 0)
        self.listing = False
        self._ended: deque[Ended] = deque()
        self._failed: deque[Failed] = deque()
        self._freed: deque[int] = deque()
        self._next_upcall = 1
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close(self) -> None:
        os.close(self._event_fd)

    # --- what tests do -------------------------------------------------------------------------

    def ask(
        self,
        kind: Kind,
        pod: int = 0,
        *,
        source: bytes = b"",
        source_port: int = 40000,
        destination: bytes = b"",
        port: int = 0,
        identity: int = 0,
        peer: int = 0,
        chain: Iterable[bytes] = (),
    ) -> int:
        """Queue a question; return its id."""
        number = self._next_upcall
        self._next_upcall += 1
        self._upcalls.append(
            record(
                Upcall,
                number,
                kind,
                self._epoch,
                pod,
                source,
                source_port,
                destination,
                port,
                identity,
                peer,
                tuple(chain),
            )
        )
        os.eventfd_write(self._event_fd, 1)
        return number

    def report(self, event: Ended | Failed) -> None:
        if isinstance(event, Ended):
            self._ended.append(event)
        else:
            self._failed.append(event)
        os.eventfd_write(self._event_fd, 1)

    def free(self, decision: int) -> None:
        """Nothing refers to the decision any more."""
        assert decision in self.released, f"decision {decision} was not released"
        del self.decisions[decision]
        self._freed.append(decision)
        os.eventfd_write(self._event_fd, 1)

    def answer_to(self, upcall: int) -> Decision:
        return self.decisions[self.answers[upcall]]

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    # --- the core's methods ----------------------------------------------------------------------

    def _told(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - whatever was told
        self.calls.append((name, arguments))

    def _take_number(self, number: int) -> None:
        assert number > 0
        assert number not in self.used, f"number {number} was used before"
        self.used.add(number)

    def start(self) -> None:
        self._told("start")

    def stop(self) -> None:
        self._told("stop")

    @property
    def event_fd(self) -> int:
        return self._event_fd

    @property
    def epoch(self) -> int:
        return self._epoch

    def advance_epoch(self) -> int:
        self._epoch += 1
        self._told("advance_epoch", self._epoch)
        return self._epoch

    def drain(self) -> None:
        self._told("drain")

    def drained(self) -> bool:
        return self.emptied

    def set_deadline(self, name: str, us: int) -> None:
        self.deadlines[name] = us

    def set_tracing(self, on: bool, parts: int) -> None:
        self.tracing = (on, parts)

    def set_limit(self, name: str, most: int) -> None:
        self.limits[name] = most

    def add_pod(
        self,
        pod: int,
        netns: int,
        outbound: int,
        inbound: int,
        hbone: int,
        addresses: tuple[bytes, ...],
        credential: int,
    ) -> None:
        if self.fail_add_pod is not None:
            raise self.fail_add_pod
        for descriptor in (netns, outbound, inbound, hbone):
            os.fstat(descriptor)
        self._take_number(pod)
        self.pods[pod] = (addresses, credential)
        self._told("add_pod", pod, addresses, credential)

    def remove_pod(self, pod: int) -> None:
        del self.pods[pod]
        self._told("remove_pod", pod)

    def read_pod(self, pod: int) -> PodCounters:
        assert pod in self.pods
        none = record(PodCounters, 0, 0, 0, 0, 0, 0, (0,) * len(REASONS))
        return self.pod_counters.get(pod, none)

    def set_credential(self, credential: int, client_ctx: int, server_ctx: int) -> None:
        self.credentials[credential] = (client_ctx, server_ctx)
        self._told("set_credential", credential, client_ctx, server_ctx)

    def remove_credential(self, credential: int) -> None:
        self.credentials.pop(credential, None)
        self._told("remove_credential", credential)

    def add_peer(self, peer: int, pod: int, address: bytes, port: int, credential: int) -> None:
        assert pod in self.pods
        self._take_number(peer)
        self.peers[peer] = (pod, address, port, credential)
        self._told("add_peer", peer, pod, address, port, credential)

    def remove_peer(self, peer: int) -> None:
        del self.peers[peer]
        self._told("remove_peer", peer)

    def close_peer(self, peer: int, reason: int) -> None:
        assert peer in self.peers
        self.closed_peers[peer] = REASONS[reason]

    def suspect_peer(self, peer: int) -> None:
        assert peer in self.peers
        self._told("suspect_peer", peer)

    def add_series(self, series: int) -> None:
        self._take_number(series)
        self.series[series] = record(SeriesCounters, 0, 0, (0,) * len(REASONS), 0, 0)

    def read_series(self, series: int) -> SeriesCounters:
        return self.series[series]

    def remove_series(self, series: int) -> None:
        del self.series[series]

    def _decide(self, number: int, decision: Decision) -> None:
        # A refusal alone may be counted nowhere.
        assert decision.series in self.series or (
            decision.action == "refuse" and not decision.series
        )
        self._take_number(number)
        self.decisions[number] = decision

    def decide_refuse(self, decision: int, series: int, reason: int) -> None:
        self._decide(decision, Decision("refuse", series, (REASONS[reason],)))

    def decide_forward(self, decision: int, series: int, address: bytes, port: int) -> None:
        self._decide(decision, Decision("forward", series, (address, port)))

    def decide_deliver(self, decision: int, series: int) -> None:
        self._decide(decision, Decision("deliver", series))

    def decide_hand_over(
        self, decision: int, series: int, mirror: int, pod: int, address: bytes, port: int
    ) -> None:
        assert mirror in self.series
        assert pod in self.pods
        self._decide(decision, Decision("hand_over", series, (mirror, pod, address, port)))

    def decide_tunnel(
        self, decision: int, series: int, peer: int, authority: str, baggage: str, host: str
    ) -> None:
        assert peer in self.peers
        self._decide(decision, Decision("tunnel", series, (peer, authority, baggage, host)))

    def decide_balance(self, decision: int, choices: tuple[tuple[int, int], ...]) -> None:
        assert all(number in self.decisions for number, _ in choices)
        self._take_number(decision)
        self.decisions[decision] = Decision("balance", 0, (choices,))

    def describe(self, decision: int, form: bytes) -> None:
        assert decision in self.decisions
        assert decision not in self.answers.values()
        assert decision not in self.forms
        self.forms[decision] = form

    def release_decision(self, decision: int) -> None:
        assert decision in self.decisions
        assert decision not in self.released, f"decision {decision} was released twice"
        self.released.add(decision)

    def kill_decision(self, decision: int, reason: int) -> None:
        if decision not in self.decisions:
            raise KeyError(decision)
        self.killed[decision] = REASONS[reason]
        self._told("kill_decision", decision)

    def kill_identity(self, identity: int, reason: int) -> None:
        self.killed_identities[identity] = REASONS[reason]
        self._told("kill_identity", identity)

    def upcalls(self, most: int) -> list[Upcall]:
        return [self._upcalls.popleft() for _ in range(min(most, len(self._upcalls)))]

    def answer(self, upcall: int, epoch: int, decision: int) -> bool:
        assert decision in self.decisions
        if epoch != self._epoch:
            return False
        self.answers[upcall] = decision
        return True

    def answer_certificate(self, upcall: int, identity: int, reason: int) -> None:
        self.certificates[upcall] = (identity, REASONS[reason])

    def ended(self, most: int) -> list[Ended]:
        return [self._ended.popleft() for _ in range(min(most, len(self._ended)))]

    def lines(self) -> tuple[bytes, int]:
        taken, self.ready = self.ready, (b"", 0)
        return taken

    def failed(self, most: int) -> list[Failed]:
        return [self._failed.popleft() for _ in range(min(most, len(self._failed)))]

    def freed(self, most: int) -> list[int]:
        return [self._freed.popleft() for _ in range(min(most, len(self._freed)))]

    def list_connections(self) -> None:
        if self.listing:
            raise BlockingIOError
        self.listing = True

    def listed(self, most: int) -> tuple[list[Listed], bool, int]:
        found, self.carried = self.carried[:most], self.carried[most:]
        self.listing &= bool(self.carried)
        return found, not self.listing, self.missed

    def stats(self) -> Stats:
        buckets = (1,) * (len(BOUNDS_US) + 1)
        return record(
            Stats,
            3,
            2,
            5,
            1000,
            4_096,
            buckets,
            5_000,
            buckets,
            6_000,
            (0,) * len(REASONS),
            (0, 4),
            len(self.answers),
            buckets,
            700,
            9,
            0,
            ((3, 7),) * len(self.last_loop_us),
            self.last_loop_us,
            0,
        )
