"""Shell completion in real shells, and the manual pages as formatters take them."""

from __future__ import annotations

import fcntl
import importlib.util
import itertools
import os
import pty
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from nodeagent.cli import cli
from support.recorded import answering

ROOT = Path(__file__).parents[2]
ANSWERS = ROOT / "tests" / "snapshots" / "cli" / "answers" / "fine"
SECONDS = 60


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory with an agent's socket, and with the program for PATH."""
    program = tmp_path / "nodeagent"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m nodeagent "$@"\n')
    program.chmod(0o755)
    with answering(tmp_path, ANSWERS):
        yield tmp_path


def shell(place: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "HOME": str(place)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def script(place: Path, name: str) -> Path:
    file = place / f"completion.{name}"
    file.write_text(shell(place, "nodeagent", "completion", name))
    return file


LINES = [
    ("nodeagent wor", {"workloads"}),
    ("nodeagent policy e", {"explain"}),
    ("nodeagent status --ru", {"--run-dir"}),
    ("nodeagent workloads --run-dir PLACE default/", {"default/httpbin"}),
    (
        "nodeagent logs --run-dir PLACE --identity spiffe://cluster.local/ns/d",
        {"spiffe://cluster.local/ns/default/sa/httpbin"},
    ),
    ("nodeagent workloads --run-dir /nowhere x", set()),
]


@pytest.mark.parametrize("line,wanted", LINES)
def test_bash_completes(place: Path, line: str, wanted: set[str]) -> None:
    asked = shlex.quote(line.replace("PLACE", str(place)))
    program = (
        f"source {script(place, 'bash')}; COMP_LINE={asked}; COMP_POINT=${{#COMP_LINE}}; "
        '_nodeagent_completion nodeagent; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    # bash puts behind the last colon what it is given.
    behind = {each.rpartition(":")[2] for each in wanted}
    assert set(shell(place, "bash", "--norc", "-c", program).split()) == behind


@pytest.mark.parametrize(
    "typed,rest",
    [
        ("logs --run-dir . --identity spiffe:", "//cluster.local/ns/"),
        ("certs --run-dir . spiffe://cluster.local/ns/d", "efault/sa/httpbin "),
        ("logs --run-dir . --identity=spiffe://cluster.local/ns/d", "efault/sa/httpbin "),
        ("connections --run-dir . --pod=de", "fault/httpbin "),
        ("logs --run-dir . --workload de", "fault/httpbin "),
        ("status --settings ./settings-of-th", "is.yaml "),
        ("graph --padlock no-", "data "),
    ],
)
def test_what_is_typed_in_bash_is_completed(place: Path, typed: str, rest: str) -> None:
    (place / "settings-of-this.yaml").touch()
    (place / "rc").write_text(
        f"source {script(place, 'bash')}\nbind 'set bell-style none'\nPS1='ready '\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "TERM": "xterm"}
        os.execvpe("bash", ["bash", "--noprofile", "--rcfile", "rc", "-i"], environment)  # noqa: S606 - what is tested
    try:
        # Wider than any of the lines: bash would draw them in pieces.
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        read_until(terminal, "ready ")
        os.write(terminal, f"nodeagent {typed}\t".encode())
        read_until(terminal, f"nodeagent {typed}{rest}")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)


def read_until(terminal: int, wanted: str) -> None:
    said = b""
    deadline = time.monotonic() + SECONDS
    while wanted.encode() not in said:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, said
        said += os.read(terminal, 4096)


@pytest.mark.parametrize("line,wanted", LINES)
def test_fish_completes(place: Path, line: str, wanted: set[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("needs fish: make setup")
    asked = shlex.quote(line.replace("PLACE", str(place)))
    program = f"source {script(place, 'fish')}; complete -C {asked}"
    lines = shell(place, "fish", "--no-config", "-c", program).splitlines()
    assert {each.partition("\t")[0] for each in lines} == wanted


def test_zsh_takes_the_script(place: Path) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("needs zsh: make setup")
    # As compinit loads it: the first line names the command, the rest is its function.
    assert script(place, "zsh").read_text().startswith("#compdef nodeagent\n")
    shell(place, "zsh", "-f", "-n", str(script(place, "zsh")))
    # What the function asks, and takes apart by threes: kind, value, description.
    environment = ["env", "_NODEAGENT_COMPLETE=zsh_complete", "COMP_WORDS=nodeagent wor"]
    said = shell(place, *environment, "COMP_CWORD=1", "nodeagent").splitlines()
    assert said[:2] == ["plain", "workloads"]
    assert len(said) == 3


# --- manual pages -------------------------------------------------------------------------------


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_man", ROOT / "man" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    found = generator().pages()
    assert isinstance(found, dict)
    return found


def names(command: click.Command, above: str) -> Iterator[str]:
    yield above
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from names(below, f"{above}-{name}")


def test_every_command_has_its_page(pages: dict[str, str]) -> None:
    assert pages.keys() == {f"{name}.8" for name in [*names(cli, "nodeagent"), "ztunnel"]}


def test_pages_say_what_help_says(pages: dict[str, str]) -> None:
    page = pages["nodeagent-workloads.8"]
    assert "nodeagent\\-workloads \\- What is enrolled" in page
    assert "\\-h, \\-\\-help" in page
    assert "Exit codes: 0 all of them are enrolled" in page
    assert ".BR nodeagent (8)," in page


def test_no_page_has_a_term_without_text_or_two_marks_behind_a_sentence(
    pages: dict[str, str],
) -> None:
    for text in pages.values():
        lines = text.splitlines()
        for term, after in itertools.pairwise(lines):
            assert not (term.startswith((".B ", ".BR ")) and after == ".TP")
        assert "?." not in text
        assert "" not in lines


def test_formatters_have_no_complaint(pages: dict[str, str], tmp_path: Path) -> None:
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    files = sorted(map(str, tmp_path.iterdir()))
    if shutil.which("mandoc") is not None:
        # A page without a date is better than one with the day on which somebody built it.
        done = subprocess.run(
            ["mandoc", "-T", "lint", "-W", "warning", *files],
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        said = [line for line in done.stdout.splitlines() if "missing date" not in line]
        assert said == []
    elif shutil.which("man") is None:
        pytest.skip("needs mandoc or man: make setup")
    if shutil.which("man") is not None:
        for file in files:
            command = ["man", "--warnings=w", "-E", "UTF-8", "-Tutf8", "-Z", "-l", file]
            said_by_man = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=SECONDS
            ).stderr
            assert said_by_man == ""


def test_no_text_is_an_instruction() -> None:
    roff = generator()._roff
    assert roff(".so /etc/passwd") == "\\&.so /etc/passwd"
    assert roff("'br") == "\\&'br"
    assert roff("a\\fBb") == "a\\efBb"
