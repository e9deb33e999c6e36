"""The exercises' programs over real loopback connections."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from nodeagent.lab import processes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def running(module: str, *arguments: str) -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", f"nodeagent.lab.apps.{module}", f"--port={port}", *arguments],
        env=processes.environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 15
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None
                assert time.monotonic() < deadline
        yield port
    finally:
        process.kill()
        process.wait()


def ask(
    port: int, path: str = "/", method: str = "GET", body: bytes = b"", host: str = "127.0.0.1"
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=15)
    try:
        connection.request(method, path, body, {"X-Seen": "yes"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_sentences_puts_a_name_and_an_age_together() -> None:
    with ExitStack() as stack:
        age = stack.enter_context(running("sentences", "--role=age"))
        name = stack.enter_context(running("sentences", "--role=name", "--version=v2"))
        front = stack.enter_context(
            running(
                "sentences", "--role=sentences", f"--age=127.0.0.1:{age}", f"--name=[::1]:{name}"
            )
        )
        assert re.fullmatch(rb"\d{1,2}", ask(age)[1])
        status, body = ask(front)
        assert status == 200
        assert re.fullmatch(
            r"(Athos|Porthos|Aramis|d'Artagnan) is \d{1,2} years\.\n", body.decode()
        )


def test_a_frontend_without_its_services_says_so() -> None:
    nowhere = free_port()
    urls = (f"--age=127.0.0.1:{nowhere}", f"--name=127.0.0.1:{nowhere}")
    with running("sentences", "--role=sentences", *urls) as front:
        status, body = ask(front)
        assert status == 503
        assert b"refused" in body


def test_the_chain_answers_as_json_with_what_its_services_answered() -> None:
    with (
        running("chain", "--name=last", "--message=bye") as last,
        running(
            "chain", "--name=first", "--message=hi", f"--upstream=http://127.0.0.1:{last}"
        ) as first,
    ):
        status, body = ask(first)
        answer = json.loads(body)
        assert status == answer["code"] == 200
        assert (answer["name"], answer["body"], answer["ip_addresses"]) == (
            "first",
            "hi",
            ["127.0.0.1"],
        )
        (call,) = answer["upstream_calls"]
        assert (call["name"], call["body"], call["code"]) == ("last", "bye", 200)


def test_the_chain_names_the_call_that_failed() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with running("chain", "--name=first", "--message=hi", f"--upstream={url}") as first:
        status, body = ask(first)
        (call,) = json.loads(body)["upstream_calls"]
        assert (status, call["uri"], call["code"]) == (500, url, -1)


def test_httpbin_shows_what_arrived() -> None:
    with running("httpbin") as port:
        headers = json.loads(ask(port, "/headers")[1])["headers"]
        assert headers["X-Seen"] == "yes"
        assert headers["Host"] == f"127.0.0.1:{port}"
        assert json.loads(ask(port, "/ip")[1]) == {"origin": "127.0.0.1"}
        assert json.loads(ask(port, "/ip", host="::1")[1]) == {"origin": "::1"}
        shown = json.loads(ask(port, "/anything/x?y=1", "POST", b"data")[1])
        assert (shown["method"], shown["data"]) == ("POST", "data")
        assert len(ask(port, "/bytes/70000")[1]) == 70000


@pytest.mark.parametrize(
    "path,status",
    [("/status/418", 418), ("/status/99", 404), ("/bytes/99999999999", 404), ("/none", 404)],
)
def test_httpbin_answers_with_the_status_asked_for(path: str, status: int) -> None:
    with running("httpbin") as port:
        assert ask(port, path)[0] == status


def test_a_connection_carries_many_requests() -> None:
    with running("httpbin") as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
        for _ in range(3):
            connection.request("POST", "/post", b"x" * 10)
            assert connection.getresponse().read()
        connection.close()


def test_a_body_without_a_believable_length_is_refused() -> None:
    with running("httpbin") as port, socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
