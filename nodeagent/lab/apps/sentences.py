"""The sentences exercise: `age` answers a number, `name` a name, `sentences` puts both together.

This module owns the three roles of that one program. It promises the answers of the exercise, each
made from real calls. It may not know addresses: it calls `age` and `name` by their names.
"""

from __future__ import annotations

import argparse
import random
from http import HTTPStatus
from typing import Final

from nodeagent.lab.apps.web import Answer, Request, fetch, serve

PORT: Final = 5000
NAMES: Final = {
    "v1": ("Peter", "Ray", "Egon", "Winston"),
    "v2": ("Athos", "Porthos", "Aramis", "d'Artagnan"),
}
YOUNGEST: Final = 1
OLDEST: Final = 99


def age(_request: Request) -> Answer:
    return Answer(str(random.randint(YOUNGEST, OLDEST)).encode())  # noqa: S311 - an exercise


def name(version: str) -> Answer:
    return Answer(random.choice(NAMES[version]).encode())  # noqa: S311 - an exercise


def sentence(age_url: str, name_url: str) -> Answer:
    parts: list[str] = []
    for url in (name_url, age_url):
        status, body = fetch(url)
        if status != HTTPStatus.OK:
            return Answer(f"{url} answered {status}\n".encode(), 502)
        parts.append(body.decode())
    return Answer(f"{parts[0]} is {parts[1]} years.\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="sentences", description=__doc__)
    parser.add_argument("--role", choices=["age", "name", "sentences"], required=True)
    parser.add_argument("--version", choices=sorted(NAMES), default="v1", help="of role name")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--age", default=f"age:{PORT}", metavar="HOST:PORT")
    parser.add_argument("--name", default=f"name:{PORT}", metavar="HOST:PORT")
    given = parser.parse_args()
    programs = {
        "age": age,
        "name": lambda _request: name(given.version),
        "sentences": lambda _request: sentence(given.age, given.name),
    }
    serve(given.port, programs[given.role])


if __name__ == "__main__":
    main()
