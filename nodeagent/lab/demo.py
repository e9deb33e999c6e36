"""The demonstration: what it shows is checked, and only what was checked is said.

This module owns the story of `nodeagent lab demo`. It promises that every line under a heading is a
claim with its evidence from this very run (real curl, the tunnels' own logs, a packet capture),
that a claim which does not hold is shown as such, and that nothing of the lab stays. It may not
make anything hold.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from nodeagent.lab import namespaces, pcap
from nodeagent.lab.claims import CURL_REFUSALS, Claim, Claims, chain, host, polled
from nodeagent.lab.lab import Lab
from nodeagent.lab.model import PodPlan
from nodeagent.lab.processes import members
from nodeagent.lab.sniffer import Sniffer, tool
from nodeagent.lab.spec import load_exercise

__all__ = ["Demo"]

EXERCISE: Final = "istioinaction"
HBONE: Final = 15008

CLIENT: Final = "istioinaction/sleep"
OUTSIDER: Final = "default/sleep"
HTTPBIN: Final = "default/httpbin"
HTTPBIN_URL: Final = "http://httpbin.default:8000/headers"
WEB_API_URL: Final = "http://web-api.istioinaction:8080/"

CURL: Final = ("-sS", "--fail", "--max-time", "10")

STRICT: Final = {
    "apiVersion": "security.istio.io/v1",
    "kind": "PeerAuthentication",
    "metadata": {"name": "strict", "namespace": "default"},
    "spec": {"mtls": {"mode": "STRICT"}},
}


class Edge(NamedTuple):
    """An expected call between pods, as the destination's tunnel should have logged it."""

    source: str
    destination: str
    mode: str


MODES: Final = {"mutual_tls": "mutual TLS", "none": "plaintext"}

MESH_EDGES: Final = (
    Edge(CLIENT, HTTPBIN, "mutual_tls"),
    Edge(CLIENT, "istioinaction/web-api", "mutual_tls"),
    Edge("istioinaction/web-api", "istioinaction/recommendation", "mutual_tls"),
    Edge("istioinaction/recommendation", "istioinaction/purchase-history", "mutual_tls"),
    Edge(OUTSIDER, HTTPBIN, "none"),
)


class Demo:
    """One run, in a lab of its own."""

    def __init__(self, base: Path, show: Callable[[str], None]) -> None:
        self._base = base
        self._claims = Claims(show)
        self._secret = f"mesh-secret-{secrets.token_hex(8)}"
        self._open = f"open-secret-{secrets.token_hex(8)}"

    def run(self) -> list[Claim]:
        """Run it all and return what was claimed. Raises LabError when it cannot be run."""
        for name in ("curl", "tcpdump"):
            tool(name)
        spec = msgspec.structs.replace(load_exercise(EXERCISE), name=f"demo-{secrets.token_hex(3)}")
        begun = time.monotonic()
        with Lab.up(spec, base=self._base) as lab:
            took = time.monotonic() - begun
            plan = lab.state.plan
            self._claims.show(
                f"Two nodes, {len(plan.pods)} pods, four daemons: ready after {took:.1f} s. "
                "The pods know nothing of a mesh."
            )
            self._traffic(lab)
            self._strict(lab)
            spaces = {namespaces.inode(path) for path in namespaces.mounted(lab.layout.spaces)}
        self._claims.heading("Afterwards")
        self._claims.claim("the lab's directory is gone", not lab.layout.directory.exists())
        mounted = namespaces.mounted(lab.layout.directory)
        self._claims.claim(f"{len(spaces)} namespaces are unmounted", not mounted)
        self._claims.claim("no process is left in them", not members(spaces))
        self._claims.summary()
        return self._claims.made

    # --- traffic and the wire --------------------------------------------------------------------

    def _curl(self, lab: Lab, pod: str, url: str, secret: str, *options: str) -> tuple[int, str]:
        """Return curl's exit code and what it printed."""
        done: subprocess.CompletedProcess[str] = lab.run(
            pod,
            ["curl", *CURL, *options, "-H", f"X-Secret: {secret}", url],
        )
        return done.returncode, done.stdout or done.stderr

    def _traffic(self, lab: Lab) -> None:
        port = lab.node("node-1").plan.port
        pcaps = lab.layout.directory / "demo"
        pcaps.mkdir(mode=0o700)
        wire = Sniffer(lab.namespace("fabric"), port, pcaps / "wire.pcap")
        inside = Sniffer(lab.namespace(CLIENT), "lo", pcaps / "pod.pcap")
        with wire, inside:
            self._claims.heading("Traffic (real curl, plain HTTP, under PERMISSIVE)")
            self._requests(lab)
            self._log(lab)
            polled(lambda: self._open.encode() in wire.look().raw)
            polled(lambda: self._secret.encode() in inside.look().raw)
            self._wire(lab, *wire.stop())
            seen = inside.stop()[0].raw.count(self._secret.encode())
            self._claims.claim(
                f"for contrast: on the pod's own loopback that secret is readable ({seen} times)",
                seen > 0,
            )

    def _requests(self, lab: Lab) -> None:
        for family, option in (("IPv4", "-4"), ("IPv6", "-6")):
            code, body = self._curl(lab, CLIENT, HTTPBIN_URL, self._secret, option)
            self._claims.claim(
                f"{CLIENT} on node-1 → httpbin.default:8000 on node-2, {family}: arrives",
                code == 0 and self._secret in body,
            )
        code, body = self._curl(lab, CLIENT, WEB_API_URL, self._secret)
        names = list(chain(body)) if code == 0 else []
        self._claims.claim(
            f"{CLIENT} → web-api on the same node → recommendation → purchase-history: "
            f"{len(names)} services answer",
            names == ["web-api", "recommendation", "purchase-history"],
        )
        code, body = self._curl(lab, OUTSIDER, HTTPBIN_URL, self._open)
        self._claims.claim(
            f"{OUTSIDER}, outside the mesh → httpbin.default:8000: accepted in plaintext",
            code == 0 and self._open in body,
        )

    def _log(self, lab: Lab) -> None:
        self._claims.heading("Who called whom (the access logs of the destinations' tunnels)")
        polled(lambda: all(self._entry(lab, edge) for edge in MESH_EDGES))
        for edge in MESH_EDGES:
            entry = self._entry(lab, edge)
            source, destination = lab.pod(edge.source).pod, lab.pod(edge.destination).pod
            where = "same node" if source.node == destination.node else "across nodes"
            if entry is None:
                self._claims.claim(f"{edge.source} → {edge.destination} is logged", holds=False)
                continue
            who = entry.get("src.identity") or f"no identity ({host(entry['src.addr'])})"
            whom = entry.get("dst.identity") or edge.destination
            mode = entry["connection_security_policy"]
            said = MODES.get(mode, mode)
            self._claims.claim(f"{who}\n           → {whom}   {said}, {where}", mode == edge.mode)

    def _entry(self, lab: Lab, edge: Edge) -> dict[str, Any] | None:
        """Return the destination's log entry of this call, with both identities as due."""
        source, destination = lab.pod(edge.source), lab.pod(edge.destination)
        trust_domain = lab.state.plan.spec.trust_domain

        def identity(pod: PodPlan) -> str:
            account = pod.pod.service_account
            return f"spiffe://{trust_domain}/ns/{pod.pod.namespace}/sa/{account}"

        wanted = identity(source) if edge.mode == "mutual_tls" else ""
        for entry in lab.node(destination.pod.node).access_log():
            if (
                entry.get("direction") == "inbound"
                and host(entry.get("src.addr")) in source.addresses
                and entry.get("dst.workload") == destination.pod.name
                and (entry.get("src.identity") or "") == wanted
                and (not wanted or entry.get("dst.identity") == identity(destination))
                and not entry.get("error")
            ):
                return entry
        return None

    def _wire(self, lab: Lab, capture: pcap.Capture, dropped: int) -> None:
        self._claims.heading(
            f"On the wire between the nodes (tcpdump: {capture.packets} packets, {dropped} dropped)"
        )
        hbone = [one for one in capture.streams if HBONE in (one.source_port, one.destination_port)]
        walks = [pcap.walk_tls(one.data) for one in hbone]
        records = sum(sum(walk.records.values()) for walk in walks)
        sealed = sum(walk.records.get("application_data", 0) for walk in walks)
        size = sum(len(one.data) for one in hbone)
        whole = dropped == 0 and all(
            walk.accounted == len(one.data) and one.missing == 0
            for one, walk in zip(hbone, walks, strict=True)
        )
        self._claims.claim(
            f"port {HBONE}: {size} bytes in {len(hbone)} streams are {records} TLS records, "
            f"{sealed} of them encrypted data, and nothing else",
            whole and sealed > 0,
        )
        outsider = set(lab.addresses(OUTSIDER))
        others = [one for one in capture.streams if one not in hbone]
        foreign = [one for one in others if not outsider & {one.source, one.destination}]
        self._claims.claim(
            f"the {len(others)} other streams are those of the pod outside the mesh",
            not foreign and bool(others),
        )
        found = _count(capture, self._secret)
        self._claims.claim(
            f"the secret that the mesh carried is in none of them ({found} times)", not found
        )
        found = _count(capture, self._open)
        self._claims.claim(
            f"the secret of the pod outside the mesh is readable there ({found} times)", found > 0
        )

    # --- STRICT ----------------------------------------------------------------------------------

    def _strict(self, lab: Lab) -> None:
        self._claims.heading(
            "STRICT for namespace default (one file in the configuration directory)"
        )
        begun = time.monotonic()
        lab.apply([STRICT], "strict")
        answer: list[tuple[int, str]] = []

        def refused() -> bool:
            answer[:] = [self._curl(lab, OUTSIDER, HTTPBIN_URL, self._open)]
            return answer[0][0] != 0

        held = polled(refused)
        took = time.monotonic() - begun
        code, said = answer[0]
        self._claims.claim(
            f"{OUTSIDER} is refused after {took:.2f} s\n"
            f"           {said.strip() if held else 'no: accepted'}",
            held and code in CURL_REFUSALS,
        )
        code, body = self._curl(lab, CLIENT, HTTPBIN_URL, self._secret)
        self._claims.claim(f"{CLIENT} still arrives", code == 0 and self._secret in body)
        with contextlib.suppress(StopIteration):
            polled(lambda: any(True for _ in self._denials(lab)))
            self._claims.claim(f"the log names the reason: {next(self._denials(lab))}", holds=True)
            return
        self._claims.claim("the log names the reason", holds=False)

    def _denials(self, lab: Lab) -> Iterator[str]:
        outsider = lab.addresses(OUTSIDER)
        for entry in lab.node(lab.pod(HTTPBIN).pod.node).access_log():
            if entry.get("error") and host(entry.get("src.addr")) in outsider:
                yield str(entry["error"])


def _count(capture: pcap.Capture, secret: str) -> int:
    """Return how often a text is in a capture, split over packets or not."""
    wanted = secret.encode()
    return max(capture.raw.count(wanted), sum(one.data.count(wanted) for one in capture.streams))
