"""The published shape of `/settings`: what is set, to what, and where it comes from.

This module owns the types that `/settings` encodes and a command decodes. It promises that within
one `SETTINGS_SCHEMA` fields are only added. Settings hold no secrets. Pure: no sockets, no clocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from nodeagent.settings import ReadSettings, Settings, audit, traces
from ztunnel.protocol import Receiver, Syslog

__all__ = ["SETTINGS_SCHEMA", "SettingReport", "SettingsReport", "settings_report"]

SETTINGS_SCHEMA: Final = 1


class SettingReport(msgspec.Struct, frozen=True, kw_only=True):
    """One setting by its full name (`limits.dials`), with the value in force and the default.

    `line` is where the file sets it; 0: the file does not, and the default is in force.
    """

    name: str
    value: Any
    default: Any
    line: int = 0


class SettingsReport(msgspec.Struct, frozen=True, kw_only=True):
    """`file` is where the daemon has read its settings at its start."""

    schema: int = SETTINGS_SCHEMA
    file: str
    settings: tuple[SettingReport, ...]


def settings_report(file: str, found: ReadSettings) -> SettingsReport:
    """Return every setting of `found`, read from `file`, in the order of the documentation."""
    # A default that follows from another setting follows from the one in force.
    defaults = _flat(Settings(node=Settings().node, state_dir=found.settings.state_dir))
    defaults["state_dir"] = str(Settings().state_dir)
    return SettingsReport(
        file=file,
        settings=tuple(
            SettingReport(
                name=name,
                value=value,
                default=defaults[name],
                line=found.lines.get(name, 0),
            )
            for name, value in _flat(found.settings).items()
        ),
    )


def _flat(settings: Settings) -> dict[str, Any]:
    """Return the settings by their full names: those of a section have its name in front."""
    found: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(settings).items():
        if name in Settings.SECTIONS:
            for below, each in msgspec.structs.asdict(value).items():
                found[f"{name}.{below}"] = _plain(each)
        else:
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:  # noqa: ANN401 - a setting's
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Syslog):
        return audit.receiver(value)
    if isinstance(value, Receiver):
        return traces.endpoint(value)
    # As it comes back from JSON.
    return list(value) if isinstance(value, tuple) else msgspec.to_builtins(value)
