"""`nodeagent trace` without a kernel: BTF, events, words, and everything that may be missing."""

from __future__ import annotations

import platform
import struct
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from nodeagent.admin.model import PodReport, PodState
from nodeagent.cli import cli, trace_view
from nodeagent.cli import trace as command
from nodeagent.trace import Directory, Event, MissingError, Program, TracedPod, _bcc, _btf, decode
from nodeagent.trace._events import EVENT_BYTES

WALL = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)
MONOTONIC = 100.0
POD = TracedPod("shop/web", "spiffe://cluster.local/ns/shop/sa/web", 77, ("10.0.0.2", "fd00::2"))
DIRECTORY = Directory(
    [POD],
    {
        "workload": [{"uid": "shop/db", "identity": "spiffe://x/db", "addresses": ["10.0.1.2"]}],
        "service": [{"uid": "shop/db.svc", "addresses": ["10.96.0.1"]}],
    },
)


def mapped(address: str) -> bytes:
    return b"\0" * 10 + b"\xff\xff" + bytes(map(int, address.split(".")))


def event(
    kind: int = 1,
    *,
    mark: int = 0,
    here: int = 1,
    netns: int = 77,
    local: str = "10.0.0.2",
    remote: str = "10.0.1.2",
    program: bytes = b"curl",
) -> bytes:
    return struct.pack(
        "=QQQQIIIBBxx16s16sHH16s4x",
        98_000_000_000,
        96_500_000_000,
        80,
        1234,
        netns,
        mark,
        2,
        kind,
        here,
        mapped(local),
        mapped(remote),
        40000,
        80,
        program,
    )


def decoded(data: bytes) -> Event:
    found = decode(data, DIRECTORY, WALL, MONOTONIC)
    assert found is not None
    return found


# --- events --------------------------------------------------------------------------------------


def test_a_connection_names_both_sides_and_what_it_carried() -> None:
    found = decoded(event())
    assert (found.event, found.pod, found.identity) == ("connection", POD.workload, POD.identity)
    assert (found.role, found.program) == ("client", "curl")
    assert (found.local, found.remote) == ("10.0.0.2:40000", "10.0.1.2:80")
    assert (found.peer, found.peer_identity) == ("shop/db", "spiffe://x/db")
    assert (found.seconds, found.sent, found.received, found.retransmits) == (1.5, 79, 1234, 2)
    assert found.time == WALL.replace(second=8)
    assert decoded(event(remote="10.96.0.1")).peer == "service shop/db.svc"
    assert decoded(event(remote="192.0.2.1")).peer == ""


@pytest.mark.parametrize(
    "fields, role",
    [
        ({}, "client"),
        ({"here": 0}, "server"),
        ({"mark": 0x111, "here": 0}, "server"),
        ({"mark": 0x111, "here": 1}, "tunnel"),
        ({"mark": 0x111, "here": 0, "local": "10.96.0.1"}, "tunnel"),
        ({"mark": 0x539}, "tunnel"),
        ({"mark": 0x53A}, "older"),
        ({"kind": 2}, "application"),
        ({"kind": 2, "mark": 0x539}, "tunnel"),
    ],
)
def test_whose_end_it_is(fields: dict[str, object], role: str) -> None:
    assert decoded(event(**fields)).role == role  # type: ignore[arg-type]  # of `event`


def test_a_bypass_says_whether_it_opens_a_connection() -> None:
    found = decoded(event(3))
    assert (found.event, found.new, found.seconds, found.retransmits) == (
        "bypass",
        True,
        None,
        None,
    )
    assert "opens a connection around the tunnel" in trace_view.line(found)
    assert decoded(event(3, here=0)).new is False


def test_what_is_not_ours_is_passed_over_and_what_is_short_refused() -> None:
    assert decode(event(netns=78), DIRECTORY, WALL, MONOTONIC) is None
    assert decode(event(9), DIRECTORY, WALL, MONOTONIC) is None
    with pytest.raises(ValueError, match="an event of 7 bytes"):
        decode(b"1234567", DIRECTORY, WALL, MONOTONIC)
    assert EVENT_BYTES == 104


def test_a_hostile_name_steers_no_terminal() -> None:
    line = trace_view.line(decoded(event(program=b"\x1b[2J\xff\n")), UTC)
    assert line.isprintable()
    assert line.startswith("2026-03-01T12:00:08.000+00:00 connection shop/web client: \\x1b[2J")


def test_the_last_line_counts_what_was_not_said() -> None:
    said = trace_view.summary({"connection": 2, "bypass": 1}, 30.2, 5, 7)
    assert said == (
        "30 s: 2 connections, 0 retransmits, 1 flow around the tunnel; 5 lines left out, too many "
        "at once; 7 events lost, the ring was full"
    )


# --- BTF -----------------------------------------------------------------------------------------


def made_btf() -> bytes:
    """Return outer { int first; struct { const struct inner in; union { int a, b; }; }; }."""
    text = b"\0outer\0inner\0first\0in\0a\0b\0deep\0int\0"
    names = {name: text.index(b"\0" + name + b"\0") + 1 for name in text.split(b"\0") if name}

    def kind(number: int, members: int = 0) -> int:
        return number << 24 | members

    def member(name: bytes, of: int, bits: int) -> bytes:
        return struct.pack("=III", names.get(name, 0), of, bits)

    types = b"".join(
        (
            struct.pack("=III", names[b"int"], kind(1), 4) + struct.pack("=I", 32),  # 1
            struct.pack("=III", names[b"inner"], kind(4, 1), 8) + member(b"deep", 1, 32),  # 2
            struct.pack("=III", 0, kind(10), 2),  # 3: const struct inner
            struct.pack("=III", 0, kind(5, 2), 4) + member(b"a", 1, 0) + member(b"b", 1, 0),  # 4
            struct.pack("=III", 0, kind(4, 2), 12) + member(b"in", 3, 0) + member(b"", 4, 64),  # 5
            struct.pack("=III", names[b"outer"], kind(4, 2), 16)  # 6
            + member(b"first", 1, 0)
            + member(b"", 5, 32),
        )
    )
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(text))
    return header + types + text


def test_a_field_is_found_through_nameless_and_qualified_structures() -> None:
    paths = ("outer.first", "outer.in.deep", "outer.b", "inner.deep")
    assert _btf.offsets(made_btf(), paths) == dict(zip(paths, (0, 8, 12, 4), strict=True))


@pytest.mark.parametrize("path", ["other.first", "outer.missing", "outer.first.deeper"])
def test_a_field_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(_btf.BtfError, match=r"other|missing|deeper"):
        _btf.offsets(made_btf(), [path])


def test_damaged_btf_is_an_error_at_every_length() -> None:
    whole = made_btf()
    for length in range(len(whole) - 30):
        with pytest.raises(_btf.BtfError):
            _btf.offsets(whole[:length], ["outer.in.deep"])
    with pytest.raises(_btf.BtfError):
        _btf.offsets(b"\0" * 100, ["outer.first"])


# --- what is missing -----------------------------------------------------------------------------


def begin() -> None:
    Program([], lambda _: None).close()


def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_bcc, "PACKAGES", (tmp_path,))
    monkeypatch.delitem(__import__("sys").modules, "bcc", raising=False)
    with pytest.raises(MissingError, match="bcc is not installed") as caught:
        begin()
    assert caught.value.remedy == "apt-get install --no-install-recommends python3-bpfcc"


def test_missing_headers_are_named_with_their_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    monkeypatch.setattr(_bcc, "MODULES", tmp_path)
    monkeypatch.setattr(_bcc, "KHEADERS", tmp_path / "none")
    with pytest.raises(MissingError, match="headers of the running kernel") as caught:
        begin()
    assert caught.value.remedy.startswith(f"apt-get install linux-headers-{platform.release()}")


def test_headers_that_do_not_compile_are_named_and_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    with pytest.raises(MissingError, match=r"cannot be compiled or loaded: .*error:"):
        begin()
    assert capfd.readouterr() == ("", "")


def test_a_kernel_without_btf_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_bcc, "BTF", tmp_path / "vmlinux")
    with pytest.raises(MissingError, match="No such file") as caught:
        begin()
    assert "CONFIG_DEBUG_INFO_BTF" in caught.value.remedy
    (tmp_path / "vmlinux").write_bytes(made_btf())
    with pytest.raises(MissingError, match="the kernel has no struct sock"):
        begin()


@pytest.mark.parametrize("said", ["bpf: Failed to load program: Operation not permitted", ""])
def test_a_kernel_that_says_no_is_named(said: str) -> None:
    found = _bcc._failed(Exception("Operation not permitted" if not said else "failed"), said)
    assert "not allowed to load programs into the kernel" in str(found)
    assert "root" in found.remedy


# --- the command ---------------------------------------------------------------------------------


def pod(workload: str) -> PodReport:
    return PodReport(
        workload=workload, identity="", netns="gone", state=PodState.ENROLLED, since=WALL
    )


def test_pods_are_chosen_by_name() -> None:
    found = [pod("shop/web"), pod("shop/db"), pod("other/db")]
    assert command._chosen(found, []) == found
    assert command._chosen(found, ["web", "other/db"]) == [found[0], found[2]]
    for name, said in (("db", "is several"), ("nobody", "is no pod of this node")):
        with pytest.raises(Exception, match=said):
            command._chosen(found, [name])


def test_lines_are_bounded_and_what_is_left_out_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MOST_EVENTS", 3)
    lines = command._Lines(DIRECTORY, command.KINDS, "json", tunnel=False)
    for _ in range(5):
        lines.take(event())
    lines.take(event(mark=0x539))
    written = capsys.readouterr().out.splitlines()
    assert [msgspec.json.decode(line)["event"] for line in written] == ["connection"] * 3
    assert (lines.counts["connection"], lines._left_out) == (5, 2)


def test_without_an_agent_the_exit_code_is_3(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["trace", "--run-dir", str(tmp_path)])
    assert result.exit_code == 3
    assert result.stdout == ""
