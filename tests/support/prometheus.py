"""Debian's own Prometheus and promtool, unpacked by `make peers` and never installed.

Owns where they are and how they are run. Its paths are below the repository's `build`.
"""

from __future__ import annotations

import contextlib
import http
import json
import socket
import subprocess
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import yaml

from nodeagent.lab import Lab, namespaces, processes
from nodeagent.lab.launch import Place
from support.netns import wait_until

ROOT: Final = Path(__file__).parents[2]
PROGRAMS: Final = ROOT / "build" / "peers" / "prometheus" / "usr" / "bin"
DEPLOY: Final = ROOT / "deploy"

_SECONDS: Final = 240
"""For one run of promtool, which takes one or two: less than a test's own limit."""


def program(name: str) -> Path:
    """Return where `prometheus` or `promtool` is; say how to get it otherwise."""
    found = PROGRAMS / name
    assert found.exists(), f"{found.relative_to(ROOT)} is missing: make peers"
    return found


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool with `text` on its standard input."""
    return subprocess.run(
        [program("promtool"), *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
    )


def check_metrics(text: str) -> None:
    """Assert that promtool finds nothing to say about an exposition."""
    found = promtool("check", "metrics", text=text)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


# --- a server ------------------------------------------------------------------------------------

LISTEN: Final = 9090
SCRAPE: Final = "2s"
"""Which is the time that a scrape has, too: daemons under a sanitizer take theirs."""


class Target(NamedTuple):
    """What is scraped: a daemon's port on the loopback of a lab's node."""

    job: str
    node: str
    port: int


TARGETS: Final = tuple(
    Target(job, node, port)
    for node in ("node-1", "node-2")
    for job, port in (("nodeagent", 15000), ("ztunnel", 15020))
)


class Server:
    """Prometheus in the namespace of a lab's first node, and relays to the others' loopback."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._node = lab.node(TARGETS[0].node)
        self._relays: list[_Relay] = []

    @classmethod
    @contextlib.contextmanager
    def start(cls, lab: Lab, directory: Path, rules: str) -> Iterator[Self]:
        """Run one that scrapes TARGETS all the time and evaluates `rules` (a rule file's text)."""
        server = cls(lab)
        config = directory / "prometheus.yml"
        (directory / "alerts.yml").write_text(rules)
        process: subprocess.Popen[bytes] | None = None
        try:
            config.write_text(yaml.safe_dump(server._config()))
            command = (
                str(program("prometheus")),
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{LISTEN}",
                "--enable-feature=exemplar-storage",
                "--log.level=warn",
            )
            with (directory / "log").open("wb") as log:
                process = subprocess.Popen(
                    processes.launch_argv(Place(str(server._node.space)), command),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=processes.environment(),
                )
            wait_until(server._ready, "Prometheus is ready")
            yield server
        except BaseException:
            print((directory / "log").read_text())  # noqa: T201 - pytest shows it
            raise
        finally:
            if process is not None:
                process.terminate()
                process.wait(_SECONDS)
            for relay in server._relays:
                relay.close()

    def _config(self) -> dict[str, Any]:
        jobs: dict[str, list[dict[str, Any]]] = {}
        for target in TARGETS:
            port = target.port
            if target.node != self._node.name:
                relay = _Relay(self._node.space, self._lab.node(target.node).space, target.port)
                self._relays.append(relay)
                port = relay.port
            jobs.setdefault(target.job, []).append(
                {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": target.node}}
            )
        return {
            "global": {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [
                {"job_name": job, "static_configs": targets} for job, targets in jobs.items()
            ],
        }

    def _ready(self) -> bool:
        try:
            return self._node.get("/-/ready", LISTEN)[0] == http.HTTPStatus.OK
        except OSError:
            return False

    def query(self, query: str) -> list[tuple[dict[str, str], float]]:
        """Return the rows of an instant vector: labels and value."""
        path = f"/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        status, body = self._node.get(path, LISTEN)
        assert status == http.HTTPStatus.OK, body
        rows = json.loads(body)["data"]["result"]
        return [(row["metric"], float(row["value"][1])) for row in rows]

    def api(self, path: str) -> Any:  # noqa: ANN401 - JSON
        status, body = self._node.get(f"/api/v1/{path}", LISTEN)
        assert status == http.HTTPStatus.OK, body
        return json.loads(body)["data"]


class _Relay:
    """A port on the loopback of one namespace that leads to a port on another's."""

    def __init__(self, here: Path, there: Path, port: int) -> None:
        self._there = there
        self._to = port
        self._listener = namespaces.run_in(here, lambda: socket.create_server(("127.0.0.1", 0)))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        # A close alone leaves the thread in accept(2).
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            address = ("127.0.0.1", self._to)
            far = namespaces.run_in(self._there, lambda: socket.create_connection(address))
            with far:
                back = threading.Thread(target=_copy, args=(far, near), daemon=True)
                back.start()
                _copy(near, far)
                back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
