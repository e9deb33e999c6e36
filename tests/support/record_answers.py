"""Records what a node of a lab answers, for the snapshots of the command line. Needs root.

    PYTHONPATH=tests .venv/bin/python -m support.record_answers

builds the lab `istioinaction`, calls what is let in and what is refused, and writes what node-2's
agent answers into tests/snapshots/cli: `answers/fine` while all is well, `answers/trouble` with a
document that is refused and a pod that is not there; its logs and its files. Set `NOW` of
test_cli_snapshots.py to the moment that is printed, and `make snapshots`.

Only names that this machine has, and paths that differ, are changed in what was said.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

NAME: Final = "recorded"
LAB: Final = Path("/run/nodeagent-lab") / NAME
NODE: Final = LAB / "nodes" / "node-2"
TARGET: Final = Path(__file__).parents[1] / "snapshots" / "cli"

PATHS: Final = (
    "/status",
    "/settings",
    "/certificates",
    "/configuration",
    "/connections",
    "/flows?seconds=3600",
    "/graph?seconds=3600",
    "/report/plaintext?seconds=3600",
    "/asdex?seconds=3600",
)

SECONDS: Final = 30.0
"""For the node to be as it is to be recorded."""

ROLLOUT: Final = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: default}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: istioinaction}
spec:
  selector: {matchLabels: {app: recommendation}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/istioinaction/sa/web-api]}}]
"""

BROKEN: Final = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: typo, namespace: shop}
spec: {mtls: {mode: STRIKT}}
"""

LATE: Final = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: late
  namespace: shop
  annotations: {nodeagent.io/netns: node-2:late}
spec: {address: 10.9.0.9, serviceAccount: late}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: partners, namespace: shop}
spec:
  action: DENY
  rules:
  - from: [{source: {principals: ["set:nobody"]}}]
    to: [{operation: {methods: [GET]}}]
"""

HOLDING: Final = """
import socket, sys
for name, port in (("httpbin.default", 8000), ("purchase-history.istioinaction", 8080)):
    held = socket.create_connection((name, port))
    held.send(b"GET ")
    globals()[name] = held
print("open", flush=True)
sys.stdin.read()
"""


def nodeagent(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "nodeagent", *arguments], check=True)


def in_pod(namespace: str, pod: str, *command: str) -> list[str]:
    run = [sys.executable, "-m", "nodeagent", "lab", "exec", "--lab", NAME, "-n", namespace]
    return [*run, pod, "--", *command]


def call(namespace: str, url: str) -> None:
    """Call from that namespace's `sleep`; a refusal is as good an answer."""
    command = in_pod(namespace, "sleep", "curl", "-s", "-m", "5", "-o", os.devnull, url)
    subprocess.run(command, check=False)


class _Unix(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(NODE / "run" / "admin.sock"))


def ask(path: str) -> bytes:
    connection = _Unix("localhost")
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{path}: {answer.status} {body!r}")
        return body
    finally:
        connection.close()


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come to be")
        time.sleep(0.1)


def record(name: str) -> None:
    folder = TARGET / "answers" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    host = f'"default":"{os.uname().nodename.lower()}"'
    for path in PATHS:
        text = ask(path).decode().replace(f"{NODE}/settings.yaml", "nodeagent.yaml")
        text = text.replace(host, '"default":"worker-1"')
        if path != "/settings":
            # A setting is an absolute path; what was read from there is found by a test's own.
            text = text.replace(f"{LAB}/mesh.d", "mesh.d")
        file = path.partition("?")[0].strip("/").replace("/", "_")
        (folder / f"{file}.json").write_text(json.dumps(json.loads(text), indent=1) + "\n")


def logs() -> None:
    folder = TARGET / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    access = (LAB / "logs" / "node-2.access.json").read_text()
    own = (LAB / "logs" / "node-2.ztunnel.log").read_text().splitlines(keepends=True)
    audit = "".join(line for line in own if '"audit_version"' in line)
    (folder / "access.json").write_text(access.replace(f"{LAB}/mesh.d", "mesh.d"))
    (folder / "audit.json").write_text(audit.replace(f"{LAB}/mesh.d", "mesh.d"))


def main() -> None:
    nodeagent("lab", "up", "istioinaction", "--name", NAME)
    try:
        call("istioinaction", "httpbin.default:8000/headers")
        call("istioinaction", "web-api.istioinaction:8080")
        call("default", "httpbin.default:8000/headers")
        (LAB / "mesh.d" / "rollout.yaml").write_text(ROLLOUT)
        until("rollout.yaml", lambda: b'"STRICT"' in ask("/status"))
        call("default", "httpbin.default:8000/headers")
        call("istioinaction", "recommendation.istioinaction:8080")
        call("istioinaction", "web-api.istioinaction:8080")
        program = in_pod("istioinaction", "sleep", "python3", "-c", HOLDING)
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
            assert held.stdout is not None
            held.stdout.readline()
            until("readiness", lambda: json.loads(ask("/status"))["ready"])
            record("fine")
            logs()
            shutil.rmtree(TARGET / "mesh.d", ignore_errors=True)
            shutil.copytree(LAB / "mesh.d", TARGET / "mesh.d")
            shutil.copy(NODE / "settings.yaml", TARGET / "nodeagent.yaml")
            (LAB / "mesh.d" / "broken.yaml").write_text(BROKEN)
            (LAB / "mesh.d" / "late.yaml").write_text(LATE)
            until("trouble", lambda: b"STRIKT" in ask("/status") and b"late" in ask("/status"))
            record("trouble")
    finally:
        nodeagent("lab", "down", NAME)
    sys.stdout.write(f"recorded until {json.loads(ask_recorded())['time']}\n")


def ask_recorded() -> str:
    return (TARGET / "answers" / "trouble" / "status.json").read_text()


if __name__ == "__main__":
    main()
