"""The lab of the interop tests: our daemons on one node, Envoys in pods of another.

Owns which pods there are, sockets and programs inside them, and what our side says of a connection.
Promises that sockets and documents of one test end with it (`Interop.close`).

    node-1   envoy (an Envoy with an SVID of the lab's CA), stranger (Envoys that are wrong in one
             thing each), probe (HBONE spoken by the test); the mesh takes all three for HBONE peers
    node-2   ours, other: captured by our agent

All in namespace interop, each under a service account of its name. `envoy`, `stranger` and `ours`
run `support/application.py`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.lab import App, Lab, LabSpec, Node, Pod, Port, Service, namespaces
from support import application
from support.certificates import Identity, workload
from support.envoy import FORWARD_PORT, Credential, Envoy
from support.netns import DEADLINE, wait_until

__all__ = ["CLOSED_PORT", "OUR_NODE", "TEMPLATE", "Interop", "Line", "described", "spiffe"]

TEMPLATE: Final = Path(__file__).parents[1] / "interop" / "envoy.yaml"
OUR_NODE: Final = "node-2"
CLOSED_PORT: Final = 9
"""A port of the services on which nothing listens."""
_PORTS: Final = (
    application.SMTP_PORT,
    application.HTTP_PORT,
    application.DIGEST_PORT,
    application.GREET_PORT,
    application.ECHO_PORT,
    CLOSED_PORT,
)

Line = dict[str, Any]


def spiffe(name: str, trust_domain: str = "cluster.local") -> str:
    """Return the identity of a pod."""
    return f"spiffe://{trust_domain}/ns/interop/sa/{name}"


def described() -> LabSpec:
    """Return the lab's description."""
    served = (
        App(
            name="application",
            command=("python", application.__file__),
            ready=application.HTTP_PORT,
        ),
    )
    return LabSpec(
        name="interop",
        nodes=(Node(name="node-1"), Node(name=OUR_NODE)),
        pods=(
            _peer("envoy", served),
            _peer("stranger", served),
            _peer("probe", ()),
            _pod("ours", OUR_NODE, apps=served),
            _pod("other", OUR_NODE),
        ),
        services=tuple(
            Service(
                name=name,
                namespace="interop",
                ports=tuple(Port(port=port) for port in _PORTS),
                selector={"app": name},
            )
            for name in ("envoy", "stranger", "ours")
        ),
    )


def _peer(name: str, apps: tuple[App, ...]) -> Pod:
    spoken = {"ambient.istio.io/redirection": "enabled"}
    return _pod(name, "node-1", apps=apps, enrolled=False, annotations=spoken)


def _pod(name: str, node: str, **fields: Any) -> Pod:  # noqa: ANN401 - the fields of a pod
    return Pod(
        name=name,
        namespace="interop",
        node=node,
        service_account=name,
        labels={"app": name},
        **fields,
    )


class Interop:
    """The lab as one test sees it. Lines of our access log count from its beginning."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self._cleanup = contextlib.ExitStack()
        self._before = len(self._log())

    def close(self) -> None:
        self._cleanup.close()

    # --- pods ------------------------------------------------------------------------------------

    def address(self, pod: str, family: int = 4) -> str:
        return next(
            text for text in self.lab.addresses(pod) if ipaddress.ip_address(text).version == family
        )

    def url(self, pod: str, path: str = "") -> str:
        return f"http://{pod}:{application.HTTP_PORT}/{path}"

    def curl(self, pod: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run curl as the pod's own."""
        argv = ["curl", "-sS", "--fail", "--max-time", "30", *arguments]
        return self.lab.run(pod, argv, capabilities=False, timeout=2 * DEADLINE)

    def connect_status(self, pod: str, server: str, port: int) -> int:
        """Ask for an address of `server` through the pod's Envoy, which passes CONNECT on to `ours`
        whoever is meant; return the answer's status.
        """
        done = self.lab.run(
            pod,
            [
                *("curl", "-s", "--max-time", "30", "-o", "/dev/null", "-w", "%{http_connect}"),
                *("--proxytunnel", "--proxy", f"http://127.0.0.1:{FORWARD_PORT}"),
                f"http://{self.address(server)}:{port}",
            ],
            capabilities=False,
            timeout=2 * DEADLINE,
        )
        return int(done.stdout)

    def space(self, pod: str) -> Path:
        return self.lab.namespace(pod)

    def _keep(self, sock: socket.socket) -> socket.socket:
        sock.settimeout(DEADLINE)
        self._cleanup.callback(sock.close)
        return sock

    def connect(self, pod: str, address: str, port: int) -> socket.socket:
        """Return a socket of the pod's, connected."""
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        space = self.space(pod)
        sock = self._keep(namespaces.run_in(space, lambda: socket.socket(kind)))
        sock.connect((address, port))
        return sock

    def call(self, client: str, server: str, port: int, family: int = 4) -> socket.socket:
        """Connect a pod to an address of another."""
        return self.connect(client, self.address(server, family), port)

    def listen(self, pod: str, port: int) -> socket.socket:
        """Return a listener of the pod's, on IPv4."""
        sock = self._keep(namespaces.run_in(self.space(pod), socket.socket))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", port))
        sock.listen()
        return sock

    def accept(self, listener: socket.socket) -> socket.socket:
        return self._keep(listener.accept()[0])

    # --- certificates ----------------------------------------------------------------------------

    def issuer(self) -> Identity:
        """Return the intermediate of the lab's CA, to sign what the CA itself would not."""
        pem = (self.lab.layout.ca / "intermediate.pem").read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return Identity(x509.load_pem_x509_certificates(pem)[0], key)

    def leaf(self, identity: str, issuer: Identity | None = None, **changes: Any) -> Identity:  # noqa: ANN401 - as above
        """Return a certificate that is valid now; `changes` are those of `workload`."""
        now = time.time()
        valid = {"not_before": now - 60, "not_after": now + 3600}
        return workload(issuer or self.issuer(), identity, **(valid | changes))

    def envoy(
        self, pod: str, own: Credential, **values: str
    ) -> contextlib.AbstractContextManager[Envoy]:
        """Run an Envoy in `pod` that takes `ours` for its counterpart, unless told otherwise."""
        named = {
            "server": spiffe("ours"),
            "client": spiffe("ours"),
            "target": self.address("ours"),
            "requests": "0",
        }
        return Envoy.start(self.lab, pod, TEMPLATE, self.directory, own, **(named | values))

    # --- what our side says ----------------------------------------------------------------------

    def _log(self) -> list[Line]:
        return self.lab.node(OUR_NODE).access_log()

    def lines(self, **wanted: object) -> list[Line]:
        """Return the lines of this test with these fields, "_" for the first "."."""
        fields = {name.replace("_", ".", 1): value for name, value in wanted.items()}
        return [
            line
            for line in self._log()[self._before :]
            if all(line.get(name) == value for name, value in fields.items())
        ]

    def logged(self, **wanted: object) -> Line:
        """Wait for a line with these fields and return it."""
        try:
            return wait_until(lambda: self.lines(**wanted), f"a line with {wanted}")[0]
        except TimeoutError as error:
            raise AssertionError(f"{error}; there are {self.lines()}") from None

    def counted(self, metric: str, **labels: str) -> float:
        """Return the sum of our tunnel's series with these labels."""
        text = self.lab.node(OUR_NODE).metrics()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        )

    # --- changes ---------------------------------------------------------------------------------

    def apply(self, document: dict[str, Any]) -> None:
        """Put a document in force until the end of the test; does not wait."""
        self._cleanup.callback(self.lab.withdraw)
        self.lab.apply([document])

    def until(self, condition: Callable[[], object], what: str) -> None:
        wait_until(condition, what)


@contextlib.contextmanager
def session(lab: Lab, directory: Path) -> Iterator[Interop]:
    """One test's view of the lab."""
    found = Interop(lab, directory)
    try:
        yield found
    finally:
        found.close()
