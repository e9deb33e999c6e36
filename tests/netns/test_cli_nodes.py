"""Commands on a node that runs: what they say is what has happened there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nodeagent.lab import Lab
from support.e2e import running, spec
from support.netns import wait_until

STRICT = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: default}
spec: {mtls: {mode: %s}}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec(pods=("client", "near"), apps=False)) as made:
        yield made


def node(lab: Lab) -> Path:
    return Path(lab.layout.directory) / "nodes" / "node-1"


def ask(lab: Lab, *command: str) -> tuple[int, Any]:
    run = [sys.executable, "-m", "nodeagent", *command, "--run-dir", str(node(lab) / "run")]
    done = subprocess.run(
        [*run, "-o", "json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_workloads_and_certificates_are_those_of_the_node(lab: Lab) -> None:
    code, found = ask(lab, "workloads")
    assert code == 0
    states = {each["workload"]: each["state"] for each in found["workloads"]}
    assert states == {"shop/client": "Enrolled", "shop/near": "Enrolled"}
    assert all(each["connections"] == 0 for each in found["workloads"])
    code, found = ask(lab, "certs")
    assert code == 0
    held = {name for each in found["identities"] for name in each["workloads"]}
    assert held == states.keys()
    assert all(len(each["chain"]) == 2 for each in found["identities"])
    assert [each["trust_domain"] for each in found["roots"]] == ["cluster.local"]


def test_what_is_refused_and_what_is_set_is_said_where_it_is_not_in_force(lab: Lab) -> None:
    document = Path(lab.layout.directory) / "mesh.d" / "policy.yaml"
    settings = node(lab) / "settings.yaml"
    assert ask(lab, "config")[0] == 0
    assert ask(lab, "config", "diff")[0] == 0
    document.write_text(STRICT % "STRIKT")
    wait_until(lambda: ask(lab, "config")[0] == 1, "the refusal")
    assert [each["code"] for each in ask(lab, "config")[1]["findings"]] == ["config-refused"]
    document.write_text(STRICT % "STRICT")
    wait_until(lambda: ask(lab, "config")[0] == 0, "the correction")
    # By now the daemon has read another file than there is.
    before = settings.read_text()
    written = {**yaml.safe_load(before), "svid_ttl_seconds": 120}
    settings.write_text(yaml.safe_dump(written))
    try:
        code, found = ask(lab, "config")
        assert code == 1
        (finding,) = found["findings"]
        assert finding["code"] == "settings-not-in-force"
        assert "svid_ttl_seconds is 3600 in force, and 120 in" in finding["text"]
    finally:
        settings.write_text(before)
