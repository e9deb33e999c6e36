"""What the steps of all exercises do alike: call, apply, enrol, and look what became of it.

This module owns the ways in which a step acts on a lab and reads what happened. It promises that
whatever it does is shown as the command that an operator would type, that it waits for effects and
never for time, and that a look at the access log sees only what came after the call it is about.
It may not judge: what should hold is the exercise's own.
"""

from __future__ import annotations

import abc
import http.client
import importlib.resources
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from nodeagent.lab.claims import CURL_REFUSALS, LIVE_SECONDS, Claim, Claims, host, polled
from nodeagent.lab.lab import Lab
from nodeagent.lab.model import LabSpec, PodPlan
from nodeagent.lab.spec import load_exercise

__all__ = ["MUTUAL", "PLAINTEXT", "Call", "Done", "Exercise", "Stats", "Step"]

MUTUAL: Final = "mutual_tls"
PLAINTEXT: Final = "none"

_ADMIN: Final = 15000
_OK: Final = 200
_CURL: Final = ("curl", "-sS", "--max-time", "10")
_CODE: Final = ("-w", "\n%{http_code}")
"""Printed behind the body: the status of the answer."""

Entry = dict[str, Any]
Stats = dict[str, int]


class Call(NamedTuple):
    """What curl said of a request of `pod`; `seen` are the log lines of each node before it."""

    pod: str
    exit_code: int
    status: int
    body: str
    seen: Mapping[str, int]

    @property
    def answered(self) -> bool:
        return self.exit_code == 0 and self.status == _OK

    @property
    def refused(self) -> bool:
        return self.exit_code in CURL_REFUSALS


class Step(NamedTuple):
    """A step by the name that the exercise's text gives it, and what is done in it."""

    title: str
    do: Callable[[], None]


class Done(NamedTuple):
    """A step, and what was claimed of it."""

    title: str
    claims: tuple[Claim, ...]


class Exercise(abc.ABC):
    """An exercise in a lab that is up as `described`."""

    LAB: ClassVar[str]
    """Name of the lab, and of the folder with the manifests."""

    def __init__(
        self, lab: Lab, show: Callable[[str], None], patience: float = LIVE_SECONDS
    ) -> None:
        """`patience` is in seconds: how long an effect may take before a claim fails."""
        self._lab = lab
        self._claims = Claims(show)
        self._patience = patience

    @classmethod
    def described(cls) -> LabSpec:
        """Return the lab as it is before the first step."""
        return load_exercise(cls.LAB)

    @abc.abstractmethod
    def steps(self) -> tuple[Step, ...]:
        """Return the steps, in their order: each builds on those before."""

    def run(self) -> list[Done]:
        """Do all steps and return what was claimed in each."""
        done = [self.step(number, step) for number, step in enumerate(self.steps(), start=1)]
        self._claims.summary()
        return done

    def step(self, number: int, step: Step) -> Done:
        """Do one step and return what was claimed of it."""
        before = len(self._claims.made)
        self._claims.heading(f"{number}. {step.title}")
        step.do()
        return Done(step.title, tuple(self._claims.made[before:]))

    # --- what an operator does --------------------------------------------------------------------

    def call(self, pod: str, url: str, until: Callable[[Call], bool] | None = None) -> Call:
        """Call `url` in a pod with curl, again until it is as it should be, or the time is over."""
        namespace, _, name = pod.partition("/")
        self._claims.show(f"  $ nodeagent lab exec {name} -n {namespace} -- curl -sS {url}")
        made: list[Call] = []

        def attempt() -> bool:
            made[:] = [self._call(pod, url)]
            return until is None or until(made[0])

        polled(attempt, self._patience)
        return made[0]

    def _call(self, pod: str, url: str) -> Call:
        seen = {node.name: len(node.access_log()) for node in self._lab.nodes}
        done = self._lab.run(pod, [*_CURL, *_CODE, url])
        body, _, status = done.stdout.rpartition("\n")
        return Call(pod, done.returncode, int(status or 0), body, seen)

    def apply(self, manifest: str, until: Callable[[], bool], said: str, *, name: str = "") -> None:
        """Put a manifest into the configuration, in the place of what `name` held before.

        Claims `said` once it is in force, by `until`.
        """
        target = name or manifest.removesuffix(".yaml")
        folder = importlib.resources.files("nodeagent.lab.steps") / "manifests" / self.LAB
        self._claims.show(f"  $ cp {manifest} {self._lab.layout.config}/{target}.yaml")
        self._lab.apply((folder / manifest).read_text(), target)
        self.claim(said, polled(until, self._patience))

    def withdraw(self, name: str) -> None:
        self._claims.show(f"  $ rm {self._lab.layout.config}/{name}.yaml")
        self._lab.withdraw(name)

    def enrol(self, *pods: str) -> None:
        """Take pods into the capture, and claim that they are once their nodes say so."""
        for pod in pods:
            namespace, _, name = pod.partition("/")
            self._claims.show(f"  $ nodeagent lab enrol {name} -n {namespace}")
            self._lab.enrol(pod)
        named = ", ".join(pods)
        enrolled = polled(
            lambda: all(self.row(pod).get("state") == "Enrolled" for pod in pods), self._patience
        )
        self.claim(f"in the mesh now: {named}", enrolled)

    # --- what became of it ------------------------------------------------------------------------

    def claim(self, text: str, holds: bool) -> None:  # noqa: FBT001 - the second half of every claim
        self._claims.claim(text, holds)

    def identity(self, pod: str) -> str:
        found = self._pod(pod)
        domain = self._lab.state.plan.spec.trust_domain
        return f"spiffe://{domain}/ns/{found.pod.namespace}/sa/{found.pod.service_account}"

    def shown(self, pod: str) -> str:
        """Return the SHA-256 of the certificate that a pod has now, "" while it has none."""
        node = self._lab.node(self._pod(pod).pod.node)
        dump = json.loads(node.get("/config_dump", _ADMIN)[1])["resources"]
        digests = {
            credential["uid"]: credential["chain_sha256"][0]
            for credential in dump.get("credential", ())
        }
        return str(digests.get(self.identity(pod), ""))

    def addresses(self, pod: str) -> tuple[str, ...]:
        return self._pod(pod).addresses

    def _pod(self, pod: str) -> PodPlan:
        return self._lab.pod(pod)

    def logged(
        self, call: Call, destination: str, *, source: str = "", direction: str = "inbound"
    ) -> Entry:
        """Wait for the log line of a connection that `call` has caused; empty if there is none.

        Without a `source` it is the connection of the calling pod itself. The line is that of the
        destination's node, or with `outbound` that of the source's.
        """
        caller, called = self._pod(source or call.pod), self._pod(destination)
        node = called.pod.node if direction == "inbound" else caller.pod.node
        found: list[Entry] = []

        def look() -> bool:
            found[:] = [
                entry
                for entry in self._lab.node(node).access_log()[call.seen[node] :]
                if entry["direction"] == direction
                and host(entry.get("src.addr")) in caller.addresses
                and entry.get("dst.workload") == called.pod.name
                and entry.get("dst.namespace") == called.pod.namespace
            ]
            return bool(found)

        polled(look, self._patience)
        return found[0] if found else {}

    def is_mutual(self, entry: Entry, source: str, destination: str) -> bool:
        """Return whether a line is of mutual TLS between just these two."""
        return (
            entry.get("connection_security_policy") == MUTUAL
            and entry.get("src.identity") == self.identity(source)
            and entry.get("dst.identity") == self.identity(destination)
        )

    def is_plaintext(self, entry: Entry) -> bool:
        """Return whether a line is of plaintext, and names no caller by identity."""
        return entry.get("connection_security_policy") == PLAINTEXT and "src.identity" not in entry

    def opened(self, destination: str, security: str, reporter: str = "destination") -> float:
        """Return how many connections to a pod its node has counted, by their security.

        It is the metric by which a dashboard draws its padlocks.
        """
        found = self._pod(destination).pod
        wanted = {
            "reporter": reporter,
            "destination_workload": found.name,
            "destination_workload_namespace": found.namespace,
            "connection_security_policy": security,
        }
        text = self._lab.node(found.node).metrics()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "istio_tcp_connections_opened_total"
            and wanted.items() <= sample.labels.items()
        )

    def stats(self, pod: str, part: str, until: Callable[[Stats], bool] = bool) -> Stats:
        """Return the statistics of a pod whose names contain `part`, by name, once they are so."""
        found = self._pod(pod)
        url = f"localhost:{_ADMIN}/stats?workload={found.pod.uid}"
        node = self._lab.node(found.pod.node)
        self._claims.show(f"  $ nsenter --net={node.space} curl -sS '{url}' | grep {part}")
        seen: Stats = {}

        def look() -> bool:
            lines = node.run([*_CURL, url]).stdout.splitlines()
            pairs = [line.rpartition(": ") for line in lines if part in line]
            seen.clear()
            seen.update({name: int(value) for name, _, value in pairs})
            return until(seen)

        polled(look, self._patience)
        return seen

    def status(self, node: str) -> dict[str, Any]:
        """Return what `nodeagent status -o json` of a node says; empty while it cannot."""
        try:
            found: dict[str, Any] = json.loads(self._lab.node(node).get("/status", _ADMIN)[1])
        except (OSError, http.client.HTTPException, ValueError):
            return {}
        return found

    def row(self, pod: str) -> dict[str, Any]:
        """Return the pod's part of the status, empty while its tunnel does not know the newest."""
        found = self._pod(pod)
        state = self.status(found.pod.node)
        tunnel = state.get("ztunnel", {})
        if not state or tunnel["acknowledged_version"] != tunnel["wanted_version"]:
            return {}
        return next((row for row in state["pods"] if row["workload"] == found.uid), {})

    def has_mode(self, pod: str, mode: str, policy: str) -> bool:
        """Return whether a pod has this mode now, because of this policy ("namespace/name")."""
        row = self.row(pod)
        return row.get("mode") == mode and row.get("mode_origin", "").startswith(f"{policy} (")

    def have_mode(self, pods: Mapping[str, tuple[str, str]]) -> Callable[[], bool]:
        """Return the condition that each pod has its mode by its policy."""
        return lambda: all(self.has_mode(pod, *wanted) for pod, wanted in pods.items())

    def problems(self, node: str) -> list[dict[str, Any]]:
        """Return the documents that a node refuses."""
        found: list[dict[str, Any]] = self.status(node).get("config", {}).get("problems", [])
        return found

    def warnings(self, node: str) -> list[str]:
        found: list[str] = self.status(node).get("config", {}).get("warnings", [])
        return found

    @property
    def nodes(self) -> list[str]:
        return [node.name for node in self._lab.nodes]
