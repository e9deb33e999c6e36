"""The commands `nodeagent lab …`.

This module owns how labs are asked for and shown on the command line. It promises the exit codes of
the group, tables for people and JSON for programs, and that an interrupted `up` or `demo` removes
what it made. It may not build, remove or judge anything itself.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar

import click
import msgspec

from nodeagent.api import ConfigError
from nodeagent.cli import RefusedInputError
from nodeagent.cli.ending import ExitCode, say
from nodeagent.cli.output import DOCUMENTS, Answer, Printer, answer, output_option, write_document
from nodeagent.cli.table import Column, Tone
from nodeagent.cli.text import moment
from nodeagent.lab import Lab, LabError, UnknownPodError, exercises, load, load_exercise
from nodeagent.lab.model import DEFAULT_BASE, LabSpec
from nodeagent.lab.store import Store

if TYPE_CHECKING:
    from types import FrameType

    from nodeagent.lab.report import LabReport

__all__ = ["lab"]

SCHEMA: Final = 1
"""Of each document: fields are only added."""

_DAEMONS: Final = ("nodeagent", "ztunnel")

P = ParamSpec("P")
R = TypeVar("R")


class _Labs(msgspec.Struct, frozen=True, kw_only=True):
    schema: int = SCHEMA
    labs: tuple[Any, ...]


def _errors(command: Callable[P, R]) -> Callable[P, R]:
    """Show the lab's errors as messages."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            raise RefusedInputError(str(error)) from None
        except UnknownPodError as error:
            raise click.UsageError(str(error)) from None
        except LabError as error:
            raise click.ClickException(str(error)) from None

    return wrapper


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn the first signal that asks for the end into KeyboardInterrupt, and ignore the next ones:
    removing is under way by then.
    """

    def once(_number: int, _frame: FrameType | None) -> None:
        for number in ends:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, once) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(what: str) -> LabSpec:
    """Return the exercise of this name, or what the file says."""
    if what in exercises():
        return load_exercise(what)
    path = Path(what)
    try:
        return load(path)
    except OSError as error:
        known = ", ".join(exercises())
        raise click.UsageError(
            f"{what} cannot be read ({error.strerror}), and no exercise has this name: {known}"
        ) from None


def _chosen(base: Path, name: str) -> Lab:
    """Return the lab of this name; without a name the only one."""
    if name:
        return Lab(name, base)
    names = Store.names(base)
    if len(names) == 1:
        return Lab(names[0], base)
    if names:
        raise click.UsageError(f"several labs are up: say which with --lab: {', '.join(names)}")
    raise LabError(f"no lab is up; start one: nodeagent lab up {exercises()[0]}")


@click.group()
@click.option(
    "--base",
    type=click.Path(path_type=Path, readable=False),
    default=DEFAULT_BASE,
    show_default=True,
    envvar="NODEAGENT_LAB_BASE",
    help="Directory that holds the labs.",
)
@click.pass_context
def lab(ctx: click.Context, base: Path) -> None:
    """Nodes, pods and a network on this machine alone, to try the mesh.

    \b
    nodeagent lab demo                     two nodes, real traffic, and the wire
    nodeagent lab exercise istioinaction   a rollout of mutual TLS, step by step
    nodeagent lab up sentences             an exercise that comes with the agent
    nodeagent lab exec client -- curl -s sentences:5000
    nodeagent lab down

    Every node is a network namespace with its own two daemons, every pod one with its own names and
    addresses. Nothing is made in the machine's own network. Needs root.
    """
    ctx.obj = base


@lab.command(short_help="Build a lab from a file, or an exercise.")
@click.argument("what", metavar="FILE|NAME")
@click.option("--name", default="", help="Call the lab so, instead of as its file says.")
@click.option("--no-daemons", is_flag=True, help="Only the network and the programs: no mesh.")
@click.pass_obj
@_errors
def up(base: Path, what: str, name: str, no_daemons: bool) -> None:  # noqa: FBT001 - click passes it by name
    """Build the lab that a file describes, or an exercise: sentences, istioinaction.

    Returns when both daemons of every node are ready and every program listens. When that fails,
    the ends of the logs are shown and everything is removed.
    """
    spec = _describe(what)
    if name:
        spec = msgspec.structs.replace(spec, name=name)
    with _interruptible():
        Lab.up(spec, base=base, daemons=not no_daemons, progress=say)
    say(f"lab {spec.name} is up; its pods: {', '.join(pod.uid for pod in spec.pods)}")


@lab.command(short_help="Remove labs, whatever is left of them.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Remove every lab of this machine.")
@click.pass_obj
@_errors
def down(base: Path, names: tuple[str, ...], every: bool) -> None:  # noqa: FBT001 - click passes it by name
    """Remove labs, whatever is left of them; without a name the only one.

    Removes processes, namespaces, links, pins and files. What is gone already is no error.
    """
    from nodeagent.lab.builder import remove  # noqa: PLC0415 - not for `exec`, which must be light

    if every and names:
        raise click.UsageError("give names or --all, not both")
    known = Store.names(base)
    if not names and not every and len(known) > 1:
        raise click.UsageError(f"several labs are up: name one, or --all: {', '.join(known)}")
    for name in names or known:
        say(f"lab {name} removed" if remove(Store(base, name)) else f"there is no lab {name}")


@lab.command(name="exec", short_help="Run a program in a pod.")
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("-n", "--namespace", default="", help="The pod's namespace.")
@click.option("--lab", "name", default="", help="The lab, when several are up.")
@click.option("--no-capabilities", is_flag=True, help="As the pods' own programs run.")
@click.pass_obj
@_errors
def run_in_pod(
    base: Path,
    pod: str,
    command: tuple[str, ...],
    namespace: str,
    name: str,
    no_capabilities: bool,  # noqa: FBT001 - click passes it by name
) -> None:
    """Run a program in a pod: nodeagent lab exec POD -- COMMAND ...

    POD is a name, namespace/name, deploy/name or the beginning of a name. The program has this
    terminal, gets its signals, and its exit code is passed on.
    """
    from nodeagent.lab.launch import become  # noqa: PLC0415 - of `exec` alone

    found = _chosen(base, name)
    place = found.place(pod, namespace=namespace, capabilities=not no_capabilities)
    become(place, list(command))


@lab.command()
@click.argument("name", default="")
@output_option()
@click.pass_obj
@_errors
def status(base: Path, name: str, output: str) -> NoReturn:
    """Show the labs, their nodes, pods and processes.

    \b
    Exit codes: 0 everything that was started is running and ready; 1 something
    is not, or there is no such lab; 2 wrong usage.
    """
    from nodeagent.lab.report import report  # noqa: PLC0415 - not for `exec`

    reports = [report(Lab(each, base)) for each in ([name] if name else Store.names(base))]

    def show(printer: Printer) -> None:
        for number, each in enumerate(reports):
            if number:
                printer.line()
            _show(printer, each)
        if any(node.daemons for each in reports for node in each.nodes):
            _ask(printer, reports[0])

    if not reports:
        say("no lab is up")
    good = all(each.good for each in reports)
    code = ExitCode.FINE if good else ExitCode.FINDING
    answer(lambda: Answer(_Labs(labs=tuple(reports)), show, code), output)


def _ask(printer: Printer, shown: LabReport) -> None:
    node = shown.nodes[0].name
    printer.line()
    printer.line("To ask a node's agent, whatever the command:")
    printer.line(f"  nodeagent status --run-dir {shown.directory}/nodes/{node}/run")


def _show(printer: Printer, shown: LabReport) -> None:
    since = moment(datetime.fromtimestamp(shown.created, UTC))
    state = "" if shown.complete else " (not complete: remove it)"
    printer.line(f"lab {shown.name} since {since}{state}", Tone.PLAIN if shown.good else Tone.BAD)
    printer.line(f"  {shown.directory}")
    printer.line()
    printer.table(
        [Column(heading) for heading in ("NODE", "ADDRESS", "NODEAGENT", "ZTUNNEL")],
        [
            (node.name, node.addresses[0], *(node.daemons.get(each, "") for each in _DAEMONS))
            for node in shown.nodes
        ],
    )
    printer.line()
    printer.table(
        [Column(heading) for heading in ("POD", "NODE", "ADDRESSES", "MESH", "PROGRAMS")],
        [
            (
                pod.name,
                pod.node,
                ", ".join(pod.addresses),
                pod.mesh,
                ", ".join(f"{app} {state}" for app, state in pod.apps.items()),
            )
            for pod in shown.pods
        ],
    )


@lab.command(short_help="Show a daemon's output, or a node's access log.")
@click.argument("node")
@click.argument("source", type=click.Choice(["nodeagent", "ztunnel", "access"]), default="access")
@click.option("--lab", "name", default="", help="The lab, when several are up.")
@click.pass_obj
@_errors
def logs(base: Path, node: str, source: str, name: str) -> None:
    """Show what a node's daemon has printed, or its access log (the default)."""
    found = _chosen(base, name).node(node)
    if source == "access":
        for entry in found.access_log():
            click.echo(json.dumps(entry))
    else:
        click.echo(found.logs(source), nl=False)


@lab.command(short_help="Take a pod into the capture, or out of it.")
@click.argument("pod")
@click.option("--undo", is_flag=True, help="Take it out of the capture again.")
@click.option("-n", "--namespace", default="", help="The pod's namespace.")
@click.option("--lab", "name", default="", help="The lab, when several are up.")
@click.pass_obj
@_errors
def enrol(base: Path, pod: str, undo: bool, namespace: str, name: str) -> None:  # noqa: FBT001 - click passes it by name
    """Take a pod of the mesh into the capture while everything runs."""
    found = _chosen(base, name)
    uid = found.pod(pod, namespace).uid
    found.enrol(uid, enrolled=not undo)
    say(f"{uid} is {'released' if undo else 'enrolled'}; it is in force within a second")


@lab.command(short_help="Walk through an exercise, each step checked.")
@click.argument("name")
@click.option("--keep", is_flag=True, help="Leave the lab up at the end, to look around in.")
@output_option(("text",))
@click.pass_obj
@_errors
def exercise(base: Path, name: str, keep: bool, output: str) -> None:  # noqa: FBT001 - click passes it by name
    """Walk through the exercise NAME in a lab of its own: istioinaction, sentences.

    Every step is shown as the commands that it is made of, and what it should bring about is
    checked against what programs and daemons say. Removes the lab at the end, also when it is
    interrupted.

    \b
    Exit codes: 0 everything that is said has been checked and holds; 1 some
    does not; 2 wrong usage.
    """
    from nodeagent.lab.steps import EXERCISES  # noqa: PLC0415 - of `exercise` alone

    if name not in EXERCISES:
        raise click.UsageError(f"no exercise is called {name}; known: {', '.join(EXERCISES)}")
    import secrets  # noqa: PLC0415 - rarely needed

    chosen = EXERCISES[name]
    spec = msgspec.structs.replace(chosen.described(), name=f"{name}-{secrets.token_hex(3)}")
    with _interruptible(), contextlib.ExitStack() as ending:
        made = Lab.up(spec, base=base, progress=say)
        ending.callback(made.down)
        done = chosen(made, lambda text: click.echo(text, err=output in DOCUMENTS)).run()
        if keep:
            ending.pop_all()
            say(f"lab {spec.name} is up; to remove it: nodeagent lab down {spec.name}")
    if output in DOCUMENTS:
        steps = [
            {"title": step.title, "claims": [claim._asdict() for claim in step.claims]}
            for step in done
        ]
        write_document({"schema": SCHEMA, "exercise": name, "steps": steps}, output)
    if not all(claim.holds for step in done for claim in step.claims):
        sys.exit(1)


@lab.command(short_help="See the mesh at work, and what the wire carries.")
@output_option(("text",))
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
@click.pass_obj
@_errors
def demo(base: Path, output: str, *, as_json: bool) -> None:
    """Show the mesh at work: two nodes, real traffic, and what the wire carries.

    Removes everything at the end, also when it is interrupted.

    \b
    Exit codes: 0 every claim that it prints has been checked and holds; 1 one
    does not; 2 wrong usage.
    """
    from nodeagent.lab.demo import Demo  # noqa: PLC0415 - of `demo` alone

    form = "json" if as_json else output

    def show(text: str) -> None:
        click.echo(text, err=form in DOCUMENTS)

    with _interruptible():
        claims = Demo(base, show).run()
    if form in DOCUMENTS:
        document = {"schema": SCHEMA, "claims": [claim._asdict() for claim in claims]}
        write_document(document, form)
    if not all(claim.holds for claim in claims):
        sys.exit(1)
