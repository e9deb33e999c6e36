"""The guard before a listener that anybody may reach.

This module owns what such a listener answers. It promises that without the token nothing is told
but that one is needed, and with it nothing but the page and what the page asks for. It may not
compare tokens by itself; `Gate` does.
"""

from __future__ import annotations

import time

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from nodeagent.page._access import Gate, Verdict
from nodeagent.page._files import HOME, READS

__all__ = ["behind"]


def behind(gate: Gate) -> Middleware:
    """Return the guard of a listener that anybody may reach: what the page needs, with a token."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get(hdrs.AUTHORIZATION, "")
        verdict = gate.judge(request.remote or "", given, time.monotonic())
        if verdict is Verdict.SLOWED:
            raise web.HTTPTooManyRequests(text="too many wrong tokens: wait a minute\n")
        if verdict is Verdict.UNKNOWN:
            raise web.HTTPUnauthorized(
                text="the token of page.token_file is the password; any user name will do\n",
                headers={hdrs.WWW_AUTHENTICATE: 'Basic realm="nodeagent", charset="UTF-8"'},
            )
        if request.path in READS or request.path.startswith(HOME.rstrip("/")):
            return await handler(request)
        if request.path == "/":
            raise web.HTTPPermanentRedirect(HOME)
        raise web.HTTPNotFound(text="not served here: see /ui/\n")

    return guard
