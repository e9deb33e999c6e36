"""The audit log's settings: settings, protocol and documentation agree; mistakes have a place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec
import pytest

from nodeagent.api import ConfigError
from nodeagent.settings import for_tunnel, load_settings
from nodeagent.settings.audit import Section
from ztunnel.protocol import (
    AuditForm,
    AuditSettings,
    Authorized,
    Facility,
    Syslog,
    Transport,
)

PAGE: Final = Path(__file__).parents[2] / "docs" / "configuration.md"
CHAPTER: Final = re.compile(r"^### Audit log$(.*?)^##", re.MULTILINE | re.DOTALL)
ROW: Final = re.compile(r"^\| `(\w+)` \| ([^|]+) \|", re.MULTILINE)


def load(folder: Path, text: str) -> AuditSettings:
    path = folder / "nodeagent.yaml"
    path.write_text(f"node: n1\naudit: {text}\n")
    return for_tunnel(load_settings(path)).audit


def test_the_settings_have_them_all() -> None:
    assert Section.__struct_fields__ == AuditSettings.__struct_fields__


def test_the_page_has_them_all_with_their_defaults() -> None:
    chapter = CHAPTER.search(PAGE.read_text(encoding="utf-8"))
    assert chapter is not None
    rows = dict(ROW.findall(chapter[1]))

    def spelled(value: object) -> str:
        match value:
            case "" | None:
                return "none"
            case bool():
                return f"`{str(value).lower()}`"
            case _:
                return f"`{value}`"

    defaults = msgspec.structs.asdict(AuditSettings())
    assert rows == {name: spelled(value) for name, value in defaults.items()}


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, "{journal: /run/systemd/journal/socket}") == AuditSettings(
        journal="/run/systemd/journal/socket"
    )
    assert load(tmp_path, "{stdout: false}") == AuditSettings(stdout=False)


def test_all_of_them_are_read(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        "{authorized: connections, lines_per_second: 0, form: json, stdout: false, "
        "file: /var/log//ztunnel/audit.log, journal: /run/j, "
        "syslog: 'tcp://[2001:db8::1]:601', facility: local7}",
    )
    assert found == AuditSettings(
        authorized=Authorized.CONNECTIONS,
        lines_per_second=0,
        form=AuditForm.JSON,
        stdout=False,
        file="/var/log/ztunnel/audit.log",
        journal="/run/j",
        syslog=Syslog(Transport.TCP, "2001:db8::1", 601),
        facility=Facility.LOCAL7,
    )
    packed = msgspec.msgpack.encode(found)
    assert msgspec.msgpack.decode(packed, type=AuditSettings) == found


@pytest.mark.parametrize(
    "written, meant",
    [
        ("/dev/log", Syslog(Transport.UNIX, "/dev/log")),
        ("udp://192.0.2.7:514", Syslog(Transport.UDP, "192.0.2.7", 514)),
        ("udp://127.0.0.1:514", Syslog(Transport.UDP, "127.0.0.1", 514)),
        ("tcp://[::1]:601", Syslog(Transport.TCP, "::1", 601)),
    ],
)
def test_receivers_of_syslog(tmp_path: Path, written: str, meant: Syslog) -> None:
    assert load(tmp_path, f"{{syslog: '{written}'}}").syslog == meant


@pytest.mark.parametrize(
    "text, field",
    [
        ("3", "audit"),
        ("{lunch: 3}", "audit.lunch"),
        ("{authorized: some}", "audit.authorized"),
        ("{authorized: none, form: xml}", "audit.form"),
        ("{lines_per_second: -1}", "audit.lines_per_second"),
        ("{lines_per_second: 100001}", "audit.lines_per_second"),
        ("{stdout: 1}", "audit.stdout"),
        ("{file: audit.log}", "audit.file"),
        ("{file: /var/log/}", "audit.file"),
        ("{file: /var/log/../audit}", "audit.file"),
        ('{file: "/var/log/a\\nb"}', "audit.file"),
        ("{journal: true}", "audit.journal"),
        ("{journal: run/journal}", "audit.journal"),
        (f"{{journal: /{'x' * 107}}}", "audit.journal"),
        ("{syslog: syslog.example:514}", "audit.syslog"),
        ("{syslog: 'udp://syslog.example:514'}", "audit.syslog"),
        ("{syslog: 'udp://192.0.2.7'}", "audit.syslog"),
        ("{syslog: 'udp://192.0.2.7:0'}", "audit.syslog"),
        ("{syslog: 'udp://192.0.2.7:65536'}", "audit.syslog"),
        ("{syslog: 'udp://2001:db8::1:514'}", "audit.syslog"),
        ("{syslog: 'tls://192.0.2.7:6514'}", "audit.syslog"),
        ("{syslog: 'udp://192.0.2.7:514\\n'}", "audit.syslog"),
        (f"{{syslog: /{'x' * 107}}}", "audit.syslog"),
        ("{facility: kern}", "audit.facility"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_its_place(
    tmp_path: Path, text: str, field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert caught.value.field == field
