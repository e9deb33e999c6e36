"""`nodeagent run`: the daemon; and `nodeagent uninstall`: take this node's pods out of the mesh.

This module owns the two commands that change the node. It promises that the process is hardened
before it reads a key, that a start that fails says why and what to do, and that `uninstall` refuses
to work beside a running daemon, which would enrol again what it removes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Final, NoReturn

import click
import structlog

from nodeagent import build, logs, process
from nodeagent.admin.settings import SettingsReport, settings_report
from nodeagent.api import ConfigError
from nodeagent.cli.ending import say
from nodeagent.daemon import DaemonError, serve
from nodeagent.rundir import RunDirectory, RunDirectoryError
from nodeagent.sdnotify import ServiceManager, StoredDescriptor, stored_descriptors
from nodeagent.settings import ReadSettings, Settings, load_settings, read_settings

__all__ = ["SLOW_THREADS", "run", "uninstall"]

FAILED: Final = 1
SLOW_THREADS: Final = 4
"""For what the loop must not wait for: reading files, building the mesh, signing, looking processes
up. Python and disk, so more gain nothing, and without a bound there would be 32 on a large node."""

DEFAULT_SETTINGS: Final = Path("/etc/nodeagent/nodeagent.yaml")

log = structlog.get_logger()

_settings = click.option(
    "--settings",
    "settings_file",
    type=click.Path(path_type=Path),
    default=DEFAULT_SETTINGS,
    show_default=True,
    help="The daemon's settings file.",
)


@click.command()
@_settings
def run(settings_file: Path) -> None:
    """Run the node agent until SIGTERM, or until SIGHUP finds settings that can be used.

    Ending it changes nothing: pods stay captured, and ztunnel goes on with the state it has.
    """
    stored = stored_descriptors(os.environ)
    manager = ServiceManager(os.environ)
    process.harden()
    found = _load(settings_file)
    settings = found.settings
    # By the path that leads there from anywhere: a command may run elsewhere.
    told = settings_report(str(settings_file.absolute()), found)
    logs.setup(settings.log_level.value, settings.log_format.value)
    try:
        directory = RunDirectory(settings.run_dir)
        try:
            asyncio.run(_run(settings, told, directory, manager, stored, settings_file))
        finally:
            directory.close()
    except (RunDirectoryError, DaemonError) as error:
        _fail(str(error))


async def _run(
    settings: Settings,
    told: SettingsReport,
    directory: RunDirectory,
    manager: ServiceManager,
    stored: Iterable[StoredDescriptor],
    settings_file: Path,
) -> None:
    def objection() -> str:
        try:
            load_settings(settings_file)
        except ConfigError as error:
            return str(error)
        return ""

    slow = ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="slow")
    asyncio.get_running_loop().set_default_executor(slow)
    built = build.build(settings, _version(), manager, stored)
    try:
        await serve(built.agent, directory, manager, built.probe, objection, told)
    finally:
        await built.close()


@click.command()
@_settings
@click.option("--yes", is_flag=True, help="Do it. Without, only say what would be removed.")
def uninstall(settings_file: Path, *, yes: bool) -> None:
    """Take every pod of this node out of the mesh: their traffic goes in plaintext afterwards.

    Removes rules, programs, sysctls and pins of every pod, as if the agent had never run. Stop
    nodeagent first, and ztunnel afterwards. The CA and the configuration stay.
    """
    process.harden()
    settings = _load(settings_file).settings
    logs.setup("warning", settings.log_format.value)
    try:
        directory = RunDirectory(settings.run_dir)
    except RunDirectoryError as error:
        _fail(str(error))
    try:
        left = asyncio.run(_uninstall(settings, really=yes))
    finally:
        directory.close()
    if left:
        _fail(f"{left} of this node's pods are still captured")


async def _uninstall(settings: Settings, *, really: bool) -> int:
    """Remove every capture; return how many are left."""
    built = build.build(settings, _version(), ServiceManager({}), ())
    left = 0
    try:
        async for pod in built.uninstall(really=really):
            if pod.error:
                left += 1
                say(f"error: {pod.error}")
            else:
                click.echo(f"{'removed' if really else 'would remove'} {pod.uid} ({pod.netns})")
    finally:
        await built.close()
    if not really:
        say("nothing was changed; add --yes to do it")
    return left


def _load(path: Path) -> ReadSettings:
    try:
        return read_settings(path)
    except ConfigError as error:
        _fail(str(error))


def _version() -> str:
    try:
        return installed_version("nodeagent")
    except PackageNotFoundError:
        return "source"


def _fail(message: str) -> NoReturn:
    say(f"error: {message}")
    sys.exit(FAILED)
