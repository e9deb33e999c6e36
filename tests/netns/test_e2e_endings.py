"""How connections end when one side is long gone: nothing lingers, nothing leaves in the clear."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nodeagent.lab import Lab
from support.e2e import Mesh, running, spec, watched
from support.netns import wait_until

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running(spec()) as made:
        yield made


@pytest.fixture
def mesh(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    with watched(lab, request) as made:
        yield made


@FAMILIES
def test_the_tunnel_learns_of_the_end_after_the_client_has_gone(mesh: Mesh, family: int) -> None:
    """The client's kernel answers for the closed socket: over lo, and so the tunnel hears it."""
    listener = mesh.listen("far")
    port = listener.getsockname()[1]

    def sockets(state: str, side: str) -> str:
        shown = mesh.run("client", "ss", "-taHn", "state", state, f"( {side} = :{port} )")
        return str(shown.stdout).strip()

    sock = mesh.connect("client", mesh.address("far", family), port)
    app, _ = mesh.accept(listener)
    mesh.carries(sock, app)
    sock.close()
    assert app.recv(1) == b""
    wait_until(lambda: sockets("fin-wait-2", "dport"), "the client's end is acknowledged")
    app.close()
    mesh.line("client", "outbound", port)
    wait_until(lambda: not sockets("last-ack", "sport"), "the tunnel's socket is closed")
