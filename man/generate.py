"""Writes the manual pages of both programs from what their commands say of themselves.

    python man/generate.py DIRECTORY

This program owns the form of a page (man(7)). It promises one page for each command; that a page
says what `--help` says, and besides only what all commands share; and that no text of a command is
taken for an instruction to the formatter.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple

import click

from nodeagent.cli import SHORT, LazyGroup, cli
from ztunnel.daemon import command as ztunnel

RELEASE: Final = version("nodeagent")

SECTION: Final = 8
"""System administration: most of it is for root."""

ENVIRONMENT: Final = (
    ("NO_COLOR", "If it is not empty, no colour is used."),
    ("CLICOLOR", "If it is 0, no colour is used."),
    ("CLICOLOR_FORCE", "If it is neither empty nor 0, colour is used without a terminal too."),
)

FILES: Final = (
    ("/etc/nodeagent/nodeagent.yaml", "Settings of the daemon."),
    ("/etc/nodeagent/mesh.d/", "Documents of the mesh: workloads, services, policies."),
    ("/run/nodeagent/admin.sock", "Where commands ask the daemon."),
)

AS_IT_STANDS: Final = "\b"
"""Alone in the first line of a paragraph: click does not fold it, and neither may a page."""


class Command(NamedTuple):
    """A command, the words by which it is called, and what its group says of it."""

    path: tuple[str, ...]
    command: click.Command
    summary: str

    @property
    def page(self) -> str:
        return "-".join(self.path)

    @property
    def context(self) -> click.Context:
        names = cli.context_settings["help_option_names"]
        return click.Context(self.command, info_name=" ".join(self.path), help_option_names=names)


def pages() -> dict[str, str]:
    """Return the text of each page by the name of its file."""
    roots = (
        Command(("nodeagent",), cli, "mutual TLS for every workload of this node"),
        Command(("ztunnel",), ztunnel, "the tunnel that carries each connection of the mesh"),
    )
    return {
        f"{each.page}.{SECTION}": _page(each) for root in roots for each in _with_those_below(root)
    }


def _with_those_below(above: Command) -> Iterator[Command]:
    yield above
    for below in _below(above):
        yield from _with_those_below(below)


def _below(above: Command) -> Iterator[Command]:
    if not isinstance(above.command, click.Group):
        return
    context = above.context
    for name in above.command.list_commands(context):
        command = above.command.get_command(context, name)
        if command is None:
            raise LookupError(f"{above.page} has no {name}")
        summary = _short(above.command, context, name)
        yield Command((*above.path, name), command, summary)


def _short(group: click.Group, context: click.Context, name: str) -> str:
    if isinstance(group, LazyGroup):
        return group.short(context, name).rstrip(".")
    command = group.get_command(context, name)
    return command.get_short_help_str(SHORT).rstrip(".") if command is not None else ""


def _page(shown: Command) -> str:
    context = shown.context
    lines = [
        f'.TH {shown.page.upper()} {SECTION} "" "nodeagent {RELEASE}" nodeagent',
        ".SH NAME",
        f"{_roff(shown.page)} \\- {_roff(shown.summary)}",
        ".SH SYNOPSIS",
        f".B {_roff(' '.join(shown.path))}",
        _roff(" ".join(shown.command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
        *_paragraphs(inspect.cleandoc(shown.command.help or "")),
        ".SH OPTIONS",
    ]
    for parameter in shown.command.get_params(context):
        record = parameter.get_help_record(context)
        # The usage has the arguments, the description what they are.
        if record is not None and record[1]:
            lines += [".TP", f".B {_roff(record[0])}", _roff(record[1])]
    below = list(_below(shown))
    if below:
        lines.append(".SH COMMANDS")
    for each in below:
        lines += [".TP", f".BR {_roff(each.page)} ({SECTION})", _roff(_sentence(each.summary))]
    if shown.path[0] == "nodeagent":
        for title, table in (("ENVIRONMENT", ENVIRONMENT), ("FILES", FILES)):
            lines.append(f".SH {title}")
            for term, text in table:
                lines += [".TP", f".B {_roff(term)}", _roff(text)]
    related = dict.fromkeys(["-".join(shown.path[:-1]), "nodeagent", "ztunnel"])
    named = [each for each in related if each and each != shown.page]
    lines.append(".SH SEE ALSO")
    lines += [f".BR {_roff(each)} ({SECTION}){',' if each != named[-1] else ''}" for each in named]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for number, paragraph in enumerate(text.split("\n\n")):
        if number:
            yield ".PP"
        first, _, rest = paragraph.partition("\n")
        if first == AS_IT_STANDS:
            yield ".nf"
            yield from map(_roff, rest.split("\n"))
            yield ".fi"
        else:
            yield _roff(" ".join(paragraph.split()))


def _sentence(text: str) -> str:
    return text if text.endswith("?") else f"{text}."


def _roff(text: str) -> str:
    """Return a line of text as roff takes it: nothing in it is an instruction."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    escaped = escaped.replace("`", "\\(ga").replace("^", "\\(ha").replace("~", "\\(ti")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
