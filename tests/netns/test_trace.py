"""`nodeagent trace` with the real bcc and kernel: what happened is told of the right pod."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nodeagent.lab import Lab
from support.e2e import Mesh, running, spec, watched
from support.netns import DEADLINE, wait_until

CLI = [sys.executable, "-c", "from nodeagent.cli import cli; cli(prog_name='nodeagent')", "trace"]

HEADERS: Final = Path(__file__).parents[2] / "build/peers/kernel-headers"
"""Of any kernel: `make peers`."""

SO_BINDTODEVICE: Final = 25


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(pods=("client", "near", "far"), apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


ENVIRONMENT: Final = os.environ | {"BCC_KERNEL_SOURCE": str(HEADERS)}


def command(lab: Lab, *options: str) -> list[str]:
    settings = lab.layout.node_directory("node-1") / "settings.yaml"
    return [*CLI, "--settings", str(settings), "--seconds", "60", "-o", "json", *options]


class Tracing:
    """The command, looking at node-1 until `end`."""

    def __init__(self, lab: Lab, *options: str) -> None:
        self.process = subprocess.Popen(
            command(lab, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert HEADERS.exists(), "kernel headers are missing: make peers"
        said = self._said()
        assert said.startswith("looking at "), said + self.process.communicate()[1]

    def _said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def end(self) -> tuple[int, list[dict[str, Any]], str]:
        """Interrupt it; return exit code, events and the last line."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, [json.loads(line) for line in out.splitlines()], err


def test_a_call_is_told_of_its_pod_with_its_bytes(lab: Lab, mesh: Mesh) -> None:
    listener = mesh.listen("far")
    tracing = Tracing(lab)
    port = mesh.visit("client", "far", listener=listener)
    wait_until(lambda: mesh_closed(lab, port), "the tunnel has let go of it")
    code, events, last = tracing.end()
    (event,) = [each for each in events if each["remote"].endswith(f":{port}")]
    assert code == 0
    assert event["event"] == "connection"
    assert (event["pod"], event["role"]) == ("shop/client", "client")
    assert event["identity"] == "spiffe://cluster.local/ns/shop/sa/client"
    assert event["peer"] == "shop/far"
    assert event["peer_identity"] == "spiffe://cluster.local/ns/shop/sa/far"
    # Four bytes each way, and the end counts one.
    assert 4 <= event["sent"] <= 5
    assert 4 <= event["received"] <= 5
    assert event["seconds"] > 0
    assert "0 flows around the tunnel" in last


def mesh_closed(lab: Lab, port: int) -> bool:
    return any(f":{port}" in str(each) for each in lab.node("node-1").access_log())


def test_what_goes_around_the_tunnel_is_a_finding(lab: Lab, mesh: Mesh) -> None:
    """A pod that has taken its guard away and binds to the device: in plaintext to the other."""
    listener = mesh.listen("far")
    address, port = mesh.address("far"), listener.getsockname()[1]
    tracing = Tracing(lab, "--event", "bypass")
    # The agent would put the guard back: it stands still meanwhile.
    lab.node("node-1").kill("nodeagent", signal.SIGSTOP)
    try:
        enter = ["nsenter", f"--net={lab.namespace('shop/client')}"]
        taken = ["tc", "qdisc", "del", "dev", "eth0", "clsact"]
        subprocess.run([*enter, *taken], check=True, timeout=20)
        sock = mesh.open("client")
        sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, b"eth0\0")
        sock.connect((address, port))
        mesh.carries(sock, mesh.accept(listener)[0])
    finally:
        lab.node("node-1").kill("nodeagent", signal.SIGCONT)
    code, events, last = tracing.end()
    assert code == 1
    (event,) = events
    assert (event["event"], event["pod"], event["new"]) == ("bypass", "shop/client", True)
    assert (event["remote"], event["peer"]) == (f"{address}:{port}", "shop/far")
    assert "1 flow around the tunnel" in last


def test_who_reads_no_more_ends_it(lab: Lab, mesh: Mesh) -> None:
    with Tracing(lab, "--tunnel").process as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()

        def ended() -> bool:
            mesh.visit("client", "far")
            return process.poll() is not None

        wait_until(ended, "it has noticed")
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_an_interrupt_while_it_compiles_ends_it_in_order(lab: Lab) -> None:
    before = programs()
    with subprocess.Popen(
        command(lab), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: "libbcc" in maps.read_text(), "the compiler is loaded")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (0, "")
    assert err.splitlines()[-1].startswith("0 s: 0 connections")
    assert programs() == before


def test_a_program_that_is_gone_leaves_nothing_in_the_kernel(lab: Lab) -> None:
    before = programs()
    tracing = Tracing(lab, "shop/near")
    assert programs() > before
    assert tracing.end()[0] == 0
    wait_until(lambda: programs() == before, "its programs are unloaded")


def programs() -> int:
    """Return how many raw tracepoint programs are loaded, by whoever holds one."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/fdinfo/*"):
        with contextlib.suppress(OSError):
            found += "raw_tracepoint" in path.read_text()
    return found
