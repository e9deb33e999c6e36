"""The httpbin of the istioinaction exercise, as far as exercises ask it.

This module owns `/headers`, `/get`, `/ip`, `/status/CODE`, `/bytes/N` and `/anything`. It promises
that what it shows is what arrived. It may not know the mesh.
"""

from __future__ import annotations

import argparse
from http import HTTPStatus
from typing import Final

from nodeagent.lab.apps.web import Answer, Request, as_json, serve

PORT: Final = 8000
MAX_BYTES: Final = 16 * 1024 * 1024
"""Of `/bytes/N`: as much as one answer of this program may take of memory."""


def _number(text: str, least: int, most: int) -> int | None:
    if text.isascii() and text.isdecimal() and len(text) <= len(str(most)):
        number = int(text)
        return number if least <= number <= most else None
    return None


def respond(request: Request) -> Answer:
    path = request.path.partition("?")[0]
    headers = {"headers": dict(sorted(request.headers.items()))}
    host = request.headers.get("Host", request.server)
    shown = headers | {"origin": request.client, "url": f"http://{host}{request.path}"}
    match path.strip("/").split("/"):
        case ["headers"]:
            return as_json(headers)
        case ["ip"]:
            return as_json({"origin": request.client})
        case ["get"]:
            return as_json(shown)
        case ["anything", *_] | ["post"]:
            body = request.body.decode(errors="replace")
            return as_json(shown | {"method": request.method, "data": body})
        case ["status", code] if (status := _number(code, 200, 599)) is not None:
            return Answer(b"", status)
        case ["bytes", count] if (size := _number(count, 0, MAX_BYTES)) is not None:
            return Answer(b"x" * size, kind="application/octet-stream")
    return Answer(f"no such page: {path}\n".encode(), HTTPStatus.NOT_FOUND)


def main() -> None:
    parser = argparse.ArgumentParser(prog="httpbin", description=__doc__)
    parser.add_argument("--port", type=int, default=PORT)
    serve(parser.parse_args().port, respond)


if __name__ == "__main__":
    main()
