"""The way of lines: nobody waits for it, and what is lost is counted and said."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.netns import wait_until
from ztunnel import log_writer
from ztunnel.log_writer import Cause, File, MessageTooLongError, Writer

SECONDS = 15.0


class Somewhere:
    """A destination that fails as a test says."""

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.error: Exception | None = None
        self.opened = 0
        self.closed = 0
        self.tried = threading.Event()

    def open(self) -> None:
        self.opened += 1
        if isinstance(self.error, FileNotFoundError):
            self.tried.set()
            raise self.error

    def send(self, messages: Sequence[bytes], /) -> int:
        if self.error is not None:
            error = self.error
            if isinstance(error, MessageTooLongError):
                self.error = None
            self.tried.set()
            raise error
        self.got += messages
        return len(messages)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.01)


@pytest.fixture
def somewhere() -> Somewhere:
    return Somewhere()


def writer(there: log_writer.Destination, *, keeps: bool = True, capacity: int = 10) -> Writer[str]:
    return Writer(
        "tested",
        there,
        lambda text: f"{text}\n".encode(),
        capacity,
        keeps=keeps,
        notice=lambda lines: b"%d lost\n" % lines,
    )


@pytest.fixture
def running(somewhere: Somewhere) -> Iterator[Writer[str]]:
    made = writer(somewhere)
    made.start()
    yield made
    made.finish()
    made.join(SECONDS)
    assert not made.alive


@pytest.mark.parametrize(
    "error, cause",
    [
        (FileNotFoundError(errno.ENOENT, "nobody there"), Cause.UNAVAILABLE),
        (OSError(errno.ENOSPC, "disk full"), Cause.UNAVAILABLE),
        (TimeoutError("full"), Cause.SLOW),
    ],
)
def test_what_cannot_be_sent_waits_and_what_finds_no_room_is_counted_by_cause(
    running: Writer[str], somewhere: Somewhere, error: Exception, cause: Cause
) -> None:
    somewhere.error = error
    running.give("first")
    wait_until(lambda: running.cause is cause, "the writer knows what is wrong")
    for number in range(25):
        running.give(str(number))
    assert running.lost == dict.fromkeys(Cause, 0) | {cause: 15}
    somewhere.error = None
    wait_until(lambda: running.written == 11, "all that waited is written")
    assert running.cause is None
    assert somewhere.got == [
        b"first\n",
        b"15 lost\n",
        *(b"%d\n" % number for number in range(10)),
    ]


def test_what_can_never_be_sent_holds_up_nothing(
    running: Writer[str], somewhere: Somewhere
) -> None:
    somewhere.error = MessageTooLongError()
    running.give("long")
    assert somewhere.tried.wait(SECONDS)
    running.give("next")
    wait_until(lambda: running.written == 1, "the next is written")
    assert somewhere.got == [b"1 lost\n", b"next\n"]
    assert running.lost[Cause.TOO_LONG] == 1


def test_a_writer_that_does_not_keep_drops_at_once(somewhere: Somewhere) -> None:
    made = writer(somewhere, keeps=False)
    somewhere.error = OSError(errno.ENOSPC, "disk full")
    made.give("lost")
    made.start()
    assert somewhere.tried.wait(SECONDS)
    wait_until(lambda: made.lost[Cause.UNAVAILABLE] == 1, "the line is given up")
    somewhere.error = None
    made.give("kept")
    made.finish()
    made.join(SECONDS)
    assert somewhere.got == [b"kept\n", b"1 lost\n"]


def test_a_destination_that_is_always_too_slow_is_not_told_so_all_the_time(
    somewhere: Somewhere,
) -> None:
    go_on = threading.Semaphore(0)
    sends = threading.Semaphore(0)
    real = somewhere.send

    def send(messages: Sequence[bytes], /) -> int:
        sends.release()
        go_on.acquire(timeout=SECONDS)
        return real(messages)

    somewhere.send = send  # type: ignore[method-assign]  # each time that the test says
    made = writer(somewhere, capacity=1)
    made.start()
    for notices in (1, 0, 0):
        made.give("sent")
        assert sends.acquire(timeout=SECONDS)
        made.give("waits")
        for _ in range(5):
            made.give("lost")
        for _ in range(notices + 1):
            go_on.release()
            assert sends.acquire(timeout=SECONDS)
        go_on.release()
        wait_until(lambda: made.waiting == 0, "what waited is taken")
    go_on.release()
    made.finish()
    made.join(SECONDS)
    assert made.lost[Cause.SLOW] == 15
    assert [each for each in somewhere.got if b"lost" in each] == [b"5 lost\n", b"10 lost\n"]


def test_what_is_wrong_shows_before_there_is_a_line(
    running: Writer[str], somewhere: Somewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: somewhere.opened == 1, "it is open")
    monkeypatch.setattr(log_writer, "TURN_SECONDS", 0.01)
    absent = Somewhere()
    absent.error = FileNotFoundError(errno.ENOENT, "nobody there")
    made = writer(absent)
    made.start()
    wait_until(lambda: made.cause is Cause.UNAVAILABLE, "the writer knows what is wrong")
    absent.error = None
    wait_until(lambda: made.cause is None, "the writer knows that all is well")
    made.finish()
    made.join(SECONDS)
    assert absent.closed


def test_an_end_is_not_held_up_by_who_is_not_there(somewhere: Somewhere) -> None:
    made = writer(somewhere)
    somewhere.error = FileNotFoundError(errno.ENOENT, "nobody there")
    made.start()
    made.give("lost")
    assert somewhere.tried.wait(SECONDS)
    made.finish()
    made.join(SECONDS)
    assert not made.alive
    assert made.lost[Cause.UNAVAILABLE] == 1


def test_giving_never_waits(somewhere: Somewhere) -> None:
    hang = threading.Event()

    def send(messages: Sequence[bytes], /) -> int:
        somewhere.tried.set()
        hang.wait(SECONDS)
        return len(messages)

    somewhere.send = send  # type: ignore[method-assign]  # a destination that stands still
    made = writer(somewhere, capacity=100)
    made.start()
    made.give("stuck")
    assert somewhere.tried.wait(SECONDS)
    for _ in range(10_000):
        made.give("more")
    assert made.waiting == 100
    assert made.lost[Cause.SLOW] == 9_900
    hang.set()
    made.finish()
    made.join(SECONDS)
    assert made.written == 101


# --- files ---------------------------------------------------------------------------------------


def test_a_line_that_was_cut_off_damages_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up takes a part of what is written (write(2))."""
    path = tmp_path / "log"
    there = File(str(path))
    there.open()
    real = os.write
    room = [12]

    def write(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(descriptor, bytes(data)[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)
    messages = [b"line one\n", b"line two\n", b"line three\n"]
    assert there.send(messages) == 1
    with pytest.raises(OSError, match="No space"):
        there.send(messages[1:])
    room[0] = 1
    with pytest.raises(OSError, match="No space"):
        there.send(messages[1:])
    room[0] = 1000
    assert there.send(messages[1:]) == 2
    there.close()
    assert path.read_text().splitlines() == ["line one", "lin", "line two", "line three"]


def test_a_fifo_that_nobody_reads_is_no_wait_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "log"
    os.mkfifo(path)
    with pytest.raises(OSError, match="nobody reads"):
        File(str(path)).open()


def test_a_moved_file_is_reopened_when_asked(tmp_path: Path) -> None:
    path, moved = tmp_path / "log", tmp_path / "log.1"
    made = writer(File(str(path)))
    made.start()
    made.give("before")
    wait_until(lambda: made.written == 1, "the first line is written")
    path.rename(moved)
    made.reopen()
    made.give("after")
    made.finish()
    made.join(SECONDS)
    assert (moved.read_text(), path.read_text()) == ("before\n", "after\n")


def test_a_file_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "later" / "log"
    made = writer(File(str(path)))
    made.start()
    made.give("patient")
    wait_until(lambda: made.cause is Cause.UNAVAILABLE, "the writer knows what is wrong")
    path.parent.mkdir()
    wait_until(lambda: made.written == 1, "the line is written")
    assert path.read_text() == "patient\n"
    made.finish()
    made.join(SECONDS)
