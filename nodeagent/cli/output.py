"""How every command answers: one answer, in the form that was asked for, with one exit code.

This module owns the options `-o` and `--watch`, the writing of an answer, and colour. It promises
that the exit code does not depend on the form; that data goes to standard output in one piece and
nothing else does; that without a terminal there are 80 columns and no colour; that NO_COLOR,
CLICOLOR and CLICOLOR_FORCE are heard; and that names written by others cannot steer a terminal. It
may not know any command.

`-o json` and `-o yaml` are one document. With `--watch` they are one document for each look: JSON
has a line for each, YAML puts `---` in front.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple, NoReturn, TypeVar

import click
import msgspec

from nodeagent.cli import clock, table
from nodeagent.cli.as_yaml import yaml_of
from nodeagent.cli.ending import ExitCode, say
from nodeagent.cli.reach import UnreachableError
from nodeagent.cli.table import Cell, Column, Segment, Tone
from nodeagent.cli.text import WIDTH, moment, printable, wrapped

__all__ = [
    "DOCUMENTS",
    "Answer",
    "Printer",
    "Watch",
    "answer",
    "output_option",
    "watch_options",
    "write_document",
    "write_lines",
    "write_text",
]

NARROWEST: Final = 40
"""Columns: a terminal that says it has fewer gets lines that it folds itself."""

WIDEST_TEXT: Final = 100
"""Columns of sentences on a wide terminal: longer lines are hard to read. Tables take what they
need."""

EVERY_SECONDS: Final = 2.0
"""Between two looks of --watch: a person reads that fast, and the agent hardly notices."""

SHORTEST_SECONDS: Final = 0.1
LONGEST_SECONDS: Final = 86_400.0

DOCUMENTS: Final = ("json", "yaml")
"""Forms for programs."""

_STYLES: Final[dict[Tone, dict[str, Any]]] = {
    Tone.GOOD: {"fg": "green"},
    Tone.CAREFUL: {"fg": "yellow"},
    Tone.BAD: {"fg": "red", "bold": True},
    Tone.FAINT: {"dim": True},
}

F = TypeVar("F", bound=Callable[..., Any])


class Printer:
    """Takes what people read, line by line. `wide`: they have asked for everything, unfolded."""

    def __init__(self, *, wide: bool = False) -> None:
        self.wide = wide
        self.terminal = _terminal()
        self.colour = _colour()
        self.width = _width() if self.terminal else WIDTH
        self.lines: list[str] = []

    def line(self, text: str = "", tone: Tone = Tone.PLAIN) -> None:
        """Add a line that is never folded here."""
        self._add([Segment(printable(text), tone)])

    def text(self, text: str, indent: int = 0, tone: Tone = Tone.PLAIN) -> None:
        """Add a sentence: folded for a person, a line of its own for whatever reads a pipe."""
        said = printable(text)
        if not self.terminal or self.wide:
            self._add([Segment(" " * indent + said, tone)])
            return
        for line in wrapped(said, indent, width=min(self.width, WIDEST_TEXT)) or [""]:
            self._add([Segment(line, tone)])

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]]) -> None:
        """Add a table: in the width that there is, or unfolded with `-o wide`."""
        for segments in table.layout(columns, rows, None if self.wide else self.width):
            self._add(segments)

    def _add(self, segments: Iterable[Segment]) -> None:
        if self.colour:
            spelled = (
                click.style(each.text, **_STYLES[each.tone]) if each.tone in _STYLES else each.text
                for each in segments
            )
        else:
            spelled = (each.text for each in segments)
        self.lines.append("".join(spelled).rstrip(" "))

    def done(self) -> str:
        """Return everything, each line with its line feed."""
        return "".join(f"{line}\n" for line in self.lines)


class Answer(NamedTuple):
    """What a command has found out. `document` is for programs and has a `schema`; `show` is for
    people.
    """

    document: msgspec.Struct | dict[str, Any]
    show: Callable[[Printer], None]
    code: ExitCode = ExitCode.FINE


class Watch(NamedTuple):
    """The options of `--watch`: whether, and how many seconds are between two looks."""

    on: bool = False
    every: float = EVERY_SECONDS


NO_WATCH: Final = Watch()


def output_option(people: Sequence[str] = ("table", "wide"), *more: str) -> Callable[[F], F]:
    """Add `-o`, passed as `output`: forms for people, the first by default; json, yaml; `more`."""
    forms = (*people, *DOCUMENTS, *more)
    return click.option(
        "-o",
        "--output",
        type=click.Choice(forms),
        default=people[0],
        metavar="FORM",
        help=f"Form of the answer: {', '.join(forms)}.  [{people[0]}]",
    )


def watch_options(command: F) -> F:
    """Add `--watch` and `--every`, passed as `watch`, a Watch."""

    def together(context: click.Context, _parameter: click.Parameter, on: bool) -> Watch:  # noqa: FBT001 - click's signature
        return Watch(on, context.params.pop("every"))

    def bounded(_context: click.Context, _parameter: click.Parameter, seconds: float) -> float:
        # Not a FloatRange: its help would show the range. NaN is in none.
        if not SHORTEST_SECONDS <= seconds <= LONGEST_SECONDS:
            raise click.BadParameter(
                f"{seconds:g} is not between {SHORTEST_SECONDS:g} and {LONGEST_SECONDS:g} seconds"
            )
        return seconds

    every = click.option(
        "--every",
        type=float,
        default=EVERY_SECONDS,
        metavar="SECONDS",
        callback=bounded,
        # Seen before `watch`, into which it goes.
        is_eager=True,
        help=f"Seconds between two looks of --watch.  [{EVERY_SECONDS:g}]",
    )
    watch = click.option(
        "-w", "--watch", is_flag=True, callback=together, help="Look again and again, to Ctrl-C."
    )
    return watch(every(command))


def answer(look: Callable[[], Answer], output: str, watch: Watch = NO_WATCH) -> NoReturn:
    """Look, write what was found in the form `output`, and end with its exit code.

    With `watch` it ends by an interrupt alone, or if the first look does not reach the agent.
    """
    if watch.on:
        _watch(look, output, watch.every)
    found = look()
    if output in DOCUMENTS:
        write_document(found.document, output)
    else:
        printer = Printer(wide=output == "wide")
        found.show(printer)
        _write(printer.done())
    sys.exit(found.code)


def write_document(document: msgspec.Struct | dict[str, Any], form: str) -> None:
    """Write one document to standard output; `form` is "json" or "yaml"."""
    if form == "json":
        _write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")
    else:
        _write(yaml_of(document))


def write_text(text: str) -> None:
    """Write a text that is ready, as it stands."""
    _write(text)


def write_lines(lines: Iterable[str]) -> None:
    """Write lines that are ready, at once: for what is a stream and no single answer."""
    _write("".join(f"{line}\n" for line in lines))


def _watch(look: Callable[[], Answer], output: str, every: float) -> NoReturn:
    found = look()
    troubled = False
    while True:
        if output == "json":
            _write(msgspec.json.encode(found.document).decode() + "\n")
        elif output == "yaml":
            _write("---\n" + yaml_of(found.document))
        else:
            _frame(found, wide=output == "wide")
        while True:
            time.sleep(every)
            try:
                found = look()
            except UnreachableError as error:
                # The agent may be restarted while somebody watches; said once.
                if not troubled:
                    say(f"error: {error}; trying again every {every:g} s")
                troubled = True
            else:
                troubled = False
                break


def _frame(found: Answer, *, wide: bool) -> None:
    """Draw over the last frame on a terminal; elsewhere add one more."""
    printer = Printer(wide=wide)
    now = moment(clock.now())
    if not printer.terminal or _dumb():
        printer.line(f"--- {now}")
        found.show(printer)
        _write(printer.done())
        return
    printer.line(f"{now}, Ctrl-C ends", Tone.FAINT)
    printer.line()
    found.show(printer)
    room = shutil.get_terminal_size().lines - 1
    lines = printer.lines
    if len(lines) > room:
        lines = [*lines[: room - 1], f"and {len(lines) - room + 1} more lines: no room"]
    # Home; each line with what the last frame left behind it erased; then all below.
    _write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")


def _write(text: str) -> None:
    # `color`: whoever made the text has decided.
    click.echo(text, nl=False, color=True)


def _terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def _dumb() -> bool:
    """Return whether the terminal understands no escape sequences: an editor's, for example."""
    return os.environ.get("TERM") == "dumb"


def _width() -> int:
    return max(NARROWEST, shutil.get_terminal_size((WIDTH, 24)).columns)


def _colour() -> bool:
    """Return whether to use colour: no-color.org, bixense.com/clicolors."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("CLICOLOR_FORCE", "0") not in {"", "0"}:
        return True
    if os.environ.get("CLICOLOR") == "0" or _dumb():
        return False
    return _terminal()
