"""`nodeagent doctor`: look at this node from outside its daemons, and say what to do.

This module owns the command. It promises one verdict line at the end, the same exit code with every
form, and an answer while the daemons are down: that is a finding, and no failure of this command.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec

from nodeagent.api import ConfigError
from nodeagent.cli import doctor_view
from nodeagent.cli.config_show import settings_in_force
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.output import Answer, answer, output_option
from nodeagent.cli.reach import UnreachableError, agent_options, get
from nodeagent.cli.status import fetch
from nodeagent.doctor import Agent, Asked, gather, judge
from nodeagent.settings import Settings, load_settings

__all__ = ["doctor"]

DEFAULT_SETTINGS: Final = Path("/etc/nodeagent/nodeagent.yaml")

_OF_INTEREST: Final = frozenset(
    {
        "admin_address",
        "audit.file",
        "bpf_dir",
        "ca_dir",
        "config_dir",
        "node",
        "run_dir",
        "state_dir",
        "trust_domain",
    }
)
"""Settings that say where to look."""

STATE_SCHEMA: Final = 1
MAX_STATE: Final = 512 * 1024 * 1024
"""Bytes of the state that ztunnel holds: 100,000 workloads fit."""


class _State(msgspec.Struct):
    """`/config_dump`, by kind of resource."""

    schema: int
    resources: dict[str, list[dict[str, Any]]]


@click.command()
@agent_options
@output_option()
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
def doctor(
    run_dir: Path | None, settings_file: Path | None, output: str, *, as_json: bool
) -> NoReturn:
    """Examine this node: what is wrong, why, and the command that mends it.

    Looks at the kernel, both daemons, every pod's capture (by a connection of
    its own that no statistics count), certificates, clocks, ports, packet
    filters and disks. Changes nothing; needs root; works while the daemons are
    down. Each finding has a code: docs/doctor.md explains it.

    \b
    Exit codes: 0 nothing is wrong; 1 a finding; 2 wrong usage; 3 it may not
    look (not root).
    """
    if run_dir is not None and settings_file is not None:
        raise click.UsageError("--run-dir and --settings exclude each other")
    if os.geteuid() != 0:
        raise UnreachableError(
            "looking into pods, and at who holds a port, is for root", "run this command as root"
        )
    answer(lambda: _look(run_dir, settings_file), "json" if as_json else output)


def _look(run_dir: Path | None, settings_file: Path | None) -> Answer:
    settings, file, problem = _written(run_dir, settings_file)
    asked = _ask(settings.run_dir)
    if asked.agent.status is not None:
        settings, file = _in_force(settings, file)
    elif run_dir is not None and (file is None or problem):
        raise click.UsageError(
            f"{asked.agent.cause}, so its settings are not known: name the file with --settings"
        )
    report = judge(gather(settings, file, problem, asked))
    return Answer(
        report,
        lambda printer: doctor_view.show(printer, report),
        ExitCode.FINE if report.healthy else ExitCode.FINDING,
    )


def _written(run_dir: Path | None, given: Path | None) -> tuple[Settings, Path | None, str]:
    """Return the settings of a file, and what is wrong with it: then they are the defaults.

    Without a file, or if the one in its usual place is of another agent than that of `run_dir`,
    there is none.
    """
    file = given
    if file is None and DEFAULT_SETTINGS.exists():
        file = DEFAULT_SETTINGS
    settings, problem = Settings(), ""
    if file is not None:
        try:
            settings = load_settings(file)
        except ConfigError as error:
            problem = str(error)
    if run_dir is not None and (problem or settings.run_dir != run_dir):
        return Settings(run_dir=run_dir), None, ""
    return settings, file, problem


def _in_force(settings: Settings, file: Path | None) -> tuple[Settings, Path | None]:
    """Return what the daemon itself goes by, and the file that it was told.

    One of a release that does not say so goes by the file, for all that is known.
    """
    try:
        said = settings_in_force(settings.run_dir)
    except UnreachableError:
        return settings, file
    values = {each.name: each.value for each in said.settings if each.name in _OF_INTEREST}
    paths = {name: Path(value) for name, value in values.items() if name.endswith("_dir")}
    audit = msgspec.structs.replace(settings.audit, file=values.pop("audit.file", ""))
    return msgspec.structs.replace(settings, **(values | paths), audit=audit), Path(said.file)


def _ask(directory: Path) -> Asked:
    try:
        status = fetch(directory)
    except UnreachableError as error:
        return Asked(Agent(None, str(error), error.remedy))
    try:
        state = get(directory, "/config_dump", _State, STATE_SCHEMA, MAX_STATE)
    except UnreachableError:
        # The status has just come: what is missing is whom to try on other nodes.
        return Asked(Agent(status))
    return Asked(Agent(status), state.resources)
