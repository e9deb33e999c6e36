"""The audit log of two nodes, as it reaches a file, the journal and a syslog receiver."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nodeagent.lab import Lab
from support import rfc5424
from support.audit_lines import heard, journal_fields, listening
from support.e2e import PODS, Mesh, authority, running, spec, spiffe, strict, watched
from support.hbone import Gone, Shown
from support.netns import wait_until

pytestmark = pytest.mark.netns

RATE = 40
"""Lines per second: a flood is soon beyond it."""

FLOOD = 300

TEXT = re.compile(
    r'\S+Z \[\[(?P<node>[^\]]+)\]\] WARN (?:SPIFFE "(?P<identity>[^"]+)"|Unknown Identity) '
    r"(?P<verdict>AUTHORIZED|UNAUTHORIZED) policy=(?P<policy>\S+) "
    r'audit_flag: "(?P<flag>true|false)" event="(?P<event>\w+)" (?P<rest>.*)'
)


LEFT_OUT = re.compile(
    r"\S+ \[\[node-2\]\] WARN ([0-9]+) UNAUTHORIZED lines left out "
    r'event="left_out" cause="rate"'
)


class Said(NamedTuple):
    """One line as each sink has it: the file's text, the journal's fields, syslog's parameters."""

    text: re.Match[str]
    entry: dict[str, list[str]]
    message: dict[str, str]


class Sinks:
    """Where the audit logs of both nodes go. Finds what they say of a connection by its port."""

    def __init__(self, directory: Path, journal: socket.socket, syslog: socket.socket) -> None:
        self.directory = directory
        self.journal = journal
        self.syslog = syslog
        self.journal_datagrams: list[bytes] = []
        self.syslog_datagrams: list[bytes] = []

    def text(self) -> list[str]:
        path = self.directory / "audit.log"
        whole = path.read_text(encoding="ascii") if path.exists() else ""
        return whole[: whole.rfind("\n") + 1].splitlines()

    def collect(self) -> None:
        self.journal_datagrams += heard(self.journal)
        self.syslog_datagrams += heard(self.syslog)

    def of(self, port: int, event: str) -> Said:
        """Wait for the one line of this kind about a connection to `port`."""
        end = f":{port}"

        def said() -> Said | None:
            self.collect()
            lines = [found for found in map(TEXT.fullmatch, self.text()) if found]
            lines = [
                line
                for line in lines
                if line["event"] == event and f'{end}" dst.workload=' in line["rest"]
            ]
            entries = [
                entry
                for entry in map(_entry, self.journal_datagrams)
                if entry["AUDIT_EVENT"] == [event] and entry["AUDIT_DST_ADDR"][0].endswith(end)
            ]
            messages = [
                fields
                for fields in map(_parameters, self.syslog_datagrams)
                if fields["event"] == event and fields["dst.addr"].endswith(end)
            ]
            if not (lines and entries and messages):
                return None
            assert (len(lines), len(entries), len(messages)) == (1, 1, 1)
            return Said(lines[0], entries[0], messages[0])

        found = wait_until(said, f"audit lines ({event}) for port {port}")
        assert found is not None
        return found


def _entry(datagram: bytes) -> dict[str, list[str]]:
    entry: dict[str, list[str]] = {"AUDIT_DST_ADDR": [""]}
    for name, value in journal_fields(datagram):
        if name == "AUDIT_DST_ADDR":
            entry[name] = []
        entry.setdefault(name, []).append(value.decode())
    return entry


def _parameters(datagram: bytes) -> dict[str, str]:
    return {"dst.addr": "", **dict(rfc5424.parse(datagram).elements["audit@32473"])}


@pytest.fixture(scope="module")
def sinks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sinks]:
    directory = tmp_path_factory.mktemp("audit")
    with listening(directory / "journal") as journal, listening(directory / "syslog") as syslog:
        yield Sinks(directory, journal, syslog)


@pytest.fixture(scope="module")
def lab(sinks: Sinks) -> Iterator[Lab]:
    audit = {
        "lines_per_second": RATE,
        "file": str(sinks.directory / "audit.log"),
        "journal": str(sinks.directory / "journal"),
        "syslog": str(sinks.directory / "syslog"),
    }
    with running(spec(settings={"audit": audit}, apps=False)) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


def authorization(mesh: Mesh, name: str, action: str, rule: dict[str, Any]) -> None:
    """Put a policy for `far` in force."""
    mesh.apply(
        {
            "apiVersion": "security.istio.io/v1beta1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {
                "selector": {"matchLabels": {"app": "far"}},
                "action": action,
                "rules": [rule],
            },
        },
        name=name,
    )

    def applied(state: dict[str, Any]) -> bool:
        row = next(each for each in state["pods"] if each["workload"] == PODS["far"])
        return any(name in json.dumps(each) for each in row["authorizations"])

    mesh.settled(mesh.node_of("far"), applied)


@pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
def test_a_caller_that_is_let_in_is_named_while_its_connection_is_open(
    mesh: Mesh, sinks: Sinks, family: int
) -> None:
    near, far, port = mesh.call("client", "far", family)
    mesh.carries(near, far)
    line, entry, message = sinks.of(port, "caller")
    assert (line["node"], line["identity"]) == ("node-2", spiffe("client"))
    assert (line["verdict"], line["policy"], line["flag"]) == (
        "AUTHORIZED",
        "default:allow",
        "false",
    )
    assert entry["MESSAGE"] == [f'SPIFFE "{spiffe("client")}" AUTHORIZED policy=default:allow']
    assert entry["PRIORITY"] == ["6"]
    assert entry["AUDIT_CLIENT"] == ["identity_allowed"]
    assert message["src.workload"] == "client"
    # Standard output has it in the form of the daemon's own logs, which is JSON here.
    printed = mesh.lab.node("node-2").logs("ztunnel").splitlines()
    assert any(
        line.startswith("{") and f':{port}"' in line and " AUTHORIZED policy=" in line
        for line in printed
    )
    assert message["connection_security_policy"] == "mutual_tls"


def test_a_caller_that_is_refused_is_named_with_the_rule(mesh: Mesh, sinks: Sinks) -> None:
    caller = spiffe("client").removeprefix("spiffe://")
    authorization(mesh, "no-client", "DENY", {"from": [{"source": {"principals": [caller]}}]})
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    mesh.refuses("client", mesh.address("far"), port, b"hello")
    line, entry, message = sinks.of(port, "connection")
    assert (line["identity"], line["verdict"], line["policy"]) == (
        spiffe("client"),
        "UNAUTHORIZED",
        "no-client",
    )
    assert entry["PRIORITY"] == ["4"]
    assert entry["AUDIT_POLICY_NAMESPACE"] == ["shop"]
    assert message["rule"].startswith("shop/no-client rules[0] (")
    assert message["reason"] == "policy_denied"
    assert message["client"] == "identity_not_allowed"


def test_plaintext_that_strict_refuses_has_no_identity(mesh: Mesh, sinks: Sinks) -> None:
    mesh.policy("far", strict("far"), mode="STRICT")
    port = mesh.listen("far").getsockname()[1]
    mesh.refuses("outsider", mesh.address("far"), port, b"hello")
    line, entry, message = sinks.of(port, "connection")
    assert (line["identity"], line["verdict"], line["policy"]) == (
        None,
        "UNAUTHORIZED",
        "strict-far",
    )
    assert entry["MESSAGE"] == ["Unknown Identity UNAUTHORIZED policy=strict-far"]
    assert message["reason"] == "strict_requires_mtls"
    assert message["client"] == "without_identity"
    assert message["mode"] == "STRICT"


@pytest.mark.parametrize("why", ["another trust domain", "no certificate", "expired"])
def test_who_is_not_believed_is_unknown(mesh: Mesh, sinks: Sinks, why: str) -> None:
    shown = {
        "another trust domain": lambda: mesh.shown("spiffe://elsewhere.test/ns/shop/sa/twin"),
        "no certificate": lambda: Shown(leaf=None),
        "expired": lambda: mesh.shown(not_before=time.time() - 7200, not_after=time.time() - 3600),
    }
    before = len(sinks.text())
    with pytest.raises(Gone):  # noqa: PT012 - TLS 1.3 tells a client late
        client = mesh.hbone("twin", "far", shown[why]())
        client.status(client.connect(authority(mesh.address("far"), 8080)))
    line = wait_until(
        lambda: next(
            (found for found in map(TEXT.fullmatch, sinks.text()[before:]) if found), None
        ),
        "the file has a line",
    )
    assert line is not None
    assert (line["identity"], line["verdict"], line["event"]) == (None, "UNAUTHORIZED", "handshake")
    assert line["policy"] in {
        "agent:trust_domain_mismatch",
        "agent:certificate_untrusted",
        "agent:certificate_missing",
        "agent:certificate_expired",
    }


def test_what_an_audit_policy_marks_has_the_flag_and_its_rule(mesh: Mesh, sinks: Sinks) -> None:
    """The policy that finds out who still calls in plaintext, layer 7 and all."""
    authorization(
        mesh,
        "who-is-plaintext",
        "AUDIT",
        {
            "from": [{"source": {"notNamespaces": ["shop"]}}],
            "to": [{"operation": {"methods": ["GET"], "paths": ["/*"]}}],
        },
    )
    port = mesh.visit("outsider", "far")
    line, entry, message = sinks.of(port, "connection")
    assert (line["identity"], line["verdict"], line["flag"]) == (None, "AUTHORIZED", "true")
    assert entry["AUDIT_FLAG"] == ["true"]
    assert entry["AUDIT_RULES"][0].startswith("shop/who-is-plaintext rules[0] (")
    assert any("methods" in field for field in entry["AUDIT_WITHOUT"])
    assert message["bytes_recv"] == message["bytes_sent"] == "4"
    # Who has an identity of the namespace is not marked.
    other = mesh.visit("client", "far")
    assert sinks.of(other, "caller")[0]["flag"] == "false"


def test_a_flood_is_counted_and_said(mesh: Mesh, sinks: Sinks) -> None:
    mesh.policy("far", strict("far"), mode="STRICT")
    listener = mesh.listen("far")
    port = listener.getsockname()[1]
    address = mesh.address("far")
    written = len(sinks.text())

    def refused(_: int) -> None:
        mesh.refuses("outsider", address, port, b"hello")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(refused, range(FLOOD)))
    # Who may call gets through as ever, and has its line.
    mesh.visit("client", "far", listener=listener)
    said = wait_until(
        lambda: list(filter(None, map(LEFT_OUT.fullmatch, sinks.text()[written:]))),
        "the file says how many lines were left out",
        30,
    )
    about: list[str] = []
    left_out = 0.0

    def complete() -> bool:
        nonlocal about, left_out
        about = [line for line in sinks.text()[written:] if f':{port}"' in line]
        left_out = mesh.count("far", "ztunnel_audit_left_out_total", sink="all", cause="rate")
        return sum(" UNAUTHORIZED " in line for line in about) + left_out == FLOOD

    wait_until(complete, "each refusal has a line or is counted")
    assert len(about) > 1
    assert any(" AUTHORIZED " in line for line in about)
    assert 1 <= int(said[0][1]) <= left_out


FILLER = b"FILLER=1\n"


def fill(path: Path, keep: contextlib.ExitStack) -> None:
    """Send to a unix socket until the kernel takes nothing more for it, from anybody."""
    while True:
        sender = keep.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sender.setblocking(False)
        sender.connect(str(path))
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sender.send(FILLER)
                sent += 1
        if not sent:
            return


def test_a_journal_that_hangs_holds_up_nobody_and_gets_its_lines_later(
    mesh: Mesh, sinks: Sinks
) -> None:
    def syslog_goes_on() -> float:
        # A datagram socket that nobody reads takes ten messages: of the rest it is not the journal
        # that is the cause.
        sinks.syslog_datagrams += heard(sinks.syslog)
        return mesh.count("far", "ztunnel_audit_sink_up", sink="syslog")

    sinks.collect()
    with contextlib.ExitStack() as keep:
        fill(sinks.directory / "journal", keep)
        port = mesh.visit("client", "far")
        wait_until(lambda: f':{port}"' in "\n".join(sinks.text()), "the file has the line")
        wait_until(
            lambda: not mesh.count("far", "ztunnel_audit_sink_up", sink="journal"),
            "the journal's sink says that it does not get on",
        )
        for _ in range(20):
            mesh.visit("client", "far")
        wait_until(
            lambda: mesh.status("node-2")["ztunnel"]["own"]["audit"]["journal"],
            "nodeagent says what is wrong with the journal",
        )
        assert mesh.count("far", "ztunnel_audit_sink_up", sink="file")
        wait_until(syslog_goes_on, "syslog goes on, read by its receiver")

    def rest() -> bool:
        sinks.journal_datagrams += [each for each in heard(sinks.journal) if each != FILLER]
        return any(b":%d\n" % port in each for each in sinks.journal_datagrams)

    wait_until(rest, "the journal gets the line that waited")
    mesh.counted("far", "ztunnel_audit_sink_up", 1, sink="journal")
    assert not mesh.count("far", "ztunnel_audit_left_out_total", sink="journal")
