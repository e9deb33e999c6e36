"""What the audit log says of one judgement: who asked, what was the verdict, by which policy.

This module owns the step from a verdict, and the line that the access log has of the same
connection, to an entry. It promises that an entry names the policy that decided, or in words that
can be no policy's name why none did; and that an identity in it was proved. It is pure.

`policy` is what stands behind `policy=`: the name of a policy. Four other values have a colon,
which no name of Kubernetes has:

    default:allow            no PeerAuthentication is for the workload, and nothing else forbids
    default:deny             ALLOW policies are for the workload, and no rule of theirs matches
    settings:node_plaintext  plaintext of the node's own, which the settings let pass STRICT
    agent:REASON             refused without a policy, for this reason: see docs/operations.md
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec

from ztunnel.authorize import NODE_PLAINTEXT, Client, Verdict
from ztunnel.observe import labels
from ztunnel.observe.access_log import Line
from ztunnel.policy import DEFAULT_DENY
from ztunnel.reasons import Reason

__all__ = ["Entry", "Event", "Policy", "of_handshake", "of_verdict", "policy_of"]


class Event(enum.StrEnum):
    """What a line is about."""

    CALLER = "caller"
    """A caller is let in for the first time under the policies of now: its connection begins."""
    CONNECTION = "connection"
    """A connection has ended; one that is refused ends at once."""
    HANDSHAKE = "handshake"
    """A caller's certificate was refused."""


class Policy(NamedTuple):
    """`name` stands behind `policy=`. `origin` is the rule with its file and line, or ""."""

    name: str
    namespace: str
    origin: str


class Entry(msgspec.Struct, frozen=True):
    """One line. `time` is in seconds since the epoch. `line` is the access log's.

    An empty `identity` is an unknown one. Of a caller, `line` has neither port of the source nor
    bytes nor duration.
    """

    time: float
    event: Event
    allow: bool
    identity: str
    policy: Policy
    client: Client
    verdict: Verdict | None
    line: Line


def policy_of(origin: str, refused: Reason | None = None) -> Policy:
    """Return the policy that `origin` names, as `authorize.Verdict` and its like spell it.

    `refused` is why a caller was kept out, None if it was not.
    """
    if origin.startswith(DEFAULT_DENY):
        return Policy("default:deny", "", origin)
    if origin == NODE_PLAINTEXT:
        return Policy("settings:node_plaintext", "", "")
    namespace, slash, name = origin.partition(" ")[0].partition("/")
    if slash:
        return Policy(name, namespace, origin)
    if refused is None:
        return Policy("default:allow", "", "")
    return Policy(f"agent:{refused.value}", "", "")


def of_verdict(time: float, event: Event, verdict: Verdict, line: Line) -> Entry:
    """Return the entry of a caller or a connection. What was cut has a verdict that refuses."""
    allow = verdict.allow
    identity = labels.value(line.labels, "source_principal")
    if not identity:
        client = Client.WITHOUT_IDENTITY
    else:
        client = Client.ALLOWED if allow else Client.NOT_ALLOWED
    policy = policy_of(verdict.origin, None if allow else verdict.reason)
    return Entry(time, event, allow, identity, policy, client, verdict, line)


def of_handshake(time: float, line: Line) -> Entry:
    """Return the entry of a caller whose certificate was refused: it has proved nothing."""
    return Entry(
        time,
        Event.HANDSHAKE,
        allow=False,
        identity="",
        policy=policy_of("", line.reason),
        client=Client.WITHOUT_IDENTITY,
        verdict=None,
        line=line,
    )
