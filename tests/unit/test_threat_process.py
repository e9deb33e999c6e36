"""What the daemons do to themselves, and who may ask them over HTTP."""

from __future__ import annotations

import array
import asyncio
import http.client
import resource
import socket
import subprocess
import sys
from types import ModuleType

import pytest

import nodeagent.channel
import ztunnel.channel
from nodeagent.admin import server as agent_server
from ztunnel import protocol
from ztunnel.admin import Asked, Page, Server

HOSTILE_HOSTS = [
    "evil.example",
    "evil.example:15020",
    "127.0.0.1.evil.example",
    "localhost.evil.example:15020",
    "127.0.0.1:15020.evil.example",
    "evil@127.0.0.1",
    "[::1].evil.example",
    "127.1",
    "0.0.0.0",
    "",
]


async def _hello(_asked: Asked) -> Page:
    return Page(200, "text/plain", b"hello\n")


def _status(bound: str, address: str, host: str) -> int:
    """Return the status that ztunnel's server, listening on `bound`, answers on `address`."""

    def ask(port: int) -> int:
        connection = http.client.HTTPConnection(address, port, timeout=30)
        connection.putrequest("GET", "/hello", skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        status = connection.getresponse().status
        connection.close()
        return status

    async def whole() -> int:
        server = Server({"/hello": _hello})
        _, port = await server.start(bound, 0)
        try:
            return await asyncio.to_thread(ask, port)
        finally:
            await server.stop()

    return asyncio.run(whole())


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
def test_a_rebound_name_does_not_reach_loopback(host: str) -> None:
    """DNS rebinding: a browser says the page's own name, which stands for 127.0.0.1 by now."""
    assert _status("127.0.0.1", "127.0.0.1", host) == 421
    assert not agent_server._own_host(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:15020", "localhost", "[::1]:15020"])
def test_loopbacks_own_names_do(host: str) -> None:
    assert _status("127.0.0.1", "127.0.0.1", host) == 200
    assert agent_server._own_host(host)


@pytest.mark.parametrize("bound, address", [("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_where_it_is_called_counts_and_not_where_it_listens(bound: str, address: str) -> None:
    assert _status(bound, address, "evil.example") == 421


# --- descriptors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("daemon", [nodeagent.channel, ztunnel.channel], ids=["agent", "tunnel"])
def test_at_the_descriptor_limit_nothing_is_mistaken_for_anything_else(daemon: ModuleType) -> None:
    """The kernel drops descriptors there without an error, and the next would take their place."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = daemon.Channel(ours)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    rights = array.array("i", [theirs.fileno()] * 4)
    theirs.sendmsg(
        [protocol.encode(protocol.Ack(1), 4)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    )

    async def scene() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            await channel.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    with pytest.raises(protocol.ProtocolError, match="MSG_CTRUNC"):
        asyncio.run(scene())
    channel.close()
    theirs.close()


# --- dumps ----------------------------------------------------------------------------------------

SHOWN = """
import ctypes, os, resource
{}
PR_GET_DUMPABLE = 3
print(ctypes.CDLL(None).prctl(PR_GET_DUMPABLE), resource.getrlimit(resource.RLIMIT_CORE), end=" ")
print(oct(os.umask(0)))
"""


@pytest.mark.parametrize(
    "harden",
    [
        "from nodeagent.process import harden; harden()",
        "from ztunnel.daemon import _harden; _harden()",
    ],
    ids=["nodeagent", "ztunnel"],
)
def test_keys_reach_no_dump_and_no_debugger(harden: str) -> None:
    """An undumpable process is closed to ptrace, /proc/PID/mem and piped core handlers."""
    done = subprocess.run(
        [sys.executable, "-c", SHOWN.format(harden)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 (0, 0) 0o77\n"
