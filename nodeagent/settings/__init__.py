"""The settings of the daemon: who this node is, and where the daemon keeps things.

This module owns the settings file, one YAML mapping of the fields of `Settings`. It promises that
an unknown field or an unusable value stops the start with file, line, column, field and reason,
and that every field has a default that works on a plain node. It may not create directories or
open anything but that file.
"""

from __future__ import annotations

import enum
import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, ClassVar, Final, NamedTuple

import msgspec

from nodeagent.api import Check, ConfigError, read_struct_lines, values
from nodeagent.settings import audit, deadlines, flows, limits, page, traces
from nodeagent.settings.flows import Keep
from nodeagent.settings.page import Page
from ztunnel import protocol
from ztunnel.protocol import AuditSettings, Deadlines, Limits, SameNode, TraceSettings

__all__ = [
    "LogFormat",
    "LogLevel",
    "ReadSettings",
    "Settings",
    "for_tunnel",
    "load_settings",
    "read_settings",
]

MIN_SVID_TTL: Final = 60
"""Seconds. Below this, renewal at two thirds leaves no time for a retry."""

MAX_SVID_TTL: Final = 7 * 24 * 3600
"""Seconds. A stolen SVID is good until it expires; longer than a week nobody rotates anything."""

_MAX_BYTES: Final = 64 * 1024
"""Bytes of the settings file; a sensible one has less than one thousand."""

_CLUSTER: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_ADMIN: Final = re.compile(r"(?:\[([0-9a-f:]+)\]|([0-9.]+)):([1-9][0-9]{0,4})")


class LogFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


class LogLevel(enum.StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _hostname() -> str:
    return os.uname().nodename.lower()


def _node(value: str) -> str:
    return values.dns_subdomain(value)


def _cluster(value: str) -> str:
    if not _CLUSTER.fullmatch(value):
        raise ValueError(f"{value!r} is no cluster id: write letters, digits, '.', '_' and '-'")
    return value


def _directory(value: str) -> Path:
    """Return an absolute path in its one spelling."""
    path = PurePosixPath(values.text(value))
    if not path.is_absolute() or ".." in path.parts or path == PurePosixPath("/"):
        raise ValueError(f"{value!r} is no directory: write an absolute path without '..' parts")
    return Path(path)


def _admin_address(value: str) -> str:
    """Return ADDRESS:PORT; only loopback, for the admin pages are for this node's operator."""
    found = _ADMIN.fullmatch(value)
    if found is not None:
        try:
            host = ipaddress.ip_address(found[1] or found[2])
            port = values.port(int(found[3]))
        except ValueError:
            pass
        else:
            if host.is_loopback:
                return f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"  # noqa: PLR2004 - of IP
            raise ValueError(f"{value!r} is not on loopback: write 127.0.0.1:PORT or [::1]:PORT")
    raise ValueError(f"{value!r} is no address with a port: write 127.0.0.1:PORT or [::1]:PORT")


def _ttl(value: int) -> int:
    if not MIN_SVID_TTL <= value <= MAX_SVID_TTL:
        raise ValueError(f"{value} is not between {MIN_SVID_TTL} and {MAX_SVID_TTL} seconds")
    return value


def _locality(value: str) -> str:
    return values.locality(value) if value else ""


_Path = Annotated[str, Check(_directory)]


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The fields as the file spells them; what is absent takes the default of `Settings`."""

    node: Annotated[str, Check(_node)] | None = None
    cluster: Annotated[str, Check(_cluster)] | None = None
    trust_domain: Annotated[str, Check(values.trust_domain)] | None = None
    root_namespace: Annotated[str, Check(values.dns_label)] | None = None
    locality: Annotated[str, Check(_locality)] | None = None
    node_addresses: tuple[Annotated[str, Check(values.address)], ...] | None = None
    run_dir: _Path | None = None
    state_dir: _Path | None = None
    config_dir: _Path | None = None
    bpf_dir: _Path | None = None
    ca_dir: _Path | None = None
    svid_ttl_seconds: Annotated[int, Check(_ttl)] | None = None
    admin_address: Annotated[str, Check(_admin_address)] | None = None
    log_format: LogFormat | None = None
    log_level: LogLevel | None = None
    same_node: SameNode | None = None
    node_plaintext: bool | None = None
    deadlines: deadlines.Section | None = None
    limits: limits.Section | None = None
    audit: audit.Section | None = None
    flows: flows.Section | None = None
    page: page.Section | None = None
    traces: traces.Section | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings in force. `load_settings` validates; making one in a program does not.

    `node_addresses` are this node's own addresses: no workload or service may claim one.
    `config_dir` is the watched directory of the `files` source. `run_dir` holds the sockets,
    `state_dir` what must survive a restart, `ca_dir` the embedded CA (by default in `state_dir`;
    the nodes of one lab share one). `admin_address` is ADDRESS:PORT on loopback.
    `same_node` is how connections between two pods of this node go; DIRECT is not encrypted.
    `node_plaintext` lets plaintext from `node_addresses` pass STRICT, for the kubelet's probes.
    `flows` is how long, and in how much room, it is remembered who has called.
    `traces` is where spans of connections go, and of how many.
    `page` is where else than at `admin_address` the web page is shown.
    """

    SECTIONS: ClassVar = ("deadlines", "limits", "audit", "flows", "page", "traces")
    """Fields that have fields of their own."""

    node: str = msgspec.field(default_factory=_hostname)
    cluster: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    locality: str = ""
    node_addresses: tuple[str, ...] = ()
    run_dir: Path = Path("/run/nodeagent")
    state_dir: Path = Path("/var/lib/nodeagent")
    config_dir: Path = Path("/etc/nodeagent/mesh.d")
    bpf_dir: Path = Path("/sys/fs/bpf/nodeagent")
    ca_dir: Path = Path()
    svid_ttl_seconds: int = 3600
    admin_address: str = "127.0.0.1:15000"
    log_format: LogFormat = LogFormat.TEXT
    log_level: LogLevel = LogLevel.INFO
    same_node: SameNode = SameNode.HBONE
    node_plaintext: bool = False
    deadlines: Deadlines = Deadlines()
    limits: Limits = Limits()
    audit: AuditSettings = AuditSettings()
    flows: Keep = Keep()
    page: Page = Page()
    traces: TraceSettings = TraceSettings()

    def __post_init__(self) -> None:
        if self.ca_dir == Path():
            msgspec.structs.force_setattr(self, "ca_dir", self.state_dir / "ca")


class ReadSettings(NamedTuple):
    """Settings, and the line of each that the file sets, by its full name (`limits.dials`)."""

    settings: Settings
    lines: Mapping[str, int]


def load_settings(path: str | os.PathLike[str]) -> Settings:
    """Return the settings in the file `path`. Raises ConfigError if it is not exactly right."""
    return read_settings(path).settings


def read_settings(path: str | os.PathLike[str]) -> ReadSettings:
    """Return the settings in the file `path`, and where. Raises ConfigError as `load_settings`."""
    file = os.fspath(path)
    found, lines = read_struct_lines(_read(file), file, _File)
    given = {
        name: value for name, value in msgspec.structs.asdict(found).items() if value is not None
    }
    given["deadlines"] = deadlines.resolve(found.deadlines)
    given["limits"] = limits.resolve(found.limits)
    given["audit"] = audit.resolve(found.audit)
    given["flows"] = flows.resolve(found.flows)
    given["traces"] = traces.resolve(found.traces)
    try:
        given["page"] = page.resolve(found.page)
    except ValueError as error:
        places = (at for name, at in lines.items() if name.partition(".")[0] == "page")
        raise ConfigError(file, min(places, default=0), 1, "page", str(error)) from None
    settings = Settings(**given)
    try:
        _node(settings.node)
    except ValueError as error:
        reason = f"the host's name cannot be used ({error}): add the field"
        raise ConfigError(file, 0, 0, "node", reason) from None
    if settings.node_plaintext and not settings.node_addresses:
        reason = "has no effect without node_addresses: add this node's own addresses"
        raise ConfigError(file, 0, 0, "node_plaintext", reason)
    return ReadSettings(settings, lines)


def for_tunnel(settings: Settings) -> protocol.Settings:
    """Return what ztunnel is told of the settings."""
    return protocol.Settings(
        settings.node,
        settings.cluster,
        settings.trust_domain,
        settings.locality,
        settings.node_addresses,
        settings.deadlines,
        settings.same_node,
        settings.limits,
        settings.node_plaintext,
        settings.audit,
        settings.traces,
    )


def _read(file: str) -> bytes:
    """Return the bytes of a regular file that not everybody may write, or raise ConfigError."""
    try:
        with open(file, "rb", opener=_opener) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(file, 0, 0, "", "is not a regular file")
            if mode & stat.S_IWOTH:
                raise ConfigError(file, 0, 0, "", "anybody may write it: run chmod o-w on it")
            data = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(file, 0, 0, "", f"cannot be read: {reason}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(file, 0, 0, "", f"larger than {_MAX_BYTES} bytes")
    return data


def _opener(path: str, flags: int) -> int:
    # Not blocking: a FIFO in its place must not hang the start.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
