"""HBONE connections that one side wants to end while both have work on them: GOAWAY both ways."""

from __future__ import annotations

import socket

from support import application
from support.envoy import Envoy, issue
from support.interop import OUR_NODE, Interop, spiffe

STREAMS_EACH = 3
"""Requests after which Envoy drains a connection."""


def test_our_client_leaves_a_draining_connection_and_loses_nothing(mesh: Interop) -> None:
    own = issue(mesh.lab, spiffe("stranger"))
    with mesh.envoy("stranger", own, requests=str(STREAMS_EACH)) as stranger:
        held = mesh.call("ours", "stranger", application.ECHO_PORT)
        for number in range(4 * STREAMS_EACH):
            sock = mesh.call("ours", "stranger", application.ECHO_PORT)
            sock.sendall(bytes([number]))
            assert sock.recv(1) == bytes([number])
            sock.close()
            # A stream that lives through its connection's GOAWAY is not disturbed.
            held.sendall(b"still here")
            assert held.recv(10, socket.MSG_WAITALL) == b"still here"
        stats = stranger.stats()
        assert stats["http.inbound.downstream_cx_max_requests_reached"] > 0
        assert stats["http.inbound.downstream_cx_total"] > 1
        assert stats["http.inbound.downstream_rq_total"] == 1 + 4 * STREAMS_EACH
        held.close()
        mesh.until(
            lambda: len(mesh.lines(direction="outbound", reason="closed")) == 1 + 4 * STREAMS_EACH,
            "every connection has ended as its client wished",
        )


def test_envoy_finds_our_restarted_tunnel(mesh: Interop, envoy: Envoy) -> None:
    held = mesh.call("envoy", "ours", application.ECHO_PORT)
    held.sendall(b"x")
    assert held.recv(1) == b"x"
    before = envoy.stats()
    mesh.lab.node(OUR_NODE).restart("ztunnel")
    done = mesh.curl("envoy", "--data", "again", mesh.url("ours"))
    assert (done.returncode, done.stdout) == (0, "again"), done.stderr
    # Envoy was told (GOAWAY): it did not have to find a connection dead.
    told = "cluster.hbone.upstream_cx_close_notify"
    assert envoy.count(told) > before.get(told, 0)
