"""Where spans go, and of how many connections: settings, defaults and documentation agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import msgspec
import pytest

from nodeagent.api import ConfigError
from nodeagent.settings import for_tunnel, load_settings
from nodeagent.settings.traces import Section, endpoint
from ztunnel.protocol import Receiver, TraceSettings

PAGE: Final = Path(__file__).parents[2] / "docs" / "configuration.md"
CHAPTER: Final = re.compile(r"^### Traces$(.*?)^#", re.MULTILINE | re.DOTALL)
ROW: Final = re.compile(r"^\| `(\w+)` \| ([^|]+) \|", re.MULTILINE)


def load(tmp_path: Path, text: str) -> TraceSettings:
    path = tmp_path / "nodeagent.yaml"
    path.write_text(f"node: node-1\n{text}")
    settings = load_settings(path)
    assert for_tunnel(settings).traces == settings.traces
    return settings.traces


def test_the_page_has_all_fields_with_their_defaults() -> None:
    chapter = CHAPTER.search(PAGE.read_text(encoding="utf-8"))
    assert chapter is not None
    rows = dict(ROW.findall(chapter[1]))
    assert tuple(rows) == Section.__struct_fields__ == TraceSettings.__struct_fields__
    assert rows == {
        "endpoint": "none",
        "ca_file": "none",
        "sample_one_in": f"`{TraceSettings().sample_one_in}`",
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ("http://127.0.0.1:4318", Receiver("127.0.0.1", 4318)),
        ("http://127.0.0.1:4318/", Receiver("127.0.0.1", 4318)),
        ("http://[fd00::1]:80/otlp/node-1", Receiver("fd00::1", 80, "/otlp/node-1")),
        ("http://collector:4318", Receiver("collector", 4318)),
        ("https://otlp.example.com:443/x", Receiver("otlp.example.com", 443, "/x", tls=True)),
        ("https://[fd00::1]:4318", Receiver("fd00::1", 4318, tls=True)),
    ],
)
def test_a_receiver_is_read_and_spelled(tmp_path: Path, text: str, expected: Receiver) -> None:
    assert load(tmp_path, f"traces: {{endpoint: '{text}'}}\n") == TraceSettings(endpoint=expected)
    assert endpoint(expected) == text.rstrip("/")


@pytest.mark.parametrize(
    "wrong",
    [
        "https://127.0.0.1",
        "http://10.0.0.256:4318",
        "http://1.2.3:4318",
        "http://-collector:4318",
        "http://a..b:4318",
        "http://a_b:4318",
        "http://" + "a" * 64 + ":4318",
        "http://" + "a." * 126 + "ab:4318",
        "http://[collector]:4318",
        "ftp://127.0.0.1:4318",
        "http://127.0.0.1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:65536",
        "http://::1:4318",
        "http://127.0.0.1:4318/a?b=c",
        "http://127.0.0.1:4318/a b",
        "http://u:p@127.0.0.1:4318",
        "127.0.0.1:4318",
        "http://127.0.0.1:4318" + "/a" * 101,
        "http://127.0.0.1:4318\n",
        "",
    ],
)
def test_what_is_no_receiver_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"traces\.endpoint"):
        load(tmp_path, f"traces: {{endpoint: {msgspec.json.encode(wrong).decode()}}}\n")


def test_whose_certificates_are_accepted_is_a_file(tmp_path: Path) -> None:
    assert load(tmp_path, "traces: {ca_file: /etc/ssl/otlp.pem}\n").ca_file == "/etc/ssl/otlp.pem"
    with pytest.raises(ConfigError, match=r"traces\.ca_file"):
        load(tmp_path, "traces: {ca_file: otlp.pem}\n")


@pytest.mark.parametrize("value", [0, 1, 100, 1_000_000])
def test_one_in_so_many_is_sampled(tmp_path: Path, value: int) -> None:
    found = load(tmp_path, f"traces: {{sample_one_in: {value}}}\n")
    assert (found.sample_one_in, found.endpoint) == (value, None)


@pytest.mark.parametrize("value", ["-1", "1000001", "0.5", "half"])
def test_a_number_out_of_range_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"traces\.sample_one_in"):
        load(tmp_path, f"traces: {{sample_one_in: {value}}}\n")


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    assert load(tmp_path, "") == TraceSettings()
    with pytest.raises(ConfigError, match="unknown field"):
        load(tmp_path, "traces: {ratio: 5}\n")
