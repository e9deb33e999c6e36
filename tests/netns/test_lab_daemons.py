"""Labs with both daemons on every node: traffic, faults, the demonstration, and removal."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.lab import Lab, load_exercise, namespaces
from nodeagent.lab.builder import remove
from nodeagent.lab.processes import environment, members
from nodeagent.lab.store import Store
from support.netns import wait_until

CLI = [sys.executable, "-c", "from nodeagent.cli import cli; cli(prog_name='nodeagent')", "lab"]
CLIENT, OUTSIDER = "istioinaction/sleep", "default/sleep"
URL = "http://httpbin.default:8000/headers"


@pytest.fixture
def base() -> Iterator[Path]:
    # Short: unix sockets lie below it.
    path = Path("/run") / f"lab-test-{secrets.token_hex(4)}"
    yield path
    for name in Store.names(path):
        remove(Store(path, name))
    assert not path.exists()


@pytest.fixture
def lab(base: Path) -> Iterator[Lab]:
    with Lab.up(load_exercise("istioinaction"), base=base) as made:
        yield made


def curl(lab: Lab, pod: str, url: str = URL, *options: str) -> subprocess.CompletedProcess[str]:
    return lab.run(pod, ["curl", "-sS", "--fail", "--max-time", "20", *options, url])


def mounts_below(directory: Path) -> list[str]:
    table = Path("/proc/self/mountinfo").read_text()
    return [line for line in table.splitlines() if f" {directory}/" in line]


def inbound(lab: Lab, pod: str) -> list[dict[str, object]]:
    found = lab.pod(pod).pod
    log = lab.node(found.node).access_log()
    return [
        entry
        for entry in log
        if entry["direction"] == "inbound" and entry.get("dst.workload") == found.name
    ]


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_a_call_is_logged_with_both_identities(lab: Lab, family: str) -> None:
    assert curl(lab, CLIENT, URL, family).returncode == 0
    (entry,) = wait_until(lambda: inbound(lab, "httpbin"), "the call is logged")
    assert entry["src.identity"] == "spiffe://cluster.local/ns/istioinaction/sa/sleep"
    assert entry["dst.identity"] == "spiffe://cluster.local/ns/default/sa/httpbin"
    assert entry["connection_security_policy"] == "mutual_tls"


def test_metrics_of_both_daemons_can_be_read(lab: Lab) -> None:
    assert curl(lab, CLIENT).returncode == 0
    node = lab.node("node-2")
    wait_until(
        lambda: "istio_tcp_connections_closed_total" in node.metrics(), "the call is counted"
    )
    assert "# TYPE" in node.metrics("nodeagent")
    assert node.logs("nodeagent")
    assert node.logs("ztunnel")


@pytest.mark.parametrize("daemon", ["nodeagent", "ztunnel"])
def test_a_daemon_is_killed_and_started_again(lab: Lab, daemon: str) -> None:
    node = lab.node("node-2")
    first = node.process(daemon)
    assert node.kill(daemon)
    wait_until(lambda: not first.alive(), "the daemon has ended")
    assert not node.kill(daemon)
    node.restart(daemon)
    assert node.process(daemon) != first
    assert curl(lab, CLIENT).returncode == 0
    # Only the restarted one; the other nodes' processes are the same as before.
    assert node.process(daemon).alive()


def test_an_edit_is_live_and_withdrawn(lab: Lab) -> None:
    strict = {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "strict", "namespace": "default"},
        "spec": {"mtls": {"mode": "STRICT"}},
    }
    assert curl(lab, OUTSIDER).returncode == 0
    lab.apply([strict])
    wait_until(lambda: curl(lab, OUTSIDER).returncode == 56, "STRICT is in force")
    lab.withdraw()
    wait_until(lambda: curl(lab, OUTSIDER).returncode == 0, "PERMISSIVE is in force again")


def test_a_pod_is_released_and_enrolled_again(lab: Lab) -> None:
    def identity() -> object:
        before = len(inbound(lab, "httpbin"))
        if curl(lab, CLIENT).returncode != 0:
            return None
        log = wait_until(lambda: inbound(lab, "httpbin")[before:], "the call is logged")
        return log[-1].get("src.identity", "")

    assert identity()
    lab.enrol(CLIENT, enrolled=False)
    wait_until(lambda: identity() == "", "the pod calls in plaintext")
    lab.enrol(CLIENT)
    wait_until(identity, "the pod calls under its identity")


def test_nothing_stays(base: Path) -> None:
    lab = Lab.up(load_exercise("sentences"), base=base)
    living = {namespaces.inode(path) for path in namespaces.mounted(base)}
    started = list(lab.state.processes.values())
    assert len(started) == 4 + 4
    assert any(lab.layout.bpf.rglob("*"))
    assert lab.down()
    assert members(living) == []
    assert not any(one.alive() for one in started)
    assert mounts_below(base) == []
    assert not base.exists()


def test_two_labs_with_daemons_live_side_by_side(base: Path, lab: Lab) -> None:
    with Lab.up(load_exercise("sentences"), base=base) as other:
        assert curl(other, "client", "http://sentences:5000").returncode == 0
        assert curl(lab, CLIENT).returncode == 0
    assert curl(lab, CLIENT).returncode == 0


@pytest.mark.parametrize("count", [1, 2, 4, 6])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_up_may_die_while_it_starts_daemons(base: Path, count: int, number: signal.Signals) -> None:
    store = Store(base, "sentences")
    with subprocess.Popen(
        [*CLI, "--base", str(base), "up", "sentences"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    ) as program:
        wait_until(
            lambda: store.layout.state.exists() and len(store.load().processes) >= count,
            f"{count} processes",
        )
        program.send_signal(number)
        program.wait(60)
    living = {namespaces.inode(path) for path in namespaces.mounted(base)}
    if number == signal.SIGKILL:
        assert living
    remove(store)
    assert members(living) == []
    assert mounts_below(base) == []
    assert not base.exists()


def demo(base: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, "--base", str(base), "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def test_every_claim_of_the_demonstration_holds(base: Path) -> None:
    with demo(base) as program:
        said, errors = program.communicate(timeout=120)
    assert program.returncode == 0, said + errors
    assert "FAILED" not in said
    lines = said.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
    assert "20 of 20 claims" in lines[-1]
    assert not base.exists()


def test_the_demonstration_as_json(base: Path) -> None:
    with demo(base, "--json") as program:
        said, errors = program.communicate(timeout=120)
    assert program.returncode == 0, errors
    claims = json.loads(said)["claims"]
    assert all(claim["holds"] for claim in claims)


@pytest.mark.parametrize("heading", ["Traffic", "On the wire", "STRICT"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demonstration_removes_everything(
    base: Path, heading: str, number: signal.Signals
) -> None:
    with demo(base) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if line.startswith(heading):
                break
        living = {namespaces.inode(path) for path in namespaces.mounted(base)}
        program.send_signal(number)
        program.communicate(timeout=60)
    assert program.returncode != 0
    assert members(living) == []
    assert mounts_below(base) == []
    assert not base.exists()
