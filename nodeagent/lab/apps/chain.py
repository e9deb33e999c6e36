"""A service of the istioinaction exercise: it answers as JSON what it and those it calls answered.

This module owns that one program, run three times as web-api, recommendation and purchase-history.
It promises an answer in the exercise's own form, with the status of the worst call. It may not know
addresses: it calls its upstreams by the names given.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from nodeagent.lab.apps.web import Answer, Request, as_json, fetch, serve

PORT: Final = 8080
OK: Final = 200
UNREACHABLE: Final = -1
"""The code of a call that brought no answer at all, as in the exercise's original program."""


def _call(url: str) -> dict[str, Any]:
    try:
        status, body = fetch(url)
    except (OSError, http.client.HTTPException) as error:
        return {"uri": url, "code": UNREACHABLE, "error": f"{type(error).__name__}: {error}"}
    answer: dict[str, Any] = {}
    try:
        answer |= json.loads(body)
    except (ValueError, TypeError):
        answer = {"body": body.decode(errors="replace")}
    return answer | {"uri": url, "code": status}


def respond(name: str, message: str, upstreams: list[str], request: Request) -> Answer:
    begun, started = datetime.now(UTC), time.monotonic()
    calls = [_call(url) for url in upstreams]
    good = all(call["code"] == OK for call in calls)
    code = OK if good else 500
    answer: dict[str, Any] = {
        "name": name,
        "uri": request.path,
        "type": "HTTP",
        "ip_addresses": [request.server],
        "start_time": begun.isoformat(),
        "end_time": datetime.now(UTC).isoformat(),
        "duration": f"{(time.monotonic() - started) * 1000:.3f}ms",
        "body": message,
    }
    if calls:
        answer["upstream_calls"] = calls
    return as_json(answer | {"code": code}, code)


def main() -> None:
    parser = argparse.ArgumentParser(prog="chain", description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--message", required=True)
    parser.add_argument("--upstream", action="append", default=[], metavar="http://HOST:PORT")
    parser.add_argument("--port", type=int, default=PORT)
    given = parser.parse_args()
    serve(given.port, partial(respond, given.name, given.message, given.upstream))


if __name__ == "__main__":
    main()
