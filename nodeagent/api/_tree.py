"""Text to tree: the only place where YAML syntax is read.

This module owns the syntax. It promises a tree of marked nodes that is linear in the size of the
text, bounded in depth and count, and free of everything that makes YAML a program: aliases, merge
keys, tags and duplicate keys are refused, never resolved. It gives scalars no type: that is the
schema's business. It may not construct objects or know any resource.

The reader works on the parser's events, not on PyYAML's loaders: the loaders resolve aliases and
merge keys before anybody can refuse them, take the last of two equal keys, and recurse.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import Final, NoReturn

import yaml

from nodeagent.api._errors import ConfigError, quote

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_DOCUMENTS",
    "MAX_ERRORS",
    "MAX_ITEMS",
    "MAX_NODES",
    "Broken",
    "Mapping",
    "Node",
    "Scalar",
    "Sequence",
    "join",
    "read_tree",
]

MAX_BYTES: Final = 1024 * 1024
"""Bytes of one file. What a Kubernetes ConfigMap may hold, and about 2,000 workloads."""

MAX_DEPTH: Final = 32
"""Nesting. The deepest resource (a List of ServiceEntry with endpoints' labels) needs nine; the
rest leaves room for ignored metadata such as managedFields. Far below every recursion limit."""

MAX_DOCUMENTS: Final = 5_000
"""Documents of one file: more than MAX_BYTES holds of sensible ones."""

MAX_NODES: Final = 200_000
"""Scalars, lists and mappings of one file; bounds the memory of the tree (about 200 bytes each)."""

MAX_ITEMS: Final = 10_000
"""Items of one list or entries of one mapping."""

MAX_ERRORS: Final = 100
"""Errors of one file: enough to mend it in one go, few enough to read and to keep."""

# Control characters (but tab, newline, carriage return), the separators that only some readers take
# for line ends, byte order marks inside, and the bidirectional controls that show text in another
# order than it is read in.
_FORBIDDEN: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]"
)

# libyaml where PyYAML was built with it: the same events, about ten times as fast.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class Node:
    """A node and where it starts: `line` and `column` count from 1."""

    __slots__ = ("column", "line")

    def __init__(self, line: int, column: int) -> None:
        self.line = line
        self.column = column


class Scalar(Node):
    """Text as written. `plain` means without quotes, where readers of YAML guess a type."""

    __slots__ = ("plain", "text")

    def __init__(self, line: int, column: int, text: str, *, plain: bool) -> None:
        super().__init__(line, column)
        self.text = text
        self.plain = plain


class Broken(Node):
    """Stands where a value was refused; its error has been reported."""

    __slots__ = ()


class Sequence(Node):
    __slots__ = ("items",)

    def __init__(self, line: int, column: int) -> None:
        super().__init__(line, column)
        self.items: list[Node] = []


class Mapping(Node):
    """Keys are scalars, each text at most once; the order is the author's."""

    __slots__ = ("entries",)

    def __init__(self, line: int, column: int) -> None:
        super().__init__(line, column)
        self.entries: dict[str, tuple[Scalar, Node]] = {}

    def get(self, key: str) -> Node | None:
        entry = self.entries.get(key)
        return None if entry is None else entry[1]


def join(path: str, key: str | int) -> str:
    """Return the path of `key` (a field's name, or a list's index) below `path`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    if not _PLAIN_KEY.fullmatch(key):
        return f"{path}[{quote(key)}]"
    return f"{path}.{key}" if path else key


def read_tree(data: bytes, file: str) -> tuple[list[Node], list[ConfigError]]:
    """Return the root of each document in `data`, and what is wrong; `file` names it in errors.

    After a syntax error or an exceeded limit the roots before it are returned; after any other
    error the tree is complete, with `Broken` where a value was refused.
    """
    builder = _Builder(file)
    try:
        for event in _events(_decode(data, file)):
            builder.take(event)
    except ConfigError as error:
        builder.errors.append(error)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        builder.errors.append(ConfigError(file, line, column, "", f"not YAML: {what}"))
    except yaml.YAMLError as error:
        builder.errors.append(ConfigError(file, 0, 0, "", f"not YAML: {quote(str(error))}"))
    return builder.complete_roots(), builder.errors


def _events(text: str) -> Iterator[yaml.Event]:
    return iter(yaml.parse(text, Loader=_LOADER))


def _decode(data: bytes, file: str) -> str:
    if len(data) > MAX_BYTES:
        raise ConfigError(
            file, 0, 0, "", f"larger than the limit of {MAX_BYTES} bytes: split the file"
        )
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if data.startswith(mark):
            raise ConfigError(file, 1, 1, "", "this is UTF-16: save the file as UTF-8")
    # Editors on other systems put a byte order mark in front of UTF-8: it says nothing, drop it.
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8")
        line, column = _position(before)
        reason = f"byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8"
        raise ConfigError(file, line, column, "", reason) from None
    found = _FORBIDDEN.search(text)
    if found is not None:
        line, column = _position(text[: found.start()])
        reason = f"the character U+{ord(found.group()):04X} is not allowed: delete it"
        raise ConfigError(file, line, column, "", reason)
    return text


def _position(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


class _Frame:
    """A list or mapping that is still open, and the key whose value comes next."""

    __slots__ = ("key", "node", "path")

    def __init__(self, node: Sequence | Mapping, path: str) -> None:
        self.node = node
        self.path = path
        self.key: Scalar | None = None


class _Builder:
    """Takes events one by one. Not recursive: depth costs the stack of this program nothing."""

    def __init__(self, file: str) -> None:
        self.errors: list[ConfigError] = []
        self._roots: list[Node] = []
        self._file = file
        self._stack: list[_Frame] = []
        self._nodes = 0

    def complete_roots(self) -> list[Node]:
        """Return the roots, without the one that an error left unfinished."""
        return self._roots[:-1] if self._stack else self._roots

    def take(self, event: yaml.Event) -> None:
        """Add `event` to the tree. Raises ConfigError when there is no sense in going on."""
        match event:
            case yaml.ScalarEvent():
                self._check_properties(event)
                self._add(Scalar(*_mark(event), event.value, plain=event.implicit[0]))
            case yaml.SequenceStartEvent():
                self._check_properties(event)
                self._open(Sequence(*_mark(event)))
            case yaml.MappingStartEvent():
                self._check_properties(event)
                self._open(Mapping(*_mark(event)))
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self._stack.pop()
            case yaml.AliasEvent():
                node = Broken(*_mark(event))
                reason = f"the alias *{event.anchor} is not allowed: write the value again here"
                self._report(node, self._path(), reason)
                self._add(node)
            case yaml.DocumentStartEvent() if len(self._roots) >= MAX_DOCUMENTS:
                reason = f"more than {MAX_DOCUMENTS} documents: split the file"
                raise ConfigError(self._file, *_mark(event), "", reason)

    def _check_properties(self, event: yaml.NodeEvent) -> None:
        node = Node(*_mark(event))
        if event.anchor is not None:
            reason = f"the anchor &{event.anchor} is not allowed: remove it"
            self._report(node, self._path(), reason)
        tag = getattr(event, "tag", None)
        if tag is not None:
            reason = f"the tag {quote(tag)} is not allowed: remove it"
            self._report(node, self._path(), reason)

    def _open(self, node: Sequence | Mapping) -> None:
        path = self._path()
        self._add(node)
        if len(self._stack) >= MAX_DEPTH:
            self._give_up(node, path, f"nested deeper than {MAX_DEPTH} levels")
        self._stack.append(_Frame(node, path))

    def _path(self) -> str:
        """Return the path of the node that comes next."""
        if not self._stack:
            return ""
        frame = self._stack[-1]
        if isinstance(frame.node, Sequence):
            return join(frame.path, len(frame.node.items))
        return join(frame.path, frame.key.text) if frame.key else frame.path

    def _add(self, node: Node) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._give_up(node, "", f"more than {MAX_NODES} values: split the file")
        if not self._stack:
            self._roots.append(node)
            return
        frame = self._stack[-1]
        if isinstance(frame.node, Sequence):
            if len(frame.node.items) >= MAX_ITEMS:
                self._give_up(node, frame.path, f"more than {MAX_ITEMS} items")
            frame.node.items.append(node)
        elif frame.key is None:
            frame.key = self._key(node, frame.node, frame.path)
        else:
            # Of two equal keys the first one stays, so that the rest of the document can be read
            # for further errors. The document is refused.
            frame.node.entries.setdefault(frame.key.text, (frame.key, node))
            frame.key = None

    def _key(self, node: Node, mapping: Mapping, path: str) -> Scalar:
        if not isinstance(node, Scalar):
            self._give_up(node, path, "a key must be a word, not an alias, a list or a mapping")
        if node.plain and node.text == "<<":
            self._report(node, path, "the merge key << is not allowed: write the fields here")
        elif node.text in mapping.entries:
            earlier = mapping.entries[node.text][0].line
            reason = f"given twice, first in line {earlier}: remove one"
            self._report(node, join(path, node.text), reason)
        if len(mapping.entries) >= MAX_ITEMS:
            self._give_up(node, path, f"more than {MAX_ITEMS} entries")
        return node

    def _report(self, node: Node, path: str, reason: str) -> None:
        self.errors.append(ConfigError(self._file, node.line, node.column, path, reason))
        if len(self.errors) > MAX_ERRORS:
            self._give_up(node, "", f"more than {MAX_ERRORS} errors: the rest was not read")

    def _give_up(self, node: Node, path: str, reason: str) -> NoReturn:
        raise ConfigError(self._file, node.line, node.column, path, reason)


def _mark(event: yaml.Event) -> tuple[int, int]:
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (0, 0)
