"""The words of `nodeagent graph`: a table of edges, and the same as a drawing for Graphviz.

This module owns the columns, their words, and the escaping for Graphviz. It promises that a share
of less than all never reads "100%", and one of more than nothing never "0%". Pure but for the
printer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from nodeagent.cli.output import Printer
from nodeagent.cli.table import Cell, Column, Tone
from nodeagent.cli.text import duration, many, moment, printable, size
from nodeagent.observe.graph_model import OUTSIDE, Edge, Graph, Padlock, Vertex

__all__ = ["dot", "people", "share"]

_COLUMNS: Final = (
    Column("SOURCE"),
    Column("DESTINATION"),
    Column("PORT", right=True, folds=False),
    Column("PADLOCK", folds=False),
    Column("CONNS", right=True, folds=False),
    Column("REFUSED", right=True, folds=False),
    Column("FAILED", right=True, folds=False),
    Column("LAST", right=True, folds=False),
)
_WIDE_COLUMNS: Final = (
    Column("WHY"),
    Column("MUTUAL-TLS", right=True),
    Column("DIRECT", right=True),
    Column("PLAINTEXT", right=True),
    Column("SENT", right=True),
    Column("RECEIVED", right=True),
    Column("SERVICE"),
    Column("SOURCE-IDENTITY"),
    Column("DESTINATION-IDENTITY"),
    Column("POLICIES"),
    Column("REPORTER"),
    Column("LAST-SEEN"),
)

_TONES: Final = {
    Padlock.ALL: Tone.GOOD,
    Padlock.SOME: Tone.CAREFUL,
    Padlock.NONE: Tone.BAD,
    Padlock.NO_DATA: Tone.FAINT,
}

DIRECT_NOTE: Final = (
    "direct: between two pods of this node; both have proved who they are, and nothing is encrypted"
)

_STYLES: Final = {
    Padlock.ALL: 'style=bold, color="#1b7a3d"',
    Padlock.SOME: 'style=dashed, color="#9a6700"',
    Padlock.NONE: 'style=solid, color="#b42318"',
    Padlock.NO_DATA: 'style=dotted, color="#666666"',
}


def share(part: int, whole: int) -> str:
    """Return a share in percent, rounded away from "all" and from "nothing"."""
    tenths = part * 1000 // whole
    return "<0.1%" if part and not tenths else f"{tenths / 10:g}%"


def people(printer: Printer, shown: Graph, *, left_out: int, nobody: Sequence[str] = ()) -> None:
    """Write the table. `left_out`: edges that the filters have taken away; `nobody`: names that are
    asked for, and nobody's.
    """
    printer.line(_summary(shown, left_out))
    for name in nobody:
        printer.text(
            f"{name} is no workload of this node, and nobody who was seen: nodeagent workloads "
            "lists those of this node"
        )
    for note in _notes(shown):
        printer.text(note)
    if not shown.edges:
        return
    printer.line()
    columns = (*_COLUMNS, *_WIDE_COLUMNS) if printer.wide else _COLUMNS
    edges = sorted(shown.edges, key=lambda edge: (edge.destination, edge.port, edge.source))
    printer.table(columns, (_row(edge, shown, wide=printer.wide) for edge in edges))
    if any(edge.connections.direct for edge in edges):
        printer.line()
        printer.text(DIRECT_NOTE)


def _summary(shown: Graph, left_out: int) -> str:
    counts = Counter(edge.padlock for edge in shown.edges)
    said = [f"{counts[state]} {state.value}" for state in Padlock if counts[state]]
    locks = f"; mutual TLS: {', '.join(said)}" if said else ""
    others = f" ({left_out} more not asked for)" if left_out else ""
    window = duration(shown.window_seconds)
    return f"{many(len(shown.edges), 'edge')}{others} in the last {window}{locks}"


def _notes(shown: Graph) -> Iterator[str]:
    if shown.problem:
        yield f"not recorded now: {shown.problem}"
    elif not shown.complete:
        yield "not all of this time was recorded: what is not here may have been"
    if shown.truncated:
        yield "there are more edges than fit: those seen the longest ago are left out"


def _row(edge: Edge, shown: Graph, *, wide: bool) -> list[Cell | str]:
    row: list[Cell | str] = [
        _end(edge.source, edge),
        _end(edge.destination, edge),
        str(edge.port) if edge.port else "several",
        Cell(_padlock(edge), _TONES[edge.padlock]),
        str(edge.connections.total),
        Cell(str(edge.refused), Tone.CAREFUL if edge.refused else Tone.PLAIN),
        Cell(str(edge.failed), Tone.CAREFUL if edge.failed else Tone.PLAIN),
        duration((shown.time - edge.last).total_seconds()),
    ]
    if wide:
        row += [
            ", ".join(f"{count} {reason}" for reason, count in edge.reasons.items()),
            str(edge.connections.mutual_tls),
            str(edge.connections.direct),
            str(edge.connections.plaintext),
            size(edge.bytes_sent),
            size(edge.bytes_received),
            edge.service,
            edge.source_identity,
            edge.destination_identity,
            ", ".join(edge.policies),
            edge.reporter.value,
            moment(edge.last),
        ]
    return row


def _end(name: str, edge: Edge) -> str:
    """Return a vertex's name, and where it stands for several addresses one of them."""
    if name != OUTSIDE or not edge.addresses:
        return name
    first, *others = edge.addresses
    return f"{name} {first} and others" if others else f"{name} {first}"


def _padlock(edge: Edge) -> str:
    word = edge.padlock.value
    if edge.padlock is Padlock.SOME:
        return f"{word} {share(edge.connections.mutual_tls, edge.connections.total)}"
    if edge.padlock is Padlock.NONE and not edge.connections.plaintext:
        return f"{word}, direct"
    return word


# --- Graphviz -------------------------------------------------------------------------------------


def dot(printer: Printer, shown: Graph) -> None:
    """Write a directed graph in Graphviz' language (graphviz.org/doc/info/lang.html)."""
    for line in _dot(shown):
        printer.line(line)


def _dot(shown: Graph) -> Iterator[str]:
    yield "digraph mesh {"
    yield "  rankdir=LR;"
    yield '  node [shape=box, style=rounded, fontname="sans-serif"];'
    yield '  edge [fontname="sans-serif", fontsize=10];'
    for number, (namespace, members) in enumerate(_by_namespace(shown.vertices)):
        if not namespace:
            yield from (f"  {_node(vertex)}" for vertex in members)
            continue
        yield f"  subgraph cluster_{number} {{"
        yield f"    label={_quoted(namespace)};"
        yield from (f"    {_node(vertex)}" for vertex in members)
        yield "  }"
    for edge in shown.edges:
        label = f"{edge.port or 'several ports'}: {_padlock(edge)}"
        if edge.refused:
            label += f", {edge.refused} refused"
        if edge.failed:
            label += f", {edge.failed} failed"
        yield (
            f"  {_quoted(edge.source)} -> {_quoted(edge.destination)}"
            f" [label={_quoted(label)}, {_STYLES[edge.padlock]}];"
        )
    yield "}"


def _by_namespace(vertices: Iterable[Vertex]) -> list[tuple[str, list[Vertex]]]:
    found: dict[str, list[Vertex]] = {}
    for vertex in vertices:
        found.setdefault(vertex.namespace, []).append(vertex)
    return sorted(found.items())


def _node(vertex: Vertex) -> str:
    label = f"{vertex.name} ({vertex.mode})" if vertex.mode else vertex.name
    return f"{_quoted(vertex.id)} [label={_quoted(label)}];"


def _quoted(text: str) -> str:
    """Return a quoted string: a label's escapes ("\\N", "\\l") begin with a backslash, too."""
    said = printable(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{said}"'
