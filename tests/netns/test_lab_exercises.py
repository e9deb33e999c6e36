"""The exercises, step by step: each brings about what its text says, seen by the test itself.

A step's own claims must hold, and be as many as are known of it: one that is lost is no success.
What matters most of each step is then looked at once more, by other means than the exercise's.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nodeagent.lab import Lab
from nodeagent.lab.claims import CURL_REFUSALS
from nodeagent.lab.processes import environment
from nodeagent.lab.steps import EXERCISES, Exercise, MutualTls, Rollout
from support.e2e import running
from support.netns import wait_until

pytestmark = pytest.mark.netns

CLI = [sys.executable, "-c", "from nodeagent.cli import cli; cli(prog_name='nodeagent')", "lab"]


def curl(lab: Lab, pod: str, url: str) -> subprocess.CompletedProcess[str]:
    return lab.run(pod, ["curl", "-sS", "--fail", "--max-time", "20", url])


def last(lab: Lab, pod: str, wanted: dict[str, str] | None = None) -> dict[str, Any]:
    """Wait for a line of a call to `pod` with these fields; return the last one."""
    found = lab.pod(pod).pod
    fields = {"direction": "inbound", "dst.workload": found.name, **(wanted or {})}

    def look() -> dict[str, Any]:
        return next(
            (
                line
                for line in reversed(lab.node(found.node).access_log())
                if all(line.get(name) == value for name, value in fields.items())
            ),
            {},
        )

    return wait_until(look, f"a line of a call to {pod} with {fields}")


# --- istioinaction: after each step ---------------------------------------------------------------

SLEEP, OUTSIDE = "istioinaction/sleep", "default/sleep"
WEB_API = "web-api.istioinaction:8080"


def both_are_answered(lab: Lab) -> None:
    for pod in (SLEEP, OUTSIDE):
        assert curl(lab, pod, "httpbin.default:8000/headers").returncode == 0
    certificate = "spiffe://cluster.local/ns/istioinaction/sa/sleep"
    line = last(lab, "default/httpbin", {"src.identity": certificate})
    assert line["dst.identity"] == "spiffe://cluster.local/ns/default/sa/httpbin"
    line = last(lab, "default/httpbin", {"connection_security_policy": "none"})
    assert "src.identity" not in line


def one_is_locked(lab: Lab) -> None:
    answer = curl(lab, OUTSIDE, WEB_API)
    assert "purchase-history" in answer.stdout
    assert curl(lab, OUTSIDE, "purchase-history.istioinaction:8080").returncode in CURL_REFUSALS
    assert curl(lab, SLEEP, "purchase-history.istioinaction:8080").returncode == 0


def who_calls_is_known(lab: Lab) -> None:
    node = lab.node("node-1")

    def seen() -> dict[str, int]:
        query = "workload=istioinaction%2Fweb-api&format=json&filter=_found%24"
        status, body = node.get(f"/stats?{query}", 15020)
        assert status == 200
        return {stat["name"]: stat["value"] for stat in json.loads(body)["stats"]}

    # The call of the step before is counted with the line of its end.
    last(lab, "istioinaction/web-api", {"connection_security_policy": "none"})
    before = seen()
    assert curl(lab, OUTSIDE, WEB_API).returncode == 0
    after = before | {
        "tls_inspector.tls_not_found": before["tls_inspector.tls_not_found"] + 1,
    }
    wait_until(lambda: seen() == after, "one more connection without TLS")
    text = node.metrics()
    for security in ("none", "mutual_tls"):
        assert any(
            'destination_workload="web-api"' in sample
            and f'connection_security_policy="{security}"' in sample
            and 'reporter="destination"' in sample
            for sample in text.splitlines()
            if sample.startswith("istio_tcp_connections_opened_total")
        )


def plaintext_is_marked(lab: Lab) -> None:
    assert curl(lab, OUTSIDE, WEB_API).returncode == 0
    line = last(lab, "istioinaction/web-api", {"client": "without_identity"})
    assert line["audit_rules"].startswith("istioinaction/audit-web-api-authpolicy rules[0] (")
    assert line["audit_rules"].endswith("audit-auth-policy.yaml:12) without methods, paths")
    assert line["audit_flag"] == "true"
    line = last(lab, "istioinaction/web-api", {"src.workload": "sleep"})
    assert (line["audit_flag"], line.get("audit_rules")) == ("false", None)
    assert line["cert"].endswith(";URI=spiffe://cluster.local/ns/istioinaction/sa/sleep")


def plaintext_is_refused(lab: Lab) -> None:
    assert curl(lab, OUTSIDE, WEB_API).returncode in CURL_REFUSALS
    assert "purchase-history" in curl(lab, SLEEP, WEB_API).stdout
    assert curl(lab, OUTSIDE, "httpbin.default:8000/headers").returncode == 0


# --- sentences: after each step -------------------------------------------------------------------


def told(lab: Lab) -> bool:
    return "years." in curl(lab, "client", "sentences:5000").stdout


def flows(lab: Lab) -> None:
    assert told(lab)


def breaks(lab: Lab) -> None:
    assert not told(lab)
    assert last(lab, "age")["reason"] == "strict_requires_mtls"


def flows_mutually(lab: Lab) -> None:
    assert told(lab)
    line = last(lab, "age", {"connection_security_policy": "mutual_tls"})
    assert line["src.identity"] == "spiffe://cluster.local/ns/default/sa/sentences"


def flows_in_clear_to_one(lab: Lab) -> None:
    assert told(lab)
    line = last(lab, "name-v1", {"client": "without_identity"})
    assert line["policy"].startswith("default/name-v1-disable (")
    assert last(lab, "name-v2")["client"] == "identity_allowed"


Check = Callable[[Lab], None]

AFTER: Final[dict[type[Exercise], dict[str, tuple[int, Check]]]] = {
    Rollout: {
        "First steps": (5, both_are_answered),
        "Introduce strict mTLS one service at a time": (7, one_is_locked),
        "Who's calling with mTLS or Plaintext?": (8, who_calls_is_known),
        "Use AuthorizationPolicy and Access Logging": (7, plaintext_is_marked),
        "Apply strict mTLS": (5, plaintext_is_refused),
    },
    MutualTls: {
        "Deploy the sentences application, without sidecars": (3, flows),
        "peer-auth/strict.yaml": (3, flows),
        "Enable the sidecar for age": (4, breaks),
        "peer-auth/permissive.yaml": (4, flows),
        "Inject sidecars into all services, and strict.yaml again": (7, flows_mutually),
        "dest-rule/name.yaml: no mTLS for v1": (7, flows_in_clear_to_one),
    },
}
"""Of each step how much is claimed, and what the test looks at itself."""


@pytest.mark.parametrize("chosen", AFTER, ids=lambda chosen: chosen.LAB)
def test_each_step_brings_about_what_its_text_says(chosen: type[Exercise]) -> None:
    with running(chosen.described()) as lab:
        exercise = chosen(lab, print)
        steps = exercise.steps()
        assert [step.title for step in steps] == list(AFTER[chosen])
        for number, step in enumerate(steps, start=1):
            done = exercise.step(number, step)
            failed = [claim.text for claim in done.claims if not claim.holds]
            assert not failed, f"{step.title}: {failed}"
            count, check = AFTER[chosen][step.title]
            assert len(done.claims) == count, step.title
            check(lab)


def test_what_does_not_hold_is_said_to_fail() -> None:
    """The last step without those before: two workloads have other policies than it should find."""
    with running(Rollout.described()) as lab:
        exercise = Rollout(lab, print, patience=1.0)
        done = exercise.step(1, exercise.steps()[-1])
    assert [claim.holds for claim in done.claims] == [False, True, True, True, True]


@pytest.fixture
def base() -> Iterator[Path]:
    # Short: unix sockets lie below it.
    path = Path("/run") / f"lab-test-{secrets.token_hex(4)}"
    yield path
    subprocess.run([*CLI, "--base", str(path), "down", "--all"], check=True, env=environment())
    assert not path.exists()


def run(base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "--base", str(base), "exercise", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )


def test_the_command_shows_its_steps_and_leaves_nothing(base: Path) -> None:
    done = run(base, "istioinaction")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    for number, title in enumerate(AFTER[Rollout], start=1):
        assert f"\n{number}. {title}\n" in done.stdout
    assert f"  $ nodeagent lab exec sleep -n default -- curl -sS {WEB_API}\n" in done.stdout
    assert not base.exists()


def test_the_command_as_json_and_the_lab_kept(base: Path) -> None:
    done = run(base, "sentences", "--keep", "-o", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["schema"], found["exercise"]) == (1, "sentences")
    assert [step["title"] for step in found["steps"]] == list(AFTER[MutualTls])
    assert all(claim["holds"] for step in found["steps"] for claim in step["claims"])
    (name,) = [path.name for path in base.iterdir()]
    assert f"nodeagent lab down {name}" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_exercise_removes_its_lab(base: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*CLI, "--base", str(base), "exercise", "sentences"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    ) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if line.startswith("3. "):
                break
        program.send_signal(number)
        program.communicate(timeout=60)
    assert program.returncode not in (0, None)
    assert not base.exists()


def test_all_exercises_are_tested() -> None:
    assert set(EXERCISES.values()) == set(AFTER)
