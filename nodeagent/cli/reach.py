"""The way from a command to the running daemon, over its admin socket.

This module owns one HTTP request on a unix socket and what can go wrong with it. It promises that
every failure says its cause and what to do, and that neither a silent daemon nor an endless answer
keeps a command for ever. It may not know what is asked.
"""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import click
import msgspec

from nodeagent.api import ConfigError
from nodeagent.cli.ending import ExitCode
from nodeagent.cli.text import printable_lines
from nodeagent.rundir import ADMIN_SOCKET
from nodeagent.settings import Settings, load_settings

__all__ = [
    "EXIT_UNREACHABLE",
    "UnreachableError",
    "agent_options",
    "get",
    "report",
    "run_directory",
]

EXIT_UNREACHABLE: Final = ExitCode.UNREACHABLE

SILENCE_SECONDS: Final = 10.0
"""The daemon itself waits at most a few seconds for ztunnel's part."""

WHOLE_SECONDS: Final = 60.0
"""For the answer to its end: the longest, of 256 MB, takes a few seconds on a busy machine."""

SAID_OF_AN_ERROR: Final = 200
"""Characters of what the daemon says of an error of its own: it says it in a line."""

OTHER_RELEASE: Final = "use the nodeagent command of the daemon's own release"

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])


class UnreachableError(click.ClickException):
    """The daemon did not answer; the message is the cause, `remedy` what to do.

    Not caught, it ends a command by itself: said on standard error, exit code 3.
    """

    exit_code = EXIT_UNREACHABLE

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.remedy = remedy

    def show(self, file: IO[Any] | None = None) -> None:
        text = printable_lines(f"error: {self}\n  do: {self.remedy}")
        click.echo(text, file=file, err=True)


class _PatientSocket(socket.socket):
    """Waits for each piece of an answer, but not for one piece after the other without end."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX)
        self.settimeout(SILENCE_SECONDS)
        self._end = time.monotonic() + WHOLE_SECONDS

    def recv_into(self, *arguments: Any) -> int:  # noqa: ANN401 - socket's own signature
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(min(left, SILENCE_SECONDS))
        return super().recv_into(*arguments)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = _PatientSocket()
        self.sock.connect(os.fspath(self._path))


class _SchemaOnly(msgspec.Struct):
    schema: int


def get(directory: Path, resource: str, kind: type[A], schema: int, most: int) -> A:
    """Ask the daemon of a run directory for `resource`, a JSON document with a `schema`.

    `most` is how many bytes the answer may have. Raises UnreachableError.
    """
    body = _request(directory / ADMIN_SOCKET, resource, most)
    try:
        spoken = msgspec.json.decode(body, type=_SchemaOnly).schema
        if spoken != schema:
            raise UnreachableError(
                f"the daemon speaks {_page(resource)} schema {spoken}, this command {schema}",
                OTHER_RELEASE,
            )
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnreachableError(
            f"nodeagent's answer is not understood: {error}",
            OTHER_RELEASE,
        ) from error


def _page(resource: str) -> str:
    return resource.partition("?")[0].strip("/")


def _request(path: Path, resource: str, most: int) -> bytes:
    connection = _UnixConnection(path)
    try:
        connection.request("GET", resource)
        with connection.getresponse() as response:
            body = response.read(most + 1)
    except FileNotFoundError as error:
        raise UnreachableError(
            f"nodeagent does not run here: no {path}",
            "start it (systemctl start nodeagent), or name its run directory with --run-dir",
        ) from error
    except PermissionError as error:
        raise UnreachableError(f"{path}: permission denied", "run this command as root") from error
    except ConnectionRefusedError as error:
        raise UnreachableError(
            f"nodeagent has stopped without cleaning up: nobody listens on {path}",
            "journalctl -u nodeagent; systemctl start nodeagent",
        ) from error
    except TimeoutError as error:
        raise UnreachableError(
            f"nodeagent did not answer within {SILENCE_SECONDS:g} s, or not to the end "
            f"within {WHOLE_SECONDS:g} s",
            "journalctl -u nodeagent; systemctl restart nodeagent (connections stay)",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise UnreachableError(f"{path}: {error}", "journalctl -u nodeagent") from error
    finally:
        connection.close()
    if len(body) > most:
        raise UnreachableError(
            f"nodeagent's answer has more than {most} bytes",
            "ask for less, if the command has options for it, or name files to answer by",
        )
    if response.length:
        # http.client says so only of an answer that is read without a bound.
        raise UnreachableError(
            f"nodeagent's answer ended {response.length} bytes too early", "journalctl -u nodeagent"
        )
    if response.status == http.HTTPStatus.NOT_FOUND:
        raise UnreachableError(f"nodeagent knows no /{_page(resource)}", OTHER_RELEASE)
    if response.status != http.HTTPStatus.OK:
        said = body.decode(errors="replace").strip()[:SAID_OF_AN_ERROR]
        raise UnreachableError(
            f"nodeagent answered {response.status}: {said}", "journalctl -u nodeagent"
        )
    return body


def report(error: UnreachableError) -> None:
    """Say on standard error why the daemon did not answer, and what to do."""
    error.show()


def agent_options(command: F) -> F:
    """Add `--run-dir` and `--settings`, passed as `run_dir` and `settings_file`: which daemon."""
    run_dir = click.option(
        "--run-dir",
        # Who may not look into it is told to be root, as with the default.
        type=click.Path(path_type=Path, readable=False),
        help=f"The daemon's run directory.  [{Settings().run_dir}]",
    )
    settings = click.option(
        "--settings",
        "settings_file",
        type=click.Path(path_type=Path),
        help="Take the run directory from this settings file.",
    )
    return run_dir(settings(command))


def run_directory(run_dir: Path | None, settings_file: Path | None) -> Path:
    """Return the daemon's run directory by the options of a command, one of them at most."""
    if run_dir is not None and settings_file is not None:
        raise click.UsageError("--run-dir and --settings exclude each other")
    if run_dir is not None:
        return run_dir
    if settings_file is None:
        return Settings().run_dir
    try:
        return load_settings(settings_file).run_dir
    except ConfigError as error:
        raise click.UsageError(str(error)) from error
