"""The connections that are there: asked of every ztunnel of this node, page by page.

This module owns the published shape of `/connections` and the putting together of its pages. It
promises that within one `SCHEMA` fields are only added, never renamed, retyped or removed; that an
upgrade hides nothing (the ztunnel that is being replaced still carries what it had, and is asked
too); and that a snapshot that cannot be had whole is an error and no part of it. It may not look
into a connection: what ztunnel says is passed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Final, Generic, Protocol, TypeVar

import msgspec

from ztunnel import protocol

__all__ = ["SCHEMA", "Asked", "Carried", "Connections"]

SCHEMA: Final = 1
"""Raised when a field changes its meaning; readers refuse what they do not know."""

PAGE_SECONDS: Final = 3.0
"""For one page: ztunnel gives up on its core after two."""

C = TypeVar("C")


class Connections(msgspec.Struct, Generic[C], frozen=True, kw_only=True):
    """Connections of one moment, the newest first.

    `total` are those that were asked for, of which `connections` may be cut at a limit; `missed`
    are those that a snapshot had no room for, whatever they are.
    """

    schema: int
    time: datetime
    node: str
    total: int
    missed: int
    connections: list[C]


class Asked(Protocol):
    """A ztunnel (`session.Session`)."""

    async def query(self, what: str, args: dict[str, str], seconds: float) -> bytes:
        """Return the JSON of its answer. Raises session.QueryError."""


class Carried:
    """What the ztunnels of a node carry. `asked` are those that are there now, in their order."""

    def __init__(self, node: str, asked: Callable[[], Sequence[Asked]]) -> None:
        self._node = node
        self._asked = asked
        self._one = asyncio.Lock()
        """ztunnel keeps the pages of one snapshot."""

    async def take(self, wanted: protocol.ConnectionFilter) -> Connections[msgspec.Raw]:
        """Return a snapshot. Raises what `Asked.query` raises, and msgspec.DecodeError."""
        async with self._one:
            asked = self._asked()
            try:
                books = [await _pages(each, wanted.written()) for each in asked]
            except Exception:
                # One that was being replaced may have ended meanwhile, and what it carried with it.
                if (left := self._asked()) == asked:
                    raise
                books = [await _pages(each, wanted.written()) for each in left]
        connections = [each for book in books for page in book for each in page.connections]
        return Connections(
            schema=SCHEMA,
            time=books[0][0].time,
            node=self._node,
            total=sum(book[0].total for book in books),
            missed=sum(book[0].missed for book in books),
            connections=connections[: wanted.limit] if wanted.limit else connections,
        )


async def _pages(asked: Asked, args: Mapping[str, str]) -> list[protocol.ConnectionPage]:
    first = await _page(asked, dict(args))
    pages = [first]
    while len(pages) < first.pages:
        where = {"snapshot": str(first.snapshot), "page": str(len(pages))}
        pages.append(await _page(asked, where))
    return pages


async def _page(asked: Asked, args: dict[str, str]) -> protocol.ConnectionPage:
    body = await asked.query("connections", args, PAGE_SECONDS)
    return msgspec.json.decode(body, type=protocol.ConnectionPage)
