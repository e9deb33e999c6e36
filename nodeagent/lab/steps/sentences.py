"""Mutual TLS inside the mesh: the exercise of the sentences lab, step by step.

This module owns the order of that migration and what each step must show: what STRICT means for who
is not in the mesh, what breaks when only one end is, and how PERMISSIVE carries a mixture. It
promises the services, resources and outcomes of the exercise's text. It may not soften one.

Where the text uses what is of another kind of mesh, the nearest thing of this one stands for it:

- Injecting a sidecar is enrolling a pod (`nodeagent lab enrol`).
- The ingress gateway, which is in the mesh from the start, is the pod `client`.
- Kiali's picture is the access log and the metric behind it. Where it has callers that it calls
  unknown, the log has their address, the workload that the mesh knows by that address, and no
  identity.
- A DestinationRule chooses what a caller sends. It is not read here, and is refused with a message.
  `name` v1 is taken out of mutual TLS by what it accepts instead: a PeerAuthentication of mode
  DISABLE, which all callers of the mesh obey.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

import msgspec

from nodeagent.lab.claims import polled
from nodeagent.lab.model import LabSpec
from nodeagent.lab.steps.exercise import Call, Entry, Exercise, Step

__all__ = ["MutualTls"]

GATEWAY: Final = "default/client"
SENTENCES: Final = "default/sentences"
AGE: Final = "default/age"
NAME_V1: Final = "default/name-v1"
NAME_V2: Final = "default/name-v2"
SERVICES: Final = (SENTENCES, AGE, NAME_V1, NAME_V2)

URL: Final = "sentences:5000"
POLICY: Final = "default/default"
CLEAR: Final = "default/name-v1-disable"
PEER_AUTH: Final = "peer-auth"
"""STRICT and PERMISSIVE are two contents of one resource, and so of one file."""

TRIES: Final = 5
"""Calls that must all fail where the text speaks of 100% errors."""
MOST_CALLS: Final = 40
"""Calls within which both versions of `name` must have been chosen: one in 2^40 runs fails."""

_SENTENCE: Final = re.compile(r"[A-Za-z' ]+ is [0-9]{1,2} years\.\n?")


def _tells(call: Call) -> bool:
    """Return whether the answer is a sentence, made of a name and an age."""
    return call.answered and _SENTENCE.fullmatch(call.body) is not None


class MutualTls(Exercise):
    LAB: ClassVar[str] = "sentences"

    @classmethod
    def described(cls) -> LabSpec:
        spec = super().described()
        pods = tuple(
            pod if pod.uid == GATEWAY else msgspec.structs.replace(pod, enrolled=False)
            for pod in spec.pods
        )
        # Without localities: else the version of `name` that is near is the only one that is asked.
        nodes = tuple(msgspec.structs.replace(node, locality="") for node in spec.nodes)
        return msgspec.structs.replace(spec, nodes=nodes, pods=pods, resources=())

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("Deploy the sentences application, without sidecars", self._deploy),
            Step("peer-auth/strict.yaml", self._strict_without_sidecars),
            Step("Enable the sidecar for age", self._one_sidecar),
            Step("peer-auth/permissive.yaml", self._permissive),
            Step("Inject sidecars into all services, and strict.yaml again", self._all_strict),
            Step("dest-rule/name.yaml: no mTLS for v1", self._clear_for_one),
        )

    def _deploy(self) -> None:
        call = self.call(GATEWAY, URL, _tells)
        self.claim(f"the application answers: {call.body.strip()}", _tells(call))
        entry = self.logged(call, SENTENCES, direction="outbound")
        self.claim("gateway → sentences is seen, and is plaintext", self.is_plaintext(entry))
        self.claim(
            "what sentences calls nobody has seen: nothing of it is in the mesh",
            not any(self._inbound(pod, call) for pod in SERVICES),
        )

    def _inbound(self, pod: str, call: Call) -> list[Entry]:
        """Return what the pod's node has logged of calls to it since `call`, without waiting."""
        found = self._lab.pod(pod).pod
        log = self._lab.node(found.node).access_log()[call.seen[found.node] :]
        return [
            entry
            for entry in log
            if entry["direction"] == "inbound" and entry.get("dst.workload") == found.name
        ]

    def _strict_without_sidecars(self) -> None:
        self.apply(
            "strict.yaml",
            self.have_mode({GATEWAY: ("STRICT", POLICY)}),
            f"{POLICY} is in force: STRICT for the namespace",
            name=PEER_AUTH,
        )
        said = " ".join(self.warnings("node-1"))
        self.claim(
            "a warning names the workloads that it cannot protect: they are outside the mesh",
            "no effect on workloads outside the mesh" in said
            and all(pod in said for pod in SERVICES),
        )
        call = self.call(GATEWAY, URL, _tells)
        self.claim(f"traffic still flows: {call.body.strip()}", _tells(call))

    def _one_sidecar(self) -> None:
        self.enrol(AGE)
        call = self.call(GATEWAY, URL, lambda made: not made.answered)
        self.claim(f"traffic no longer flows: status {call.status}", call.status >= 500)  # noqa: PLR2004 - any error of the server
        entry = self.logged(call, AGE, source=SENTENCES)
        self.claim(
            f"age refuses sentences, which has no sidecar: {entry.get('reason')}",
            entry.get("reason") == "strict_requires_mtls" and self.is_plaintext(entry),
        )
        failed = [self.call(GATEWAY, URL) for _ in range(TRIES)]
        self.claim(f"100% errors: {TRIES} of {TRIES}", not any(each.answered for each in failed))

    def _permissive(self) -> None:
        self.apply(
            "permissive.yaml",
            self.have_mode(dict.fromkeys((GATEWAY, AGE), ("PERMISSIVE", POLICY))),
            f"{POLICY} is in force: PERMISSIVE",
            name=PEER_AUTH,
        )
        call = self.call(GATEWAY, URL, _tells)
        self.claim(f"traffic is restored: {call.body.strip()}", _tells(call))
        entry = self.logged(call, AGE, source=SENTENCES)
        self.claim(
            f"age hears an unknown caller: {entry.get('src.addr')}, without an identity",
            self.is_plaintext(entry),
        )
        self.claim(
            "the graph is disjoint: nothing reports what goes on between the two",
            not any(self._inbound(pod, call) for pod in (SENTENCES, NAME_V1, NAME_V2)),
        )

    def _all_strict(self) -> None:
        self.enrol(SENTENCES, NAME_V1, NAME_V2)
        self.apply(
            "strict.yaml",
            self.have_mode(dict.fromkeys((GATEWAY, *SERVICES), ("STRICT", POLICY))),
            "every workload is STRICT",
            name=PEER_AUTH,
        )
        call = self.call(GATEWAY, URL, _tells)
        self.claim(f"traffic flows: {call.body.strip()}", _tells(call))
        for source, destination in ((GATEWAY, SENTENCES), (SENTENCES, AGE)):
            entry = self.logged(call, destination, source=source)
            self.claim(
                f"mutual TLS: {entry.get('src.identity')} → {entry.get('dst.identity')}",
                self.is_mutual(entry, source, destination),
            )
        for name, entry in self._both_names().items():
            self.claim(
                f"mutual TLS: {entry.get('src.identity')} → {name}",
                self.is_mutual(entry, SENTENCES, name),
            )

    def _both_names(self) -> dict[str, Entry]:
        """Call until both versions of `name` have been asked; return the last line of each."""
        first = self.call(GATEWAY, URL, _tells)
        found: dict[str, Entry] = {}
        for _ in range(MOST_CALLS):
            for name in (NAME_V1, NAME_V2):
                found[name] = next(reversed(self._inbound(name, first)), {})
            if all(found.values()):
                break
            self._call(GATEWAY, URL)
        return found

    def _clear_for_one(self) -> None:
        self.apply(
            "dest-rule-name.yaml",
            lambda: all(
                any("DestinationRule" in each["reason"] for each in self.problems(node))
                for node in self.nodes
            ),
            "a DestinationRule is refused, by name: it is never silently without effect",
        )
        self.withdraw("dest-rule-name")
        self.apply(
            "permissive.yaml",
            self.have_mode(dict.fromkeys((GATEWAY, *SERVICES), ("PERMISSIVE", POLICY))),
            f"{POLICY} is PERMISSIVE again",
            name=PEER_AUTH,
        )
        self.apply(
            "name-v1-disable.yaml",
            self.have_mode({NAME_V1: ("DISABLE", CLEAR), NAME_V2: ("PERMISSIVE", POLICY)}),
            f"mutual TLS is off for v1 of name: DISABLE by {CLEAR}",
        )
        self.claim(
            "a warning on every node names whose traffic is in the clear",
            polled(lambda: all(self._is_told(node) for node in self.nodes), self._patience),
        )
        found = self._both_names()
        self.claim("a missing padlock: sentences → name v1 is plaintext",
                   self.is_plaintext(found[NAME_V1]))  # fmt: skip
        self.claim(f"the log says why: {found[NAME_V1].get('policy')}",
                   found[NAME_V1].get("policy", "").startswith(f"{CLEAR} ("))  # fmt: skip
        self.claim("sentences → name v2 is mutual TLS",
                   self.is_mutual(found[NAME_V2], SENTENCES, NAME_V2))  # fmt: skip

    def _is_told(self, node: str) -> bool:
        return any("in the clear" in each and NAME_V1 in each for each in self.warnings(node))
