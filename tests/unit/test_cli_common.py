"""What all commands share: words, tables, forms, colour, `--since`, `--watch`."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cli.as_yaml import yaml_of
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import (
    Answer,
    Printer,
    Watch,
    answer,
    output_option,
    watch_options,
)
from nodeagent.cli.reach import UnreachableError
from nodeagent.cli.since import since_option
from nodeagent.cli.table import GAP, Cell, Column, Tone, layout
from nodeagent.cli.text import columns_of, duration, many, moment, printable, size

SECONDS = 60
FORMS = ["table", "wide", "json", "yaml"]


@pytest.mark.parametrize(
    "seconds,text",
    [
        (-5, "0s"),
        (59, "59s"),
        (60, "1m"),
        (200, "3m20s"),
        (659, "10m"),
        (15_000, "4h10m"),
        (86_400 * 2 + 3600 * 3, "2d3h"),
        (86_400 * 40, "40d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "count,text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_949, "9.9 kB"),
        (9_960, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (34_000_000, "34 MB"),
        (7e21, "7000000 PB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_counts_and_moments() -> None:
    assert (many(1, "error"), many(2, "error")) == ("1 error", "2 errors")
    assert many(2, "policy", "policies") == "2 policies"
    when = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    assert moment(when, timezone(timedelta(hours=-5))) == "2026-01-01T22:04:05-05:00"
    assert moment(None) == "<none>"


def test_what_would_steer_a_terminal_is_escaped() -> None:
    assert printable("shop/web ä") == "shop/web ä"
    hostile = "a\x1b[2J\nb\r\x07\x9b1m\u202ec\u2028\ud800"
    assert printable(hostile) == r"a\x1b[2J\nb\r\x07\x9b1m\u202ec\u2028\ud800"


def test_letters_from_right_to_left_do_not_reorder_what_stands_behind_them() -> None:
    assert printable("shop/\u05d0\u05d1 8000") == r"shop/\u05d0\u05d1 8000"
    assert printable("\u0627\u0664") == r"\u0627\u0664"


@given(st.text())
def test_nothing_that_is_printed_is_unprintable(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize(
    "text,columns",
    [("web", 3), ("ä", 1), ("a\u0308", 1), ("網站", 4), ("ｗｅｂ", 6), ("🔒", 2), ("", 0)],
)
def test_columns_of_a_terminal(text: str, columns: int) -> None:
    assert columns_of(text) == columns


# --- tables -------------------------------------------------------------------------------------


def table(
    columns: list[Column], rows: list[tuple[Cell | str, ...]], width: int | None
) -> list[str]:
    return ["".join(each.text for each in line) for line in layout(columns, rows, width)]


def test_a_table_aligns_and_says_what_is_not_there() -> None:
    columns = [Column("NAME"), Column("COUNT", right=True), Column("NOTE")]
    rows: list[tuple[Cell | str, ...]] = [("a", "5", ""), (Cell("long-one", Tone.BAD), "1234", "x")]
    assert table(columns, rows, 80) == [
        "NAME      COUNT  NOTE",
        "a             5  <none>",
        "long-one   1234  x",
    ]


def test_a_table_folds_the_widest_column_and_loses_nothing() -> None:
    columns = [Column("WORKLOAD"), Column("IDENTITY"), Column("AGE", folds=False)]
    identity = "spiffe://cluster.local/ns/a-long-namespace/sa/a-long-service-account"
    lines = table(columns, [("shop/web", identity, "3m20s")], 50)
    assert lines == [
        "WORKLOAD  IDENTITY                           AGE",
        "shop/web  spiffe://cluster.local/ns/         3m20s",
        "          a-long-namespace/sa/",
        "          a-long-service-account",
    ]
    assert identity in table(columns, [("shop/web", identity, "3m20s")], None)[1]


def test_a_table_is_not_folded_for_a_few_columns_of_space() -> None:
    columns = [Column("A"), Column("B"), Column("C", right=True)]
    assert table(columns, [("aaaa", "bbbb", "cccc")], 14) == ["A    B       C", "aaaa bbbb cccc"]
    assert table(columns, [("aaaa", "bbbb", "cccc")], 16) == [
        "A     B        C",
        "aaaa  bbbb  cccc",
    ]


def test_wide_characters_and_marks_keep_a_table_in_its_columns() -> None:
    columns = [Column("FILE"), Column("N", right=True)]
    rows: list[tuple[Cell | str, ...]] = [("網站.yaml", "1"), ("cafe\u0301.yaml", "22")]
    assert table(columns, rows, 80) == [
        "FILE        N",
        "網站.yaml   1",
        "cafe\u0301.yaml  22",
    ]
    assert table(columns, [("網" * 10, "1")], 14) == [
        "FILE         N",
        "網網網網網   1",
        "網網網網網",
    ]


@given(
    st.lists(st.lists(st.text(max_size=60), min_size=3, max_size=3), max_size=5),
    st.integers(3 * 8 + 2 * GAP, 120),
)
def test_no_line_of_a_table_is_wider_than_asked(rows: list[list[str]], width: int) -> None:
    columns = [Column("A"), Column("B", right=True), Column("C")]
    lines = table(columns, [tuple(row) for row in rows], width)
    assert all(columns_of(line) <= width for line in lines)
    assert all(line.isprintable() for line in lines)
    whole = "".join("".join(line.split()) for line in lines)
    for row in rows:
        for cell in row:
            # Folded pieces of one column have other columns' in between.
            for character in "".join(printable(cell).split()):
                assert character in whole


def test_a_large_table_ends() -> None:
    # What is quadratic in the rows takes minutes: the timeout of every test is the bound.
    columns = [Column(f"COLUMN{number}") for number in range(9)]
    rows = [tuple(f"cell {number} of row {row}" for number in range(9)) for row in range(15_000)]
    count = sum(1 for _line in layout(columns, rows, 80))
    assert count > len(rows)


# --- answers ------------------------------------------------------------------------------------


def answered(code: ExitCode, text: str = "all is well") -> Answer:
    return Answer({"schema": 1, "text": text}, lambda printer: printer.text(text), code)


@pytest.mark.parametrize("code", [ExitCode.FINE, ExitCode.FINDING])
@pytest.mark.parametrize("form", FORMS)
def test_the_exit_code_does_not_depend_on_the_form(code: ExitCode, form: str) -> None:
    @click.command()
    @output_option()
    def command(output: str) -> None:
        answer(lambda: answered(code), output)

    result = CliRunner().invoke(command, ["-o", form])
    assert result.exit_code == code
    assert result.stderr == ""
    if form in {"json", "yaml"}:
        document = (json.loads if form == "json" else yaml.safe_load)(result.stdout)
        assert document == {"schema": 1, "text": "all is well"}
    else:
        assert result.stdout == "all is well\n"


@pytest.mark.parametrize("form", FORMS)
def test_an_agent_that_is_not_there_is_one_exit_code_in_every_form(form: str) -> None:
    @click.command()
    @output_option()
    def command(output: str) -> None:
        def look() -> Answer:
            raise UnreachableError("no socket", "start it")

        answer(look, output)

    result = CliRunner().invoke(command, ["-o", form])
    assert (result.exit_code, result.stdout) == (ExitCode.UNREACHABLE, "")
    assert result.stderr == "error: no socket\n  do: start it\n"


@pytest.mark.parametrize(
    "environment,terminal,colour",
    [
        ({}, False, False),
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"CLICOLOR": "0"}, True, False),
        ({"TERM": "dumb"}, True, False),
        ({"CLICOLOR_FORCE": "1"}, False, True),
        ({"CLICOLOR_FORCE": "0"}, False, False),
        ({"CLICOLOR_FORCE": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colour_is_used_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], terminal: bool, colour: bool
) -> None:
    for name in ("NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    printer = Printer()
    printer.line("bad", Tone.BAD)
    assert ("\x1b[31m" in printer.done()) == colour


# Numbers for readers of YAML 1.2 (10.3.2), or anything but texts for those of YAML 1.1.
READ_AS_SOMETHING_ELSE = ["1e3", "12E45", "1.5e3", "-1e3", "0o17", "7.", ".5", "5", "0x1f", "no",
                          "Yes", "on", "~", "null", "", "2026-01-01", "12:30:45", "1_000", ".inf",
                          "=", "<<"]  # fmt: skip


@pytest.mark.parametrize("text", READ_AS_SOMETHING_ELSE)
def test_a_text_stays_a_text_in_yaml(text: str) -> None:
    assert yaml_of({"name": text}) == f"name: '{text}'\n"


def test_numbers_and_moments_are_none_in_yaml() -> None:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    document = {"a": 5, "b": 0.5, "c": 1e3, "d": 1e17, "e": True, "f": None, "g": when}
    assert yaml.safe_load(yaml_of(document)) == document
    assert "'" not in yaml_of(document)


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=40), max_size=4))
def test_yaml_is_what_was_written(document: dict[str, str]) -> None:
    assert yaml.safe_load(yaml_of(document)) == document


# --- --since ------------------------------------------------------------------------------------


def since(text: str) -> Any:  # noqa: ANN401 - a datetime or a click error
    found: list[datetime] = []

    @click.command()
    @since_option("24h", "How old")
    def command(since: datetime) -> None:
        found.append(since)

    result = CliRunner().invoke(command, ["--since", text])
    return found[0] if found else result


@pytest.mark.parametrize("text,seconds", [("90s", 90), ("2m", 120), ("1h", 3600), ("1w", 604_800)])
def test_since_takes_an_age(text: str, seconds: int) -> None:
    found = since(text)
    age = (datetime.now(UTC) - found).total_seconds()
    assert seconds <= age < seconds + SECONDS


def test_since_takes_a_moment() -> None:
    found = since("2026-01-02T03:04:05+01:00")
    assert found == datetime(2026, 1, 2, 2, 4, 5, tzinfo=UTC)
    local = datetime(2026, 1, 2, 3, 4, 5).astimezone()
    assert since("2026-01-02T03:04:05") == local


@pytest.mark.parametrize("text", ["6", "0h", "٣h", "yesterday", "1h;ls", "9999-12-31T23:59:59Z"])
def test_since_refuses_what_it_cannot_mean(text: str) -> None:
    result = since(text)
    assert result.exit_code == ExitCode.USAGE
    assert "is no age" in result.stderr or "in the future" in result.stderr


# --- --watch, as a process ----------------------------------------------------------------------

WATCHING = """
import itertools
import click
from nodeagent.cli.ending import ended_well
from nodeagent.cli.output import Answer, answer, output_option, watch_options
from nodeagent.cli.reach import UnreachableError

looks = itertools.count()

@click.command()
@output_option()
@watch_options
def command(output, watch):
    def look():
        number = next(looks)
        if number == 1:
            raise UnreachableError("gone", "start it")
        return Answer({"schema": 1, "look": number}, lambda to: to.line(f"look {number}"))
    answer(look, output, watch)

class Root(click.Group):
    def invoke(self, ctx):
        with ended_well():
            return super().invoke(ctx)

click.group(cls=Root, commands={"look": command})(lambda: None)()
"""


def watching(*arguments: str) -> list[str]:
    return [sys.executable, "-c", WATCHING, "look", "--watch", "--every", "0.1", *arguments]


def read_until(stream: Any, wanted: bytes) -> bytes:  # noqa: ANN401 - a file or a descriptor
    said = b""
    deadline = time.monotonic() + SECONDS
    while wanted not in said:
        assert time.monotonic() < deadline, said
        said += os.read(stream, 4096)
    return said


@pytest.mark.parametrize(
    "form,wanted",
    [
        ("json", b'{"schema":1,"look":3}\n'),
        ("yaml", b"---\nschema: 1\nlook: 3\n"),
        ("table", b"look 3\n"),
    ],
)
def test_watching_into_a_pipe_adds_snapshots_and_an_interrupt_ends_it(
    form: str, wanted: bytes
) -> None:
    with subprocess.Popen(
        watching("-o", form), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        said = read_until(process.stdout.fileno(), wanted)
        process.send_signal(signal.SIGINT)
        more, complaint = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGINT
    # Nothing of the look that failed, but on the other stream.
    assert complaint == b"error: gone; trying again every 0.1 s\n"
    assert b"\x1b" not in said + more
    if form == "json":
        numbers = [json.loads(line)["look"] for line in (said + more).splitlines()]
        assert numbers[:3] == [0, 2, 3]
    if form == "yaml":
        documents = list(yaml.safe_load_all(said + more))
        assert [each["look"] for each in documents][:3] == [0, 2, 3]
    if form == "table":
        assert (said + more).count(b"--- 20") >= 3


def test_watching_on_a_terminal_draws_over_the_last_frame() -> None:
    ours, theirs = pty.openpty()
    # 20 lines of 60 columns.
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    with subprocess.Popen(
        watching(), stdout=theirs, stderr=subprocess.PIPE, env=environment
    ) as process:
        os.close(theirs)
        said = read_until(ours, b"look 3")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    os.close(ours)
    assert process.returncode == 128 + signal.SIGINT
    assert said.count(b"\x1b[H") >= 3
    assert b"Ctrl-C ends" in said


def test_watching_on_a_terminal_without_escape_sequences_adds_snapshots() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(
        watching(), stdout=theirs, stderr=subprocess.PIPE, env=environment
    ) as process:
        os.close(theirs)
        said = read_until(ours, b"look 3")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
    os.close(ours)
    assert b"\x1b" not in said
    assert said.count(b"--- 20") >= 3


def test_watching_what_was_never_there_ends_at_once() -> None:
    script = WATCHING.replace("number == 1", "True")
    command = [sys.executable, "-c", script, "look", "--watch"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (ExitCode.UNREACHABLE, b"")
    assert done.stderr == b"error: gone\n  do: start it\n"


def test_every_is_watch_s(tmp_path: Path) -> None:
    seen: list[Watch] = []

    @click.command()
    @watch_options
    def command(watch: Watch) -> None:
        seen.append(watch)

    for arguments in ([], ["--watch"], ["--watch", "--every", "5"], ["--every", "5", "-w"]):
        assert CliRunner().invoke(command, arguments).exit_code == 0
    assert seen == [Watch(False), Watch(True), Watch(True, 5.0), Watch(True, 5.0)]
    for wrong in ("0", "nan", "inf", "often"):
        assert CliRunner().invoke(command, ["-w", "--every", wrong]).exit_code == ExitCode.USAGE
