"""A document's nodes by path, so that what is found later can still point at its line.

This module owns the way from a path of keys to a node. It promises a place for every path: that of
the deepest node which exists on the way. It may not know what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from nodeagent.api._base import Mark
from nodeagent.api._tree import Mapping, Node, Sequence, join
from nodeagent.api._walk import Walker

__all__ = ["Place"]


class Place:
    """One document of a walker. Keys are names of fields and indices of lists."""

    def __init__(self, walker: Walker, root: Mapping, path: str) -> None:
        self._walker = walker
        self._root = root
        self._path = path

    def _find(self, keys: tuple[str | int, ...]) -> tuple[Node, str]:
        """Return the deepest node that exists on the way, and the path that was asked for."""
        node: Node | None = self._root
        deepest: Node = self._root
        path = self._path
        for key in keys:
            path = join(path, key)
            if isinstance(node, Mapping) and isinstance(key, str):
                node = node.get(key)
            elif isinstance(node, Sequence) and isinstance(key, int):
                node = node.items[key]
            else:
                node = None
            deepest = node or deepest
        return deepest, path

    def has(self, *keys: str | int) -> bool:
        """Return whether the author wrote the field at all."""
        parent, _ = self._find(keys[:-1])
        return isinstance(parent, Mapping) and keys[-1] in parent.entries

    def attempt(
        self, function: Callable[[str, str], None], key: str, value: str, *keys: str | int
    ) -> None:
        """Report as an error what `function` says of `key` and `value`."""
        try:
            function(key, value)
        except ValueError as error:
            self.error(str(error), *keys)

    def error(self, reason: str, *keys: str | int) -> None:
        node, path = self._find(keys)
        self._walker.error(node, path, reason)

    def warn(self, reason: str, *keys: str | int) -> None:
        node, path = self._find(keys)
        self._walker.warn(node, path, reason)

    def mark(self, *keys: str | int, refers: str = "") -> Mark:
        """Return where a field stands."""
        node, path = self._find(keys)
        return Mark(path, node.line, node.column, refers)
