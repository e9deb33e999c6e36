"""The command `nodeagent` as a process: what becomes of an answer that nobody takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NODEAGENT = [sys.executable, "-m", "nodeagent"]
ALLOW = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: shop}
spec: {}
"""


@pytest.fixture
def allow(tmp_path: Path) -> str:
    path = tmp_path / "allow.yaml"
    path.write_text(ALLOW)
    return str(path)


@pytest.mark.parametrize("output", ["text", "json"])
def test_an_answer_that_cannot_be_written(allow: str, output: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*NODEAGENT, "policy", "check", "-o", output, allow],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "Error: the answer cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["status", "--help"]])
def test_help_that_cannot_be_written(arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*NODEAGENT, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (
        2,
        "Error: the answer cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("output", ["text", "json"])
def test_an_answer_that_nobody_reads(allow: str, output: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*NODEAGENT, "policy", "check", "-o", output, allow],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_closed_standard_output_leaves_the_exit_code(allow: str, output: str) -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", *NODEAGENT, "policy", "check", "-o", output, allow]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_interrupt_is_no_answer(tmp_path: Path) -> None:
    fifo = tmp_path / "documents.yaml"
    os.mkfifo(fifo)
    command = [*NODEAGENT, "policy", "check", str(fifo)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        # Opens once the command has opened it too, and waits for what is in it.
        fifo.open("wb"),
    ):
        process.send_signal(signal.SIGINT)
        said, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert (said, complaint.strip()) == (b"", b"")
