"""Log lines stay single lines, whatever is in a value."""

from __future__ import annotations

import io
import json

import pytest
import structlog

from nodeagent import logs


def line(log_format: str, **values: object) -> str:
    stream = io.StringIO()
    logs.setup("info", log_format, stream)
    structlog.get_logger().info("it happened", **values)
    structlog.get_logger().debug("not shown")
    return stream.getvalue()


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("value", ["a\nb", "\x1b[31mred", "\u2028", 'quo"te\\', "", "x" * 10_000])
def test_one_event_is_one_bounded_line(log_format: str, value: str) -> None:
    text = line(log_format, key=value)
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text
    assert len(text) < 2 * logs.MAX_VALUE


def test_text_is_read_by_people() -> None:
    text = line("text", pod="ns/a@1", reason="two words", number=3)
    assert text.split(" ", 1)[1] == 'info "it happened" pod=ns/a@1 reason="two words" number=3\n'


def test_json_is_read_by_programs() -> None:
    found = json.loads(line("json", key="a\nb", number=3))
    assert found["event"] == "it happened"
    assert found["key"] == "a\nb"
    assert found["number"] == 3
    assert found["level"] == "info"
