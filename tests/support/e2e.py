"""One small mesh with both daemons on two nodes, and what tests ask it.

Owns the lab of the end-to-end tests: which pods there are, sockets inside them, what the daemons
say of a connection, and changes of policy. Promises that sockets and policies of one test end with
it (`Mesh.close`), so that a module's tests may share a lab: every application listens on a port
of its own, by which a test finds its log lines.

    node-1   client (sa client), near (sa near); outsider: the mesh does not know it
    node-2   far (sa far); legacy: known, without an agent; twin: its HBONE is spoken by the test

All in namespace shop, except for outsider, in default. `near` and `far` serve HTTP on port 8000 as
services of these names; what else they serve the tests do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import secrets
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.lab import App, Lab, LabSpec, Node, Pod, Port, Service, namespaces
from nodeagent.lab.builder import remove
from nodeagent.lab.store import Store
from support.certificates import Identity, workload
from support.hbone import Client, Server, Shown
from support.netns import DEADLINE, wait_until

__all__ = [
    "Mesh",
    "authority",
    "in_the_clear",
    "peer_authentication",
    "read_all",
    "reset",
    "running",
    "spec",
    "spiffe",
    "strict",
    "watched",
]

HTTP_PORT: Final = 8000
HBONE_PORT: Final = 15008
HTTP: Final = App(name="http", command=("python", "-m", "nodeagent.lab.apps.httpbin"), ready=8000)
PODS: Final = {
    name: f"{'default' if name == 'outsider' else 'shop'}/{name}"
    for name in ("client", "near", "far", "legacy", "twin", "outsider")
}

_ports = itertools.count(20000)
"""Below the ports that the kernel chooses for clients (net.ipv4.ip_local_port_range)."""

Labels = Mapping[str, str]
Line = dict[str, Any]


def spiffe(name: str, trust_domain: str = "cluster.local") -> str:
    """Return the identity of a pod of namespace shop."""
    return f"spiffe://{trust_domain}/ns/shop/sa/{name}"


def _pod(name: str, node: str, *, apps: tuple[App, ...] = (), **fields: Any) -> Pod:  # noqa: ANN401 - the fields of a pod
    labels = {"app": name, "version": "v1", **fields.pop("labels", {})}
    fields = {"namespace": "shop", "service_account": name, "apps": apps, **fields}
    return Pod(name=name, node=node, labels=labels, **fields)


def spec(
    *,
    settings: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
    resources: Sequence[dict[str, Any]] = (),
    pods: Iterable[str] = PODS,
    apps: bool = True,
) -> LabSpec:
    """Return the lab's description. `arguments` are ztunnel's on node-2."""
    served = (HTTP,) if apps else ()
    all_pods = (
        _pod("client", "node-1"),
        _pod("near", "node-1", apps=served),
        _pod("far", "node-2", apps=served),
        _pod("legacy", "node-2", enrolled=False),
        _pod("twin", "node-2", enrolled=False, labels={"networking.istio.io/tunnel": "http"}),
        _pod("outsider", "node-1", namespace="default", mesh=False),
    )
    wanted = set(pods)
    chosen = tuple(pod for pod in all_pods if pod.name in wanted)
    services = tuple(
        Service(
            name=name,
            namespace="shop",
            ports=(Port(port=HTTP_PORT, name="http"), Port(port=80, target_port=8080, name="raw")),
            selector={"app": name},
        )
        for name in ("client", "near", "far")
        if name in wanted
    )
    nodes = (
        Node(name="node-1", locality="lab/a", settings=dict(settings or {})),
        Node(
            name="node-2",
            locality="lab/b",
            settings=dict(settings or {}),
            ztunnel_arguments=tuple(arguments),
        ),
    )
    return LabSpec(
        name="e2e", nodes=nodes, pods=chosen, services=services, resources=tuple(resources)
    )


def peer_authentication(
    mode: str = "",
    *,
    name: str = "tested",
    namespace: str = "shop",
    app: str = "",
    ports: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if mode:
        found["mtls"] = {"mode": mode}
    if app:
        found["selector"] = {"matchLabels": {"app": app}}
    if ports:
        found["portLevelMtls"] = {str(port): {"mode": each} for port, each in ports.items()}
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": name, "namespace": namespace},
        "spec": found,
    }


def strict(app: str = "") -> dict[str, Any]:
    return peer_authentication("STRICT", app=app, name=f"strict-{app or 'all'}")


@contextlib.contextmanager
def running(described: LabSpec) -> Iterator[Lab]:
    """Build a lab under a directory of its own, and remove both. A failure shows the logs."""
    # Short, because unix sockets lie below it.
    base = Path("/run") / f"lab-test-{secrets.token_hex(4)}"
    try:
        lab = Lab.up(described, base=base)
        try:
            yield lab
        except BaseException:
            show(lab)
            raise
    finally:
        for name in Store.names(base):
            remove(Store(base, name))
    assert not base.exists()


@contextlib.contextmanager
def watched(
    lab: Lab, request: pytest.FixtureRequest, pods: Mapping[str, str] = PODS
) -> Iterator[Mesh]:
    """Give a test its view of a lab that it shares, and show the lab's state if it fails."""
    failed = request.session.testsfailed
    with Mesh(lab, pods) as mesh:
        yield mesh
        if request.session.testsfailed > failed:
            show(lab)


def show(lab: Lab) -> None:
    """Print what the daemons said and what sockets there are; pytest shows it with a failure."""
    for node in lab.nodes:
        for daemon in ("nodeagent", "ztunnel"):
            print(f"--- {node.name}/{daemon}", node.logs(daemon), sep="\n")  # noqa: T201 - pytest shows it
        print("--- access log", *node.access_log()[-10:], sep="\n")  # noqa: T201 - pytest shows it
    for pod in lab.state.plan.pods:
        print(f"--- sockets of {pod.uid}", lab.run(pod.uid, ["ss", "-tnoim"]).stdout, sep="\n")  # noqa: T201 - pytest shows it


def reset(sock: socket.socket) -> None:
    """Close with a RST instead of a FIN (socket(7), SO_LINGER)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def plain(address: str) -> str:
    """Return an address without IPv4-mapping."""
    found = ipaddress.ip_address(address)
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)


def authority(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Mesh:
    """The lab as one test sees it. `pods` are the names that the test calls its pods by."""

    def __init__(self, lab: Lab, pods: Mapping[str, str] = PODS) -> None:
        self.lab = lab
        self._pods = pods
        self._cleanup = contextlib.ExitStack()
        self._nodes = {name: lab.pod(uid).pod.node for name, uid in pods.items() if self._has(uid)}

    def _has(self, uid: str) -> bool:
        return any(pod.uid == uid for pod in self.lab.state.plan.pods)

    def close(self) -> None:
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- sockets in pods --------------------------------------------------------------------------

    def keep(self, sock: socket.socket) -> socket.socket:
        """Close a socket with the test, and bound its waits."""
        sock.settimeout(DEADLINE)
        self._cleanup.callback(sock.close)
        return sock

    def open(self, pod: str, family: int = 4) -> socket.socket:
        kind = socket.AF_INET6 if family == 6 else socket.AF_INET
        return self.keep(namespaces.run_in(self.space(pod), lambda: socket.socket(kind)))

    def listen(self, pod: str, port: int = 0, *, backlog: int = 512) -> socket.socket:
        """Return a listener for both families; without a port on one that no test has had."""
        sock = self.open(pod, 6)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::", port or next(_ports)))
        sock.listen(backlog)
        return sock

    def connect(self, pod: str, address: str, port: int) -> socket.socket:
        sock = self.open(pod, 6 if ":" in address else 4)
        sock.connect((address, port))
        return sock

    def refuses(self, pod: str, address: str, port: int, said: bytes = b"") -> None:
        """Assert that a connection ends by a reset and without a byte, whatever it says."""
        sock = self.open(pod, 6 if ":" in address else 4)
        with pytest.raises(ConnectionResetError):  # noqa: PT012 - at any of these
            sock.connect((address, port))
            sock.sendall(said)
            data = sock.recv(1)
            raise AssertionError(f"closed without a reset, after {data!r}")

    def accept(self, listener: socket.socket) -> tuple[socket.socket, str]:
        """Return the next connection and its peer's address."""
        sock, peer = listener.accept()
        return self.keep(sock), plain(peer[0])

    def call(
        self, client: str, server: str, family: int = 4, *, listener: socket.socket | None = None
    ) -> tuple[socket.socket, socket.socket, int]:
        """Connect two pods; return both applications' sockets and the port."""
        listener = listener or self.listen(server)
        port: int = listener.getsockname()[1]
        sock = self.connect(client, self.address(server, family), port)
        # A listener of the test's own: this connection is the next.
        return sock, self.accept(listener)[0], port

    def carries(self, near: socket.socket, far: socket.socket) -> None:
        """Assert that bytes pass both ways."""
        near.sendall(b"ping")
        assert far.recv(4) == b"ping"
        far.sendall(b"pong")
        assert near.recv(4) == b"pong"

    def visit(
        self, client: str, server: str, family: int = 4, *, listener: socket.socket | None = None
    ) -> int:
        """Connect two pods, let bytes pass both ways, and end; return the port."""
        sock, app, port = self.call(client, server, family, listener=listener)
        self.carries(sock, app)
        sock.close()
        app.close()
        return port

    # --- names and addresses ----------------------------------------------------------------------

    def uid(self, pod: str) -> str:
        return self._pods[pod]

    def space(self, pod: str) -> Path:
        return self.lab.namespace(self._pods[pod])

    def address(self, pod: str, family: int = 4) -> str:
        return next(
            text
            for text in self.lab.addresses(self._pods[pod])
            if ipaddress.ip_address(text).version == family
        )

    def vip(self, service: str, family: int = 4) -> str:
        return next(
            text
            for text in self.lab.virtual_addresses(f"shop/{service}")
            if ipaddress.ip_address(text).version == family
        )

    def run(self, pod: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[Any]:  # noqa: ANN401 - subprocess's own
        """Run a program in a pod as the pod's own, to its end."""
        options.setdefault("timeout", DEADLINE * 2)
        return self.lab.run(self._pods[pod], argv, capabilities=False, **options)

    def popen(self, pod: str, *argv: str, **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - as above
        """Start a program in a pod as the pod's own; it ends with the test."""
        program = self.lab.popen(self._pods[pod], argv, capabilities=False, **options)
        self._cleanup.callback(_end, program)
        return program

    def curl(self, pod: str, url: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run(pod, "curl", "-sS", "--fail", "--max-time", "20", *options, url)

    # --- what the daemons say ---------------------------------------------------------------------

    def node_of(self, pod: str) -> str:
        return self._nodes[pod]

    def lines(self, pod: str, direction: str, port: int = 0, **wanted: str) -> list[Line]:
        """Return the access log's lines of the pod's node for a destination port.

        An empty direction and port 0 stand for all. `wanted` are further fields, the first "_"
        for a ".": `src_workload="client"`.
        """
        fields = {name.replace("_", ".", 1): value for name, value in wanted.items()}
        return [
            line
            for line in self.lab.node(self.node_of(pod)).access_log()
            if direction in ("", line["direction"])
            and (not port or _port(line) == port)
            and all(line.get(name) == value for name, value in fields.items())
        ]

    def line(self, pod: str, direction: str, port: int = 0, **wanted: str) -> Line:
        """Wait for the one line of these fields."""
        what = f"one {direction} line for port {port} with {wanted} on {self.node_of(pod)}"
        try:
            found = wait_until(lambda: self.lines(pod, direction, port, **wanted), what)
        except TimeoutError as error:
            log = self.lab.node(self.node_of(pod)).access_log()
            raise AssertionError(f"{error}; the last are {log[-5:]}") from None
        assert len(found) == 1, found
        return found[0]

    def count(self, pod: str, metric: str, /, **labels: str) -> float:
        """Return the sum of the series of the pod's node that carry these labels."""
        text = self.lab.node(self.node_of(pod)).metrics()
        return sum(
            value for found, value in _samples(text, metric) if labels.items() <= found.items()
        )

    def counted(self, pod: str, metric: str, least: float = 1, /, **labels: str) -> None:
        """Wait until the sum of the series has reached `least`."""
        wait_until(
            lambda: self.count(pod, metric, **labels) >= least, f"{metric}{labels} of {least}"
        )

    def status(self, node: str) -> dict[str, Any]:
        """Return the agent's own account of a node."""
        found: dict[str, Any] = json.loads(self.lab.node(node).get("/status", 15000)[1])
        return found

    def ready(self, node: str, daemon: str = "ztunnel") -> bool:
        port = {"ztunnel": 15021, "nodeagent": 15000}[daemon]
        try:
            return self.lab.node(node).get("/healthz/ready", port)[0] == 200
        except OSError:
            return False

    # --- changes ----------------------------------------------------------------------------------

    def apply(self, *documents: Mapping[str, Any] | str, name: str = "tested") -> Path:
        """Put documents in force until the end of the test; does not wait."""
        if not (self.lab.layout.config / f"{name}.yaml").exists():
            self._cleanup.callback(self._withdraw, name)
        if len(documents) == 1 and isinstance(documents[0], str):
            return self.lab.apply(documents[0], name)
        return self.lab.apply([each for each in documents if not isinstance(each, str)], name)

    def _withdraw(self, name: str) -> None:
        self.lab.withdraw(name)
        for node in self.lab.nodes:
            if self.ready(node.name, "nodeagent"):
                self.settled(node.name, lambda state: name not in json.dumps(state))

    def withdraw(self, name: str = "tested") -> None:
        self.lab.withdraw(name)

    def defer(self, undo: Callable[[], object]) -> None:
        """Call `undo` at the end of the test."""
        self._cleanup.callback(undo)

    def settled(self, node: str, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until a node's state is as `condition` says, and its tunnel has put it in force."""

        def done() -> bool:
            state = self.status(node)
            tunnel = state["ztunnel"]
            return condition(state) and tunnel["acknowledged_version"] == tunnel["wanted_version"]

        wait_until(done, f"the new state is in force on {node}")

    def policy(
        self, pod: str, *documents: Mapping[str, Any], mode: str, name: str = "tested"
    ) -> None:
        """Put PeerAuthentications in force, and wait until the pod has this mode by them."""
        path = self.apply(*documents, name=name)

        def applied(state: dict[str, Any]) -> bool:
            uid = self._pods[pod]
            row = next(each for each in state["pods"] if each["workload"] == uid)
            return row["mode"] == mode and path.name in json.dumps(row)

        self.settled(self.node_of(pod), applied)

    # --- HBONE spoken by the test -----------------------------------------------------------------

    def authority(self) -> tuple[Identity, x509.Certificate]:
        """Return the lab's own intermediate and its root, to sign whatever a test needs."""
        pem = (self.lab.layout.ca / "intermediate.pem").read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        root = x509.load_pem_x509_certificate((self.lab.layout.ca / "root.pem").read_bytes())
        return Identity(x509.load_pem_x509_certificates(pem)[0], key), root

    def shown(self, uri: str = spiffe("twin"), **changes: Any) -> Shown:  # noqa: ANN401 - `workload`'s
        """Return a credential signed by the lab's CA, valid now; `changes` are `workload`'s."""
        issuer, _ = self.authority()
        now = time.time()
        leaf = workload(issuer, uri, **{"not_before": now - 60, "not_after": now + 3600, **changes})
        return Shown(leaf=leaf, chain=[issuer.certificate])

    def hbone(self, pod: str, server: str, shown: Shown | None = None, family: int = 4) -> Client:
        """Speak HBONE from `pod`, which is not captured, to a captured one."""
        sock = self.connect(pod, self.address(server, family), HBONE_PORT)
        return Client(sock, (shown or self.shown()).context())

    def hbone_server(self, listener: socket.socket, shown: Shown | None = None) -> Server:
        """Take the next HBONE connection."""
        return Server(self.accept(listener)[0], (shown or self.shown()).context(server=True))


def in_the_clear(state: dict[str, Any]) -> bool:
    """Return whether a node's state has somebody's traffic in the clear, as DISABLE says."""
    return any("in the clear" in warning for warning in state["config"]["warnings"])


def _port(line: Line) -> int:
    target = line.get("dst.hbone_addr") or line["dst.addr"]
    return int(target.rpartition(":")[2])


def _samples(text: str, metric: str) -> Iterator[tuple[dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == metric:
                yield sample.labels, sample.value


def _end(program: subprocess.Popen[Any]) -> None:
    if program.poll() is None:
        program.send_signal(signal.SIGKILL)
    program.wait()
    for stream in (program.stdin, program.stdout, program.stderr):
        if stream is not None:
            stream.close()


def with_changes(pod: Pod, **changes: Any) -> Pod:  # noqa: ANN401 - the fields of a pod
    """Return a pod's description with other fields."""
    return msgspec.structs.replace(pod, **changes)
