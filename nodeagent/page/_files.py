"""The files of the page, from memory.

This module owns the paths below `/ui/`, their media types, validators and security headers. It
promises that only files which were there at the start are served, so no path can lead elsewhere,
and that a page whose drawing library was not built still opens and says so itself. It may not read
anything after the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import ETag, hdrs, web

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["HOME", "READS", "Files", "add_routes", "wants_page"]

HOME: Final = "/ui/"

READS: Final = frozenset({"/status", "/graph", "/asdex", "/report/plaintext", "/connections"})
"""What the page asks for, and so all that whoever may see it gets."""

MAX_FILE_BYTES: Final = 4 * 1024 * 1024
"""Of one file: the drawing library has 0.4 MiB. A larger one is none of ours."""

MEDIA_TYPES: Final[Mapping[str, str]] = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "mjs": "text/javascript",
    "svg": "image/svg+xml",
    "txt": "text/plain",
}
"""Files of other kinds are not served: the browser is told never to guess (nosniff)."""

SECURITY_HEADERS: Final[Mapping[str, str]] = {
    # Everything comes from here, nothing is inline, nobody may frame it, no form is ever sent.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class _File(msgspec.Struct, frozen=True):
    body: bytes
    media_type: str
    etag: str


class Files:
    """The files of the page by the path behind `/ui/`."""

    def __init__(self, root: Traversable) -> None:
        """Read every file below `root`. Raises OSError."""
        self._files = {name: _read(entry) for name, entry in _walk(root, "")}

    @classmethod
    def installed(cls) -> Files:
        """Return the files of this installation."""
        return cls(resources.files("nodeagent.page") / "static")

    def response(self, request: web.Request) -> web.StreamResponse:
        """Return the file that is asked for, or 304 to who has it, or 404."""
        found = self._files.get(request.match_info["path"] or "index.html")
        if found is None:
            text = "no such file of the page; if it ends in cytoscape.mjs: see docs/page.md\n"
            return web.Response(status=404, text=text, headers=SECURITY_HEADERS)
        etag = ETag(found.etag)
        known = request.if_none_match or ()
        response = (
            web.Response(status=304)
            if any(each.value in {found.etag, "*"} for each in known)
            else web.Response(body=found.body, content_type=found.media_type, charset="utf-8")
        )
        response.etag = etag
        response.headers.update(SECURITY_HEADERS)
        # Kept, but asked for anew each time: after an upgrade no old file meets a new one.
        response.headers[hdrs.CACHE_CONTROL] = "no-cache"
        return response


def add_routes(router: web.UrlDispatcher, files: Files) -> None:
    """Serve `files` below `/ui/`."""

    async def serve(request: web.Request) -> web.StreamResponse:
        return files.response(request)

    async def home(_request: web.Request) -> web.Response:
        raise web.HTTPPermanentRedirect(HOME)

    router.add_get(HOME.rstrip("/"), home)
    router.add_get(HOME + "{path:.*}", serve)


def wants_page(request: web.Request) -> bool:
    """Whether `/` was opened by a browser, which is to see the page and no list of paths."""
    return "text/html" in request.headers.get(hdrs.ACCEPT, "")


def _walk(directory: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found: list[tuple[str, Traversable]] = []
    for entry in directory.iterdir():
        if entry.is_dir():
            found += _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.rpartition(".")[2] in MEDIA_TYPES:
            found.append((prefix + entry.name, entry))
    return found


def _read(entry: Traversable) -> _File:
    with entry.open("rb") as stream:
        body = stream.read(MAX_FILE_BYTES + 1)
    if len(body) > MAX_FILE_BYTES:
        raise OSError(f"{entry}: larger than {MAX_FILE_BYTES} bytes; install nodeagent anew")
    etag = hashlib.sha256(body).hexdigest()[:32]
    return _File(body, MEDIA_TYPES[entry.name.rpartition(".")[2]], etag)
