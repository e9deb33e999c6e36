"""Would traffic pass? The checks behind readiness, the watchdog and the status answers.

This module owns what "ready" and "alive" mean and the answers to nodeagent's questions. It promises
that every check names what is wrong in words for the operator. It may not repair anything.

Questions that ztunnel answers (`Query.what`):

`status`     one object: release, versions, checks, counters, pods with their identity and
             certificate's end, where the access log goes ("-" is standard output), what is wrong
             with each sink of the audit log ("" if nothing is), and how far a drain is
             (`upgrade.Upgrade.status`).
`drain`      hand over: the process whose id is the argument `successor` serves from now on.
             Answered once nothing is accepted any more (by the daemon, not here).
`stats`      /stats of the argument `query` (a URL's, as it is there): `status`, `media` and `body`
             of the answer in HTTP (by the daemon, not here).
`decisions`  what the core was told: an array of at most MAX_LISTED decisions and MAX_LISTED_BYTES;
             the argument `pod` (a pod's uid) selects.
`connections` what is carried now, page by page (`connection_messages`; by `listing`, not here).
`report`     tell what has been counted of callers now (by the daemon, not here).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ztunnel import address
from ztunnel.authorize import Verdict
from ztunnel.corelike import Kind
from ztunnel.log_writer import STDOUT
from ztunnel.protocol import PROTOCOL_VERSION
from ztunnel.release import release
from ztunnel.route import Balance, HandOver, Passthrough, Plain, Refuse

if TYPE_CHECKING:
    from ztunnel.admin import Check
    from ztunnel.control import Control
    from ztunnel.corelike import CoreLike
    from ztunnel.decisions import Record
    from ztunnel.pods import Held
    from ztunnel.tunnel import Tunnel

__all__ = ["MAX_LISTED", "Health"]

STALL_SECONDS: Final = 5.0
"""Since a worker's loop last turned: it turns at least every second when it has nothing to do."""

MAX_LISTED: Final = 1000
"""Decisions in one answer: a few hundred KB of JSON, far below the seam's frame."""

MAX_LISTED_BYTES: Final = 2 * 1024 * 1024
"""The same in bytes: names of policies and files are as long as their authors like."""

MOST_TOLD: Final = 5
"""Pods without a certificate that are named in one line: most often all have one cause."""

_MICROSECONDS: Final = 1_000_000


class Health:
    """Looks at the parts. `clock` is monotonic, `wall` since the epoch; both in seconds."""

    def __init__(
        self,
        core: CoreLike,
        tunnel: Tunnel,
        control: Control,
        clock: Callable[[], float],
        wall: Callable[[], float],
        draining: Callable[[], dict[str, Any] | None] = lambda: None,
        access_log: str = STDOUT,
    ) -> None:
        self._core = core
        self._tunnel = tunnel
        self._control = control
        self._clock = clock
        self._wall = wall
        self._draining = draining
        self._access_log = access_log

    def live(self) -> list[Check]:
        return [("workers", self._workers())]

    def ready(self) -> list[Check]:
        """The checks in the order in which a start passes them."""
        return [
            ("state", self._state()),
            ("workers", self._workers()),
            ("certificates", self._certificates()),
            ("decisions", self._tunnel.decision_problem()),
        ]

    def _state(self) -> str:
        if self._tunnel.committed:
            return ""
        problem = self._control.status.problem
        return f"no state from nodeagent yet{f' ({problem})' if problem else ''}"

    def _workers(self) -> str:
        now = self._clock() * _MICROSECONDS
        stalled = [
            f"worker {number} has not turned for {(now - last) / _MICROSECONDS:.0f} s"
            for number, last in enumerate(self._core.stats().last_loop_us)
            if now - last > STALL_SECONDS * _MICROSECONDS
        ]
        return "; ".join(stalled)

    def _certificates(self) -> str:
        problems = [
            f"{held.pod.uid}: {problem}"
            for held in self._tunnel.pods
            if (problem := self._certificate_of(held))
        ]
        shown = "; ".join(problems[:MOST_TOLD])
        more = len(problems) - MOST_TOLD
        return f"{shown}; and {more} more" if more > 0 else shown

    def _certificate_of(self, held: Held) -> str:
        """Return what keeps a pod from proving who it is, or ""."""
        state = self._tunnel.state
        workload = state.workload_of(held.pod)
        if workload is None:
            return f"its workload {held.pod.workload!r} is not known"
        if held.pod.workload not in state.policies:
            return f"no policy for its workload {held.pod.workload!r}: nobody may call it"
        if not workload.identity:
            return ""
        identity = state.identities.get(workload.identity)
        if identity is None:
            return f"no certificate for {workload.identity}"
        now = self._wall()
        if now >= identity.not_after:
            return (
                f"the certificate of {workload.identity} ended {now - identity.not_after:.0f} s ago"
            )
        return ""

    async def answer(self, what: str, args: Mapping[str, str]) -> bytes:
        """Answer a question with JSON. Raises KeyError for a name that is not documented above."""
        match what:
            case "status":
                return msgspec.json.encode(self._status())
            case "decisions":
                return self._decisions(args.get("pod", ""))
        raise KeyError(what)

    def _status(self) -> dict[str, Any]:
        tunnel = self._tunnel
        control = self._control.status
        stats = self._core.stats()
        return {
            "protocol_version": PROTOCOL_VERSION,
            "release": release(),
            "pid": os.getpid(),
            "version": tunnel.state.version,
            "epoch": tunnel.epoch,
            "connected": control.connected,
            "ready": dict(self.ready()),
            "draining": self._draining(),
            "workers": len(stats.workers),
            "connections": stats.connections,
            "hbone_connections": stats.tls_connections,
            "decisions": len(tunnel.decisions),
            "peers": len(tunnel.peers),
            "series": len(tunnel.series),
            "waiting": tunnel.waiting,
            "events_lost": stats.events_lost,
            "internal_errors": tunnel.internal_errors,
            "workloads": len(tunnel.state.workloads),
            "services": len(tunnel.state.services),
            "authorizations": len(tunnel.state.authorizations),
            "access_log": self._access_log,
            "audit": tunnel.audit.counts().problems,
            "trust_domains": sorted(tunnel.state.bundles),
            "pods": [self._pod(held) for held in tunnel.pods],
            "certificates": {
                uid: {"not_before": identity.not_before, "not_after": identity.not_after}
                for uid, identity in tunnel.state.identities.items()
            },
        }

    def _pod(self, held: Held) -> dict[str, Any]:
        state = self._tunnel.state
        policy = state.policies.get(held.pod.workload)
        identity = state.identities.get(held.identity)
        return {
            "uid": held.pod.uid,
            "workload": held.pod.workload,
            "addresses": sorted(address.text(packed) for packed in held.pod.addresses),
            "identity": held.identity,
            "certificate_not_after": identity.not_after if identity is not None else None,
            "mode": policy.mode.value if policy is not None else None,
            "policy": policy.origin if policy is not None else None,
            "problem": self._certificate_of(held),
            "connections": self._core.read_pod(held.number).connections,
        }

    def _decisions(self, pod: str) -> bytes:
        found: list[bytes] = []
        room = MAX_LISTED_BYTES
        for record in self._tunnel.decisions:
            if pod and record.pod != pod:
                continue
            entry = msgspec.json.encode(_decision(record))
            room -= len(entry)
            if room < 0 or len(found) == MAX_LISTED:
                break
            found.append(entry)
        return b"[%s]" % b",".join(found)


def _decision(record: Record) -> dict[str, Any]:
    key = record.key
    entry: dict[str, Any] = {
        "pod": record.pod,
        "direction": "outbound" if key.kind == Kind.OUTBOUND else "inbound",
        "source": address.text(key.source),
        "destination": address.authority(key.destination, key.port),
        "identity": str(record.proven.id) if record.proven is not None else "",
        "cut": record.killed,
    }
    match record.outcome:
        case Verdict() as verdict:
            entry["action"] = "deliver" if verdict.allow else "refuse"
            entry["reason"] = "" if verdict.allow else verdict.reason.value
            entry |= _judged(verdict)
        case Refuse() as refusal:
            entry["action"] = "refuse"
            entry["reason"] = refusal.reason.value
        case Passthrough():
            entry["action"] = "passthrough"
        case Plain() as plain:
            entry["action"] = "plain"
            entry["target"] = address.authority(plain.target, plain.port)
            entry["policy"] = plain.origin
        case Balance() as balance:
            entry["action"] = "balance"
            entry["choices"] = len(balance.choices)
        case HandOver() as over:
            entry["action"] = "hand over (same node, direct: not encrypted)"
            entry["target"] = over.way.authority
            entry["identity"], entry["expected"] = str(over.proofs[0].id), [str(over.proofs[1].id)]
            entry |= _judged(over.verdict)
        case tunnel:
            entry["action"] = "tunnel"
            entry["target"] = tunnel.authority
            entry["expected"] = sorted(tunnel.expected)
    return entry


def _judged(verdict: Verdict) -> dict[str, Any]:
    return {
        "policy": verdict.origin,
        "client": verdict.client,
        "audits": msgspec.to_builtins(verdict.audits),
        "dry_run": msgspec.to_builtins(verdict.dry_run),
    }
