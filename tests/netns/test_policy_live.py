"""Authorization policies on real connections: the product's judgement and core behind HBONE.

A pod's own core calls through the tunnel, on one pooled HBONE connection; the called pod has the
product's whole ztunnel but its control socket, whose changes the tests make themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from support.certificates import workload as leaf
from support.corelab import (
    CLIENT_ID,
    CLIENT_V4,
    POD,
    PORT,
    SERVER_ID,
    SERVER_V4,
    Pair,
    pair,
)
from support.mesh_state import (
    DOMAIN,
    authorization,
    bundle,
    change,
    pod,
    policy,
    ports,
    principals,
    source,
    workload,
)
from support.netns import DEADLINE, wait_until
from ztunnel import _core, tls
from ztunnel.observe.access_log import AccessLog, json_line
from ztunnel.pods import PodSockets
from ztunnel.protocol import Action, Credential, Mode, Removal, Resource
from ztunnel.reasons import Reason
from ztunnel.tunnel import Tunnel

pytestmark = pytest.mark.netns

SLEEP = workload("sleep", CLIENT_V4)
HTTPBIN = workload("httpbin", SERVER_V4)
SLEEPS = principals(CLIENT_ID.removeprefix("spiffe://"))
DENY = authorization("default/no", Action.DENY, source(SLEEPS), workloads=(HTTPBIN.uid,))
GONE = Removal("authorization", DENY.uid)

CHANGES = 30
"""How often the policy goes to and fro while connections come."""

AFTER_EACH = 4
"""Connections begun after each change of the policy, by each caller."""

CALLERS = 3

HITS = 200


class Attempt(NamedTuple):
    """A connection: when it was begun and known, and whether the application answered."""

    begun: float
    known: float
    answered: bool


class Called:
    """The called pod: the product's tunnel on an event loop of its own thread, and an echo."""

    def __init__(self, lab: Pair, log: Path, workers: int) -> None:
        self.lab = lab
        self.path = log
        self._log = AccessLog(str(log), json_line)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._version = 0
        self.core = _core.Core(workers, tls.function_table(_core.FUNCTIONS))
        self.tunnel = Tunnel(self.core, self._log, time.monotonic, time.time)
        self._listener = lab.listen(backlog=1024)
        self._echo = threading.Thread(target=self._answer)

    def start(self) -> None:
        # Its listening sockets are the lab's; the lab's own core lets go of them.
        sockets = PodSockets(*map(os.dup, self.lab.server.pod[1:5]))
        self.lab.server.core.remove_pod(POD)
        now = int(time.time())
        shown = leaf(self.lab.root, SERVER_ID, not_before=now - 60, not_after=now + 3600)
        mesh = (
            SLEEP,
            HTTPBIN,
            policy(HTTPBIN.uid, Mode.STRICT),
            Credential(SERVER_ID, (shown.der,), shown.key_der, now - 60, now + 3600),
            bundle(self.lab.root.der),
        )
        self._log.start()
        self._thread.start()
        self._echo.start()
        self._on_loop(self._start)
        self.apply(*mesh, pod("pod", HTTPBIN.uid, SERVER_V4), given={"pod": sockets}, reset=True)

    async def _start(self) -> None:
        self.tunnel.start(self._loop)

    def _on_loop(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - what `work` returns
        return asyncio.run_coroutine_threadsafe(work(), self._loop).result(DEADLINE)

    def apply(
        self,
        *resources: Resource,
        removals: tuple[Removal, ...] = (),
        given: dict[str, PodSockets] | None = None,
        reset: bool = False,
    ) -> float:
        """Put a change in force; return when it was acknowledged."""
        self._version += 1
        made = change(self._version, *resources, removals=removals, reset=reset)
        assert self._on_loop(lambda: self.tunnel.apply(made, given or {})) == ""
        return time.monotonic()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._converse, args=(sock,), daemon=True).start()

    @staticmethod
    def _converse(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(1):
                sock.sendall(data)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def line(self, reason: str) -> dict[str, Any]:
        """Wait for the first line with this reason."""
        return wait_until(
            lambda: next((line for line in self.lines() if line["reason"] == reason), {}),
            f"a log line of {reason}",
        )

    def stop(self) -> None:
        async def end() -> None:
            self.tunnel.stop()

        self._on_loop(end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._echo.join()
        self._log.stop(DEADLINE)


@contextlib.contextmanager
def up(log: Path, workers: int) -> Iterator[Called]:
    with pair(workers=workers) as lab:
        made = Called(lab, log, workers)
        made.start()
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def called(tmp_path: Path) -> Iterator[Called]:
    with up(tmp_path / "access.log", workers=2) as made:
        yield made


@pytest.fixture
def called_once(tmp_path: Path) -> Iterator[Called]:
    """With one worker, and so one decision table, on each side."""
    with up(tmp_path / "access.log", workers=1) as made:
        yield made


def asks(sock: socket.socket) -> bool:
    """Return whether the application answers; what is refused is reset."""
    try:
        sock.sendall(b"?")
        return sock.recv(1) == b"?"
    except (ConnectionResetError, BrokenPipeError):
        return False


def call(called: Called) -> bool:
    try:
        with called.lab.connect() as sock:
            return asks(sock)
    except ConnectionResetError:
        # The refusal came before the client had learnt that its end was open.
        return False


def test_a_denied_caller_is_refused_and_the_log_names_the_rule(called: Called) -> None:
    assert call(called)
    called.apply(DENY)
    assert not call(called)
    line = called.line("policy_denied")
    assert line["policy"] == "default/no rules[0] (policy.yaml:1)"
    assert line["client"] == "identity_not_allowed"
    assert line["src.identity"] == CLIENT_ID
    # The caller's side was told so, and not that something broke.
    called.lab.client.wait_ended(2)
    assert "denied_by_peer" in called.lab.client.reasons()


def test_an_allow_policy_closes_the_workload_to_others(called: Called) -> None:
    called.apply(authorization("default/only", Action.ALLOW, source(principals("*/sa/other"))))
    assert not call(called)
    assert called.line("policy_denied")["policy"].startswith("default deny: no rule matches of ")
    called.apply(authorization("default/only", Action.ALLOW, source(SLEEPS)))
    assert call(called)
    line = called.line("closed")
    assert line["policy"] == "default/only rules[0] (policy.yaml:1)"
    assert line["client"] == "identity_allowed"


def test_lines_of_good_ends_carry_audit_and_dry_run(called: Called) -> None:
    called.apply(
        authorization("default/audit", Action.AUDIT, source(SLEEPS, unread=("to[0].methods",))),
        msgspec.structs.replace(DENY, dry_run=True),
    )
    assert call(called)
    line = called.line("closed")
    assert line["audit_rules"] == "default/audit rules[0] (policy.yaml:1) without to[0].methods"
    assert line["dry_run"] == "denied by default/no rules[0] (policy.yaml:1)"


def test_what_is_no_longer_allowed_is_cut_and_its_neighbour_is_not(called: Called) -> None:
    sock = called.lab.connect()
    assert asks(sock)
    harmless = authorization("default/other", Action.DENY, source(ports(PORT + 1)))
    called.apply(harmless)
    assert asks(sock)
    called.apply(DENY)
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""
    assert called.line("policy_changed")["policy"] == "default/no rules[0] (policy.yaml:1)"
    assert called.tunnel.recheck.cut == 1
    assert called.tunnel.events.failed[Reason.POLICY_CHANGED] == 1


def test_what_rests_on_a_trust_bundle_ends_with_it(called: Called) -> None:
    sock = called.lab.connect()
    assert asks(sock)
    called.apply(removals=(Removal("trust_bundle", DOMAIN),))
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""
    assert called.line("trust_withdrawn")["src.identity"] == CLIENT_ID
    assert called.tunnel.events.failed[Reason.TRUST_WITHDRAWN] >= 1
    assert not call(called)


def test_a_hit_asks_nobody_whatever_policies_are_in_force(called_once: Called) -> None:
    """Neither side's Python is asked: not about the connection, nor about its certificates."""
    called = called_once
    called.apply(
        authorization("default/only", Action.ALLOW, source(SLEEPS)),
        authorization("default/not", Action.DENY, source(ports(PORT + 1))),
        authorization("default/audit", Action.AUDIT, source(SLEEPS)),
        authorization("istio-system/mesh", Action.DENY, source(principals("*/sa/other"))),
        msgspec.structs.replace(DENY, dry_run=True),
    )
    assert call(called)
    cores = (called.core, called.lab.client.core)
    asked = [core.stats().upcalls for core in cores]
    for _ in range(HITS):
        assert call(called)
    assert [core.stats().upcalls for core in cores] == asked
    # And each is judged and told like the one that was asked about.
    wait_until(lambda: len(called.lines()) == HITS + 1, "a line for each connection")
    (told,) = {
        (line["reason"], line["policy"], line["client"], line["audit_rules"], line["dry_run"])
        for line in called.lines()
    }
    assert told[:3] == ("closed", "default/only rules[0] (policy.yaml:1)", "identity_allowed")
    # What has changed is asked about again.
    called.apply(removals=(Removal("authorization", "AuthorizationPolicy/default/audit"),))
    assert call(called)
    assert called.core.stats().upcalls > asked[0]


def test_no_connection_begun_after_a_change_is_judged_by_the_state_before(called: Called) -> None:
    """Callers race a policy that goes to and fro; each that begins after an acknowledgement
    meets the policy that was acknowledged.
    """
    attempts: list[Attempt] = []
    stop = threading.Event()

    def caller() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            answered = call(called)
            attempts.append(Attempt(begun, time.monotonic(), answered))

    def enough_since(moment: float) -> bool:
        return sum(each.begun > moment for each in list(attempts)) >= AFTER_EACH * CALLERS

    threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
    spans: list[tuple[float, float, bool]] = []
    """From an acknowledgement to the next change, and whether callers were allowed."""
    for thread in threads:
        thread.start()
    try:
        for number in range(CHANGES):
            deny = number % 2 == 0
            acknowledged = called.apply(DENY) if deny else called.apply(removals=(GONE,))
            wait_until(
                functools.partial(enough_since, acknowledged), "callers come after the change"
            )
            spans.append((acknowledged, time.monotonic(), not deny))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for begin, end, allowed in spans:
        inside = [each for each in attempts if begin < each.begun and each.known < end]
        assert len(inside) >= AFTER_EACH
        assert {each.answered for each in inside} == {allowed}
