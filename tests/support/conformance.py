"""The conformance table: what is asked, what is expected, and the path that answers.

Owns the format of tests/conformance/*.yaml and the way from a case to a verdict. Promises that the
way is the daemons' own: the loader reads the text of the policies and of the workloads, the mesh
builds from the documents, its resources go through the frames of the seam, and ztunnel applies
them and judges. Nothing of it knows what a case expects.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
import yaml

from nodeagent import mesh, published
from nodeagent.api import Document, Loaded, load
from nodeagent.settings import Settings, for_tunnel
from ztunnel import address, protocol, state
from ztunnel.authorize import Client, Request, Verdict, authorize
from ztunnel.policy import DEFAULT_DENY
from ztunnel.spiffe import SpiffeId
from ztunnel.state import State

__all__ = [
    "Case",
    "DryRun",
    "Refused",
    "Scenario",
    "by",
    "client",
    "decide",
    "load_policies",
    "request",
    "scenarios",
    "settings",
    "sources",
    "unplaced",
    "workloads",
]

TABLE: Final = Path(__file__).parents[1] / "conformance"
NODE: Final = "node-1"
POLICIES: Final = "policies.yaml"
"""The file that the policies seem to come from."""


class _Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class DryRun(_Row, frozen=True, kw_only=True):
    """What would become of a connection if policies of a dry run were enforced; see `Case`."""

    allow: bool
    by: str


class Case(_Row, frozen=True, kw_only=True):
    """A connection, and what becomes of it.

    `caller` and `to` are workloads of mesh.yaml and give identity and addresses, unless the case
    gives its own: `identity` as a principal is written, "" for plaintext. A caller without an agent
    speaks plaintext. `by` is what decided: the rule that matched; "no ALLOW policy", or "default
    deny by POLICY, …"; or the PeerAuthentication that refused. `level` is the PeerAuthentication
    that set `mode`. `audit` are the rules that marked the connection, `unread` is what of them is
    layer 7; `dry_run` is None where no policy of a dry run counts.
    """

    caller: str = msgspec.field(name="from", default="foo/sleep")
    identity: str | None = None
    source: str | None = None
    to: str = "foo/httpbin"
    destination: str | None = None
    port: int = 8080
    allow: bool
    by: str = ""
    mode: str = ""
    level: str = ""
    audit: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    dry_run: DryRun | None = None
    why: str = ""


class Refused(_Row, frozen=True, kw_only=True):
    """Documents that must not load: there is an error at `field`, and `says` is in one."""

    field: str
    says: str = ""


class Scenario(_Row, frozen=True, kw_only=True):
    """Policies and the connections that they decide. `cites` is where this is documented.

    `differs` says where the reference does something else, and why. `trusts` are the trust domains
    whose roots are known, beside the node's own. `warns` are the fields that the loader warns of.
    """

    title: str
    cites: str
    differs: str = ""
    policies: str = ""
    trust_domain: str = "cluster.local"
    trusts: tuple[str, ...] = ()
    root_namespace: str = "istio-system"
    warns: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()
    refused: Refused | None = None


def sources() -> dict[str, str]:
    """Return what the first words of `cites` stand for."""
    return msgspec.yaml.decode((TABLE / "sources.yaml").read_bytes(), type=dict[str, str])


@functools.cache
def scenarios() -> dict[str, tuple[Scenario, ...]]:
    """Return the table by topic."""
    topics = sorted(TABLE.glob("*.yaml"))
    return {
        path.stem: msgspec.yaml.decode(path.read_bytes(), type=tuple[Scenario, ...])
        for path in topics
        if path.name not in {"mesh.yaml", "sources.yaml"}
    }


@functools.cache
def workloads() -> tuple[Document, ...]:
    loaded = load((TABLE / "mesh.yaml").read_bytes(), "mesh.yaml", NODE)
    assert not loaded.errors, loaded.errors
    return loaded.documents


def load_policies(scenario: Scenario) -> Loaded:
    return load(scenario.policies.encode(), POLICIES, NODE)


def settings(scenario: Scenario) -> Settings:
    return Settings(
        node=NODE, trust_domain=scenario.trust_domain, root_namespace=scenario.root_namespace
    )


def _told(resources: Iterable[protocol.Resource], own: Settings) -> State:
    """Return the state of a ztunnel that was sent the resources, frame by frame."""
    plan = published.plan(None, {published.key_of(each): each for each in resources}, 1)
    assert not plan.oversized
    decoder = protocol.FrameDecoder()
    upserts: list[protocol.Resource] = []
    for part in plan.parts:
        (frame,) = decoder.feed(protocol.encode(part.update))
        assert isinstance(frame.message, protocol.Update)
        upserts += frame.message.upserts
    change = state.Change(1, True, tuple(upserts), (), for_tunnel(own))
    return state.apply(state.EMPTY, change)


@functools.lru_cache(maxsize=8)
def _state(scenario: Scenario, *, backwards: bool) -> State:
    loaded = load_policies(scenario)
    assert not loaded.errors, loaded.errors
    documents = [*workloads(), *loaded.documents]
    own = settings(scenario)
    built = mesh.build(reversed(documents) if backwards else documents, own)
    resources, _ = mesh.diff(None, built)
    trusted = (scenario.trust_domain, *scenario.trusts)
    bundles = [protocol.TrustBundle(domain, (b"root",)) for domain in trusted]
    pods = [
        protocol.Pod(uid, uid, built.workloads[uid].addresses, number)
        for number, uid in enumerate(built.bindings, 1)
    ]
    return _told([*resources, *bundles, *pods], own)


def _identity(found: State, case: Case) -> str:
    if case.identity is not None:
        return f"spiffe://{case.identity}" if case.identity else ""
    return found.workloads[case.caller].identity


def decide(scenario: Scenario, case: Case, *, backwards: bool = False) -> Verdict:
    """Return the verdict on the connection; `backwards` takes the documents in reverse order."""
    return authorize(
        _state(scenario, backwards=backwards), request(scenario, case, backwards=backwards)
    )


def request(scenario: Scenario, case: Case, *, backwards: bool = False) -> Request:
    """Return what the connection of a case asks of the tunnel."""
    found = _state(scenario, backwards=backwards)
    identity = _identity(found, case)
    source = case.source or found.workloads[case.caller].addresses[0]
    destination = case.destination or found.workloads[case.to].addresses[0]
    return Request(
        pod=found.pods[case.to],
        identity=SpiffeId.parse(identity) if identity else None,
        source=address.pack(source),
        destination=address.pack(destination),
        port=case.port,
    )


def client(scenario: Scenario, case: Case) -> Client:
    """Return the kind of caller that the case is about."""
    if not _identity(_state(scenario, backwards=False), case):
        return Client.WITHOUT_IDENTITY
    return Client.ALLOWED if case.allow else Client.NOT_ALLOWED


@functools.lru_cache(maxsize=8)
def _places(scenario: Scenario) -> dict[str, int]:
    """Return the lines in which documents and rules start, read by another reader."""
    places: dict[str, int] = {}
    for root in yaml.compose_all(scenario.policies, Loader=yaml.SafeLoader):
        document = {key.value: value for key, value in root.value}
        metadata = {key.value: value.value for key, value in document["metadata"].value}
        spec = {key.value: value for key, value in document["spec"].value}
        uid = f"{metadata.get('namespace', 'default')}/{metadata['name']}"
        places[uid] = root.start_mark.line + 1
        for number, rule in enumerate(spec["rules"].value if "rules" in spec else ()):
            places[f"{uid} rules[{number}]"] = rule.start_mark.line + 1
    return places


_ORIGIN: Final = re.compile(rf"(.+) \({POLICIES}:([1-9][0-9]*)\)")


def unplaced(origin: str, scenario: Scenario) -> str:
    """Return an origin without its place, once the place has been found to be the right one."""
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return origin
    assert _places(scenario)[found[1]] == int(found[2]), origin
    return found[1]


def by(origin: str, scenario: Scenario, *, allow: bool) -> str:
    """Return what a decision rests on, as `Case.by` says it."""
    if origin.startswith(DEFAULT_DENY):
        names = origin.removeprefix(DEFAULT_DENY).split(", ")
        return "default deny by " + ", ".join(unplaced(name, scenario) for name in names)
    name = unplaced(origin, scenario)
    return "no ALLOW policy" if allow and " rules[" not in name else name
