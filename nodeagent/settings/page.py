"""The section `page` of the settings: where else the web page is shown, and to whom.

This module owns the section's fields. It promises that what it returns is complete, that the page
is shown beyond the admin listener only with a token, and beyond loopback only over TLS; else the
mistake is told. It may not open the files; `nodeagent.page` does.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Final

import msgspec

from nodeagent.api import Check, values

__all__ = ["Page", "Section", "resolve"]

_ADDRESS: Final = re.compile(r"(?:\[([0-9a-fA-F:]+)\]|([0-9.]+)):([1-9][0-9]{0,4})")


def _address(value: str) -> str:
    found = _ADDRESS.fullmatch(value)
    if found is not None:
        try:
            host = ipaddress.ip_address(found[1] or found[2])
            port = values.port(int(found[3]))
        except ValueError:
            pass
        else:
            return f"[{host}]:{port}" if found[1] else f"{host}:{port}"
    raise ValueError(f"{value!r} is no address with a port: write 192.0.2.1:15010 or [::]:15010")


def _file(value: str) -> Path:
    path = PurePosixPath(values.text(value))
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{value!r} is no file: write an absolute path without '..' parts")
    return Path(path)


_Path = Annotated[str, Check(_file)]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them."""

    address: Annotated[str, Check(_address)] | None = None
    token_file: _Path | None = None
    certificate_file: _Path | None = None
    key_file: _Path | None = None


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A further listener for the page; `address` is empty when there is none.

    `certificate_file` and `key_file` are None where it speaks plain HTTP, on loopback.
    """

    address: str = ""
    token_file: Path = Path()
    certificate_file: Path | None = None
    key_file: Path | None = None


def resolve(section: Section | None) -> Page:
    """Return what is in force. Raises ValueError if what is given does not go together."""
    if section is None:
        return Page()
    if section.address is None:
        raise ValueError("says nothing without an address: add page.address, or remove the section")
    if section.token_file is None:
        raise ValueError(
            "page.address shows names of workloads: add page.token_file, with a token in it"
        )
    if (section.certificate_file is None) != (section.key_file is None):
        raise ValueError("certificate_file and key_file belong together: add the other one")
    host = section.address.rpartition(":")[0].strip("[]")
    if section.certificate_file is None and not ipaddress.ip_address(host).is_loopback:
        raise ValueError(
            "beyond loopback the token must not travel in the clear: "
            "add page.certificate_file and page.key_file"
        )
    given = msgspec.structs.asdict(section)
    return Page(**{name: value for name, value in given.items() if value is not None})
