"""The way of log lines to a file or a socket, off the data path.

This module owns the queue and the thread between who has a line and where it goes. It promises that
`give` returns at once whatever becomes of the disk or of who listens; that the queue is bounded,
and what found no room is counted by cause; that a destination which fails is tried again by itself;
and that each destination has a thread of its own, so that one which stands still holds up no other.
It may not know what a line says.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import structlog

__all__ = ["STDOUT", "Cause", "Destination", "File", "MessageTooLongError", "Writer"]

_log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("ztunnel.log_writer")

T = TypeVar("T")

BATCH_LINES: Final = 500
"""Lines after which a system call writes what has been taken."""

TURN_SECONDS: Final = 1.0
"""Between looks at the flags when nothing comes."""

RETRY_SECONDS: Final = 1.0
"""Until a destination that failed is tried again: a restart of its other side takes less."""

NOTICE_SECONDS: Final = 10.0
"""Between messages that say how many lines were lost: of a destination that is always too slow they
must not be another burden."""

STDOUT: Final = "-"
"""The path that stands for standard output."""


class Cause(enum.StrEnum):
    """Why lines were lost: the destination does not take them fast enough, cannot be had, or takes
    no message of this length.
    """

    SLOW = "slow"
    UNAVAILABLE = "unavailable"
    TOO_LONG = "too_long"


_CAUSES: Final = tuple(Cause)


class Destination(Protocol):
    """Where messages go; used by one thread at a time."""

    def open(self) -> None:
        """Be ready to send, anew if need be. Raises OSError."""

    def send(self, messages: Sequence[bytes], /) -> int:
        """Send messages and return how many, at least one.

        Raises MessageTooLongError if the first can never be sent, TimeoutError if nobody takes it
        now, OSError if something is wrong; then none was sent.
        """

    def close(self) -> None: ...


class MessageTooLongError(Exception):
    pass


_OPEN_PROBLEMS: Final = {
    errno.ELOOP: "a symbolic link, which is not followed: name the file (- is standard output)",
    errno.ENXIO: "a FIFO that nobody reads, or a socket: start its reader first, or name a file",
}
"""What the system's words hide, when a file is opened as `File` does it."""


class File:
    """A file that is appended to, or standard output (STDOUT). A link is not followed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1
        self._torn = False
        """The last message that was written is not whole."""

    def open(self) -> None:
        if self._path == STDOUT:
            descriptor = os.dup(sys.stdout.fileno())
        else:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            # A FIFO that nobody reads is an error (open(2)), and no wait for ever.
            try:
                descriptor = os.open(self._path, flags | os.O_NONBLOCK, 0o640)
            except OSError as error:
                error.strerror = _OPEN_PROBLEMS.get(error.errno or 0, error.strerror)
                raise
            os.set_blocking(descriptor, True)
        self.close()
        self._descriptor = descriptor
        self._torn = self._torn and os.fstat(descriptor).st_size > 0

    def send(self, messages: Sequence[bytes], /) -> int:
        text = b"".join(messages)
        if self._torn:
            # What is left of a message is a line of its own, and damages no other.
            text = b"\n" + text
        view = memoryview(text)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            error.filename = self._path
            done = len(text) - len(view) - self._torn
            whole, size = _whole(messages, done)
            self._torn = (self._torn and done < 0) or size < done
            if not whole:
                raise
            return whole
        self._torn = False
        return len(messages)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _whole(messages: Sequence[bytes], done: int) -> tuple[int, int]:
    """Return how many messages fit in `done` bytes, and how many bytes they are."""
    size = 0
    for number, message in enumerate(messages):
        if size + len(message) > done:
            return number, size
        size += len(message)
    return len(messages), size


def _words(error: OSError) -> str:
    """Return what is wrong, behind where it is: a path or an address, as the settings have it."""
    reason = error.strerror or " ".join(map(str, error.args))  # str() would repeat the place
    return f"{error.filename}: {reason}" if error.filename else reason


class _Item(NamedTuple, Generic[T]):
    what: T
    lines: int


class _Message(NamedTuple):
    text: bytes
    lines: int


class Writer(Generic[T]):
    """Spells what it is given, on a thread of its own, and sends it.

    What cannot be sent is dropped, or, if the writer `keeps`, tried again while the queue lasts.
    `notice` spells the message that says how many lines were lost, once lines go out again.
    """

    def __init__(
        self,
        name: str,
        destination: Destination,
        spell: Callable[[T], bytes],
        capacity: int,
        *,
        keeps: bool = False,
        notice: Callable[[int], bytes] | None = None,
    ) -> None:
        self.name = name
        self._destination = destination
        self._spell = spell
        self._capacity = capacity
        self._keeps = keeps
        self._notice = notice
        self._queue: queue.SimpleQueue[_Item[T] | None] = queue.SimpleQueue()
        self._given = 0  # lines, by the thread that gives
        self._taken = 0  # lines, by the thread that writes
        self._reopen = threading.Event()
        self._ending = threading.Event()
        self._opened = False
        self.written = 0
        self.cause: Cause | None = None
        """What is wrong with the destination now; None while lines go out."""
        self.problem = ""
        """The same for people."""
        self._overflow = dict.fromkeys(_CAUSES, 0)  # by the thread that gives
        self._failed = dict.fromkeys(_CAUSES, 0)  # by the thread that writes
        self._said = 0
        self._say_at = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def open(self) -> None:
        """Open the destination before `start`, where a failure is to be known. Raises OSError."""
        self._destination.open()
        self._opened = True

    @property
    def room(self) -> int:
        """Lines that would be taken now."""
        return self._capacity - (self._given - self._taken)

    @property
    def waiting(self) -> int:
        return self._given - self._taken

    @property
    def alive(self) -> bool:
        """False once the last line is written, or given up, and the destination closed."""
        return self._thread.is_alive()

    @property
    def lost(self) -> dict[Cause, int]:
        """Lines that were lost, by cause."""
        return {cause: self._overflow[cause] + self._failed[cause] for cause in _CAUSES}

    def give(self, what: T, lines: int = 1) -> None:
        """Take `what`, of so many lines, if there is room; count them as lost if not."""
        if lines > self.room:
            self.overflowed(lines)
            return
        self._given += lines
        self._queue.put(_Item(what, lines))

    def overflowed(self, lines: int) -> None:
        """Count lines for which there was no room."""
        self._overflow[self.cause or Cause.SLOW] += lines

    def reopen(self) -> None:
        """Open the destination anew before the next line: logrotate has moved the file away."""
        self._reopen.set()

    def finish(self) -> None:
        """End once what waits is written, or as soon as that fails; does not wait."""
        self._ending.set()
        self._queue.put(None)

    def join(self, timeout: float) -> None:
        """Wait for the end, `timeout` seconds at most."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("log did not drain", log=self.name, lines=self.waiting)

    # --- the thread's own -------------------------------------------------------------------------

    def _run(self) -> None:
        last = False
        while not last:
            if self._keeps and not self._opened:
                self._open_early()
            messages, last = self._take()
            if self._reopen.is_set():
                self._reopen.clear()
                self._open_again()
            self._deliver(messages)
            self._tell_lost(last=last)
        self._destination.close()

    def _take(self) -> tuple[list[_Message], bool]:
        """Wait for lines and take those behind them; True with the last ones there will be.

        Returns without any after a while, to look at the flags.
        """
        messages: list[_Message] = []
        count, last = 0, False
        with contextlib.suppress(queue.Empty):
            given = self._queue.get(timeout=TURN_SECONDS)
            while given is not None:
                self._taken += given.lines
                count += given.lines
                messages.append(_Message(self._spell(given.what), given.lines))
                if count >= BATCH_LINES:
                    break
                given = self._queue.get_nowait()
            last = given is None
        return messages, last

    def _deliver(self, messages: list[_Message]) -> None:
        while messages:
            try:
                if not self._opened:
                    self._destination.open()
                    self._opened = True
                sent = self._destination.send([message.text for message in messages])
            except MessageTooLongError:
                self._drop(messages[:1], Cause.TOO_LONG)
                del messages[0]
            except OSError as error:
                cause = self._trouble(error)
                # Who was slow has been waited for already.
                pause = 0 if cause is Cause.SLOW else RETRY_SECONDS
                if not self._keeps or self._ending.wait(pause):
                    self._drop(messages, cause)
                    return
            else:
                self.written += sum(message.lines for message in messages[:sent])
                del messages[:sent]
                self._well()

    def _open_early(self) -> None:
        """Open before there is a line: what is wrong shows at once, and not when it matters."""
        try:
            self._destination.open()
        except OSError as error:
            self._trouble(error)
        else:
            self._opened = True
            self._well()

    def _trouble(self, error: OSError) -> Cause:
        slow = isinstance(error, TimeoutError)
        if self._keeps and not slow:
            self._destination.close()
            self._opened = False
        if not self.cause:
            _log.error(
                "log cannot be written; what finds no room is dropped and counted",
                log=self.name,
                error=_words(error),
            )
        self.cause = Cause.SLOW if slow else Cause.UNAVAILABLE
        self.problem = f"{self.cause.value}: {_words(error)}"
        return self.cause

    def _well(self) -> None:
        self.cause = None
        self.problem = ""

    def _drop(self, messages: Sequence[_Message], cause: Cause) -> None:
        self._failed[cause] += sum(message.lines for message in messages)

    def _tell_lost(self, *, last: bool) -> None:
        """Say what was lost, once lines go out again."""
        total = sum(self.lost.values())
        lines, now = total - self._said, time.monotonic()
        if not lines or self.cause is not None or (now < self._say_at and not last):
            return
        self._said = total
        self._say_at = now + NOTICE_SECONDS
        _log.warning("log lines were dropped", log=self.name, lines=lines, total=total)
        if self._notice is not None:
            self._deliver([_Message(self._notice(lines), 0)])

    def _open_again(self) -> None:
        if not self._opened:
            return  # it is, with the next line
        try:
            self._destination.open()
        except OSError as error:
            _log.error(
                "log cannot be reopened; the old file stays in use",
                log=self.name,
                error=_words(error),
            )
