"""The doctor on real nodes: it names what is broken, its remedy mends it, it leaves no trace."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.lab import Lab, namespaces
from support.e2e import running, spec
from support.netns import DEADLINE, wait_until

CLI = [sys.executable, "-c", "from nodeagent.cli import cli; cli(prog_name='nodeagent')", "doctor"]

OF_THIS_MACHINE = {"NA4006", "NA2006"}
"""Nothing may discipline the clock of the machine, and its limits may be low."""

UNTIL_WELL = 4 * DEADLINE
"""Seconds for a node to recover, looked at again and again: each look takes seconds of its own."""

BLOCKED = "table inet blocked {\n chain in {\n %s\n  tcp dport 15008 drop\n }\n}\n"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(pods=("client", "near", "far"), apps=False)) as made:
        yield made


def doctor(lab: Lab, *options: str, node: str = "node-1") -> subprocess.CompletedProcess[str]:
    settings = lab.layout.directory / "nodes" / node / "settings.yaml"
    command = [*CLI, "--settings", str(settings), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def report(lab: Lab, node: str = "node-1") -> dict[str, Any]:
    """Return the report without what is this machine's."""
    done = doctor(lab, "-o", "json", node=node)
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["healthy"] else 1)
    found["findings"] = [each for each in found["findings"] if each["code"] not in OF_THIS_MACHINE]
    return found


def codes(found: dict[str, Any]) -> list[str]:
    return [each["code"] for each in found["findings"]]


def hidden(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(each["cause"], each["finding"]["code"]) for each in found["hidden"]}


def run_remedy(finding: dict[str, Any], number: int = 0) -> None:
    subprocess.run(shlex.split(finding["commands"][number]), check=True, timeout=20)


@contextlib.contextmanager
def filtered(space: Path, hook: str) -> Iterator[None]:
    """Drop port 15008 by a packet filter in a namespace."""
    enter = ["nsenter", f"--net={space}", "nft"]
    rules = BLOCKED % f"type filter hook {hook} priority 0;"
    subprocess.run([*enter, "-f", "-"], input=rules, text=True, check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run([*enter, "delete", "table", "inet", "blocked"], check=True, timeout=20)


def counted(lab: Lab) -> tuple[float, list[str]]:
    """Return the probes of node-1's ztunnel, and every other counter that a connection moves."""
    text = lab.node("node-1").metrics()
    probes = re.search(r"^ztunnel_capture_probes_total (\S+)$", text, re.MULTILINE)
    assert probes is not None
    moved = re.compile(
        r"^(istio_tcp_|ztunnel_(tls_handshake|connections|pod_refusals|verdicts)).*[^ ] [1-9]"
    )
    return float(probes[1]), [line for line in text.splitlines() if moved.match(line)]


def test_a_healthy_node_is_well_and_nobody_notices_the_look(lab: Lab) -> None:
    before, connections = counted(lab)
    logged = [lab.node(name).access_log() for name in ("node-1", "node-2")]
    found = report(lab)
    assert codes(found) == []
    assert found["hidden"] == []
    assert found["examined"]["pods"] == 2
    assert found["examined"]["probes"] == 4
    assert found["examined"]["peers"] == 2
    assert found["examined"]["daemons"] == 2
    # ztunnel hears of a connection's end after the doctor has: in the next batch of its core.
    wait_until(lambda: counted(lab)[0] >= before + 4, "every probe is counted")
    assert counted(lab) == (before + 4, connections)
    assert [lab.node(name).access_log() for name in ("node-1", "node-2")] == logged


def test_people_get_the_verdict_as_the_last_line_in_80_columns(lab: Lab) -> None:
    done = doctor(lab)
    assert done.stdout.splitlines()[-1].startswith("node-1: ")
    assert "\x1b" not in done.stdout
    assert doctor(lab, "--json").stdout.startswith("{")


def test_the_daemons_own_settings_count(lab: Lab) -> None:
    """Whoever names only the run directory gets no findings about somebody else's directories."""
    directory = lab.layout.node_directory("node-1") / "run"
    command = [*CLI, "--run-dir", str(directory), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(done.stdout)
    assert found["node"] == "node-1"
    assert {each["code"] for each in found["findings"]} <= OF_THIS_MACHINE
    gone = [*CLI, "--run-dir", str(directory / "nowhere")]
    done = subprocess.run(gone, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "name the file with --settings" in done.stderr


def test_a_filter_in_a_pod_is_named_and_its_remedy_opens_the_port(lab: Lab) -> None:
    with filtered(lab.namespace("shop/near"), "input"):
        found = report(lab)
        assert codes(found) == ["NA5003"]
        assert found["findings"][0]["affects"] == ["shop/near"]
        assert hidden(found) == {("NA5003", "NA3008")}
        run_remedy(found["findings"][0])
        assert codes(report(lab)) == []


def test_a_rule_of_iptables_legacy_is_named_and_its_remedy_takes_it_out(lab: Lab) -> None:
    """The kernel has both interfaces side by side, and nft lists its own."""
    rule = "-A INPUT -p tcp -m multiport --dports 80,15005:15010 -j REJECT"
    enter = ["nsenter", f"--net={lab.namespace('shop/near')}", "iptables-legacy", "-w"]
    subprocess.run([*enter, *rule.split()], check=True, timeout=20)
    found = report(lab)
    assert codes(found) == ["NA5003"]
    assert found["findings"][0]["affects"] == ["shop/near"]
    run_remedy(found["findings"][0])
    assert codes(report(lab)) == []


@pytest.mark.parametrize("program", ["iptables-legacy", "iptables-nft"])
def test_a_sidecars_redirect_is_told_and_a_name_servers_is_not(lab: Lab, program: str) -> None:
    enter = ["nsenter", f"--net={lab.namespace('shop/near')}", program, "-w", "-t", "nat"]
    names = "-A OUTPUT -d 127.0.0.11/32 -p tcp --dport 53 -j DNAT --to-destination 127.0.0.11:4053"
    sidecar = "-A PREROUTING -p tcp -j REDIRECT --to-ports 15006"
    try:
        subprocess.run([*enter, *names.split()], check=True, timeout=20)
        assert codes(report(lab)) == []
        subprocess.run([*enter, *sidecar.split()], check=True, timeout=20)
        found = report(lab)
        assert codes(found) == ["NA3006"]
        assert found["findings"][0]["affects"] == ["shop/near"]
    finally:
        subprocess.run([*enter, "-F"], check=True, timeout=20)


def test_a_node_that_does_not_forward_is_the_cause(lab: Lab) -> None:
    sysctl = ["nsenter", f"--net={lab.namespace('node-1')}", "sysctl", "-qw"]
    subprocess.run([*sysctl, "net.ipv4.ip_forward=0"], check=True, timeout=20)
    try:
        found = report(lab)
        assert codes(found) == ["NA5007"]
        assert hidden(found) == {("NA5007", "NA5002")}
    finally:
        subprocess.run([*sysctl, "net.ipv4.ip_forward=1"], check=True, timeout=20)


def test_another_nodes_blocked_port_is_seen_from_here(lab: Lab) -> None:
    """As a NetworkPolicy does it: on the other node, where no rule can be read from here."""
    with filtered(lab.namespace("node-2"), "forward"):
        found = report(lab)
        assert codes(found) == ["NA5002"]
        assert found["findings"][0]["affects"][0] == "node-2"
        assert "shop/far" in found["findings"][0]["text"]
        assert codes(report(lab, "node-2")) == ["NA5003"]
    assert codes(report(lab)) == []


def test_a_program_on_the_tunnels_port_is_named_with_its_process(lab: Lab) -> None:
    lab.enrol("shop/near", enrolled=False)
    wait_until(lambda: "near" not in status(lab), "near has left the mesh")
    with namespaces.run_in(lab.namespace("shop/near"), socket.socket) as taken:
        taken.bind(("0.0.0.0", 15008))
        taken.listen()
        lab.enrol("shop/near")
        # Between two attempts the pod has failed, and is said to.
        found = wait_until(
            lambda: explained(report(lab), "NA3005"), "its enrolment has failed", UNTIL_WELL
        )
        assert codes(found) == ["NA3005"]
        assert f"(process {os.getpid()})" in found["findings"][0]["text"]
        assert ("NA3005", "NA3001") in hidden(found) or ("NA3005", "NA3002") in hidden(found)
    wait_until(lambda: codes(report(lab)) == [], "near is in the mesh again", UNTIL_WELL)


def explained(found: dict[str, Any], code: str) -> dict[str, Any]:
    """Return the report once `code` hides something, and an empty one before."""
    return found if any(cause == code for cause, _ in hidden(found)) else {}


def status(lab: Lab) -> dict[str, str]:
    body = json.loads(lab.node("node-1").get("/status", 15000)[1])
    return {pod["workload"].partition("/")[2]: pod["state"] for pod in body["pods"]}


def test_rules_taken_away_are_found_by_the_probe(lab: Lab) -> None:
    """The agent would put them back: it stands still meanwhile, and the look goes on without it."""
    agent = lab.node("node-1")
    agent.kill("nodeagent", signal.SIGKILL)
    wait_until(lambda: not agent.process("nodeagent").alive(), "nodeagent is gone")
    enter = ["nsenter", f"--net={lab.namespace('shop/near')}", "ip"]
    subprocess.run([*enter, "rule", "del", "pref", "101"], check=True, timeout=20)
    found = report(lab)
    assert codes(found) == ["NA2001", "NA3004"]
    assert found["findings"][1]["affects"] == ["shop/near"]
    assert "IPv4" in found["findings"][1]["text"]
    assert "IPv6" not in found["findings"][1]["text"]
    agent.restart("nodeagent")
    wait_until(lambda: codes(report(lab)) == [], "the new agent has put it right", UNTIL_WELL)


def test_a_missing_guard_is_told_while_nobody_puts_it_back(lab: Lab) -> None:
    """Both daemons stand still, as in a debugger: each is named, with what lets it go on."""
    node = lab.node("node-1")
    enter = ["nsenter", f"--net={lab.namespace('shop/near')}", "tc"]
    node.kill("nodeagent", signal.SIGSTOP)
    node.kill("ztunnel", signal.SIGSTOP)
    try:
        subprocess.run([*enter, "qdisc", "del", "dev", "eth0", "clsact"], check=True, timeout=20)
        found = report(lab)
        assert codes(found) == ["NA2001", "NA2003", "NA3002"]
        assert "eth0 (egress), eth0 (ingress)" in found["findings"][2]["text"]
        assert ("NA2003", "NA3007") in hidden(found)
        for each in found["findings"][:2]:
            run_remedy(each)
    finally:
        node.kill("nodeagent", signal.SIGCONT)
        node.kill("ztunnel", signal.SIGCONT)
    wait_until(lambda: codes(report(lab)) == [], "both go on", UNTIL_WELL)


def test_a_removed_socket_is_told_before_a_tunnel_needs_it(lab: Lab) -> None:
    socket_file = lab.layout.node_directory("node-1") / "run" / "ztunnel.sock"
    kept = socket_file.with_suffix(".kept")
    socket_file.rename(kept)
    try:
        assert codes(report(lab)) == ["NA2007"]
    finally:
        kept.rename(socket_file)


def test_a_dead_tunnel_explains_silent_pods(lab: Lab) -> None:
    node = lab.node("node-1")
    node.kill("ztunnel")
    wait_until(lambda: not node.process("ztunnel").alive(), "ztunnel is gone")
    wait_until(lambda: not json.loads(node.get("/status", 15000)[1])["ztunnel"]["connected"], "so")
    found = report(lab)
    assert codes(found) == ["NA2002"]
    assert ("NA2002", "NA3007") in hidden(found)
    node.restart("ztunnel")
    wait_until(lambda: codes(report(lab)) == [], "the new tunnel serves", UNTIL_WELL)


def test_without_daemons_it_still_says_what_is_wrong(lab: Lab) -> None:
    node = lab.node("node-2")
    both = ("nodeagent", "ztunnel")
    for daemon in both:
        node.kill(daemon)
    wait_until(lambda: not any(node.process(each).alive() for each in both), "both are gone")
    found = report(lab, "node-2")
    assert codes(found) == ["NA2001", "NA2002"]
    assert found["examined"]["pods"] == 1
    node.restart("nodeagent", wait=False)
    node.restart("ztunnel")
    wait_until(lambda: codes(report(lab, "node-2")) == [], "both are back", UNTIL_WELL)


def test_who_is_not_root_is_told_so(lab: Lab) -> None:
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *CLI]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "Permission denied" in done.stderr:
        pytest.skip("the interpreter is in a directory of root's")
    assert done.returncode == 3
    assert "run this command as root" in done.stderr
    assert done.stdout == ""
