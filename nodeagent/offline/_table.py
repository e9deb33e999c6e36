"""A table of expected verdicts, and what came instead.

This module owns the format of the files of `policy test` and the comparison. It promises that a
file is right to the letter or refused with places, as resources are; that an expectation is held
against every answer (each endpoint of a service); and that what a case does not say is not
compared. Reading a file is somebody else's business. It is pure.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from nodeagent.api import Check, ConfigError, Mark, quote, read_struct_of_list, values
from nodeagent.offline._ask import (
    Caller,
    QuestionError,
    Target,
    caller,
    judge,
    sources,
    split_port,
    targets,
)
from nodeagent.offline._explain import Place
from nodeagent.offline._offline import Offline
from ztunnel import address
from ztunnel.authorize import Verdict
from ztunnel.policy import DEFAULT_DENY
from ztunnel.protocol import Mode

__all__ = ["Case", "Expect", "Outcome", "Result", "Table", "read_table", "run_case"]

MAX_TEXT: Final = 2200
"""Characters of a name in a table: a SPIFFE ID has up to 2048."""

DEFAULT_DENY_NAME: Final = "default deny"
NO_POLICY: Final = "no policy"


class Expect(enum.Enum):
    ALLOW = "allow"
    DENY = "deny"


def _text(value: str) -> str:
    if not value or len(value) > MAX_TEXT:
        raise ValueError(f"must have 1 to {MAX_TEXT} characters")
    return values.text(value)


def _with_port(value: str) -> str:
    try:
        split_port(_text(value))
    except QuestionError as error:
        raise ValueError(str(error)) from None
    return value


def _some(value: tuple[object, ...]) -> tuple[object, ...]:
    if not value:
        raise ValueError("is empty: a table without tests would always be right; add one")
    return value


Text = Annotated[str, Check(_text)]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A connection and what must become of it. Only what is written is compared.

    `from` and `to` are written as for `nodeagent policy explain`: a workload, a SPIFFE ID, an
    address or "plaintext"; a workload, service or address with a port. `plaintext` takes the
    caller's identity away, `source` is the address that it calls from. `by` is the rule or policy
    that decides, "default deny", or "no policy". `audit` are the rules or policies that mark it.
    """

    caller: Text = msgspec.field(name="from")
    to: Annotated[str, Check(_with_port)]
    expect: Expect
    name: Text = ""
    plaintext: bool = False
    source: Annotated[str, Check(values.address)] = ""
    by: Text = ""
    mtls: Mode | None = None
    audit: tuple[Text, ...] | None = None


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A file for `nodeagent policy test`.

    `trusts` are further trust domains whose roots the node is to hold; the running agent, if it is
    asked, knows its own.
    """

    tests: Annotated[tuple[Case, ...], Check(_some)]
    trusts: tuple[Annotated[str, Check(values.trust_domain)], ...] = ()


class Outcome(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    BROKEN = "broken"
    """The question cannot be asked: a name that does not exist, say."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one case. `differences` say what was expected and what came.

    `came` is the verdict of the first answer that differs, else of the first; `rule` is what
    decided it, None if nothing did. `error` is why a case is broken. `arguments` are those with
    which `nodeagent policy explain` asks the same.
    """

    name: str
    file: str
    line: int
    source: str
    destination: str
    outcome: Outcome
    expected: str
    came: str = ""
    rule: Place | None = None
    destination_address: str = ""
    differences: tuple[str, ...] = ()
    error: str = ""
    arguments: tuple[str, ...] = ()


def read_table(data: bytes, file: str) -> tuple[Table, tuple[Mark, ...]]:
    """Return the table and the place of each of its tests. Raises ConfigError."""
    return read_struct_of_list(data, file, Table, "tests")


def run_case(off: Offline, case: Case, mark: Mark, file: str) -> Result:
    """Return what becomes of `case`, which stands at `mark`."""
    result = Result(
        name=case.name or f"{case.caller} -> {case.to}",
        file=file,
        line=mark.line,
        source=case.caller,
        destination=case.to,
        outcome=Outcome.PASSED,
        expected=case.expect.value,
        arguments=_arguments(case),
    )
    try:
        who = _caller(off, case)
        name, port = split_port(case.to)
        found = [
            _compare(off, case, who, source, target)
            for target in targets(off, name, port)
            for source in sources(off, who, target)
        ]
    except QuestionError as error:
        text = str(ConfigError(file, mark.line, mark.column, mark.field, str(error)))
        return msgspec.structs.replace(result, outcome=Outcome.BROKEN, error=text)
    worst = next((each for each in found if each.differences), found[0])
    return msgspec.structs.replace(
        result,
        outcome=Outcome.FAILED if worst.differences else Outcome.PASSED,
        came=worst.came,
        rule=worst.rule,
        destination_address=address.authority(worst.target.address, worst.target.port),
        differences=worst.differences,
    )


def _arguments(case: Case) -> tuple[str, ...]:
    options = ["--plaintext"] if case.plaintext else []
    options += ["--from-address", case.source] if case.source else []
    return (*options, case.caller, case.to)


class _Compared(msgspec.Struct, frozen=True):
    target: Target
    came: str
    rule: Place | None
    differences: tuple[str, ...]


def _caller(off: Offline, case: Case) -> Caller:
    who = caller(off, case.caller)
    if case.plaintext:
        who = msgspec.structs.replace(who, identity=None)
    if case.source:
        who = msgspec.structs.replace(who, sources=(address.pack(case.source),))
    return who


def _compare(off: Offline, case: Case, who: Caller, source: bytes, target: Target) -> _Compared:
    verdict = judge(off, who, source, target)
    mode = off.mode(target.workload, target.port)
    came = Expect.ALLOW if verdict is None or verdict.allow else Expect.DENY
    differences: list[str] = []
    if came is not case.expect:
        differences.append(f"expected {case.expect.value}, came {came.value}")
    names = _names(off, target, verdict)
    if case.by and case.by not in names:
        differences.append(f"expected to be decided by {quote(case.by)}, came {_by(verdict)}")
    if case.mtls is not None and (mode is None or mode.mode is not case.mtls):
        seen = "none: outside the mesh" if mode is None else f"{mode.mode.value} by {mode.origin}"
        differences.append(f"expected mTLS {case.mtls.value}, came {seen}")
    if case.audit is not None:
        differences += _audits(case.audit, verdict)
    rule = Place.of(verdict.origin) if verdict is not None and verdict.origin else None
    return _Compared(target, came.value, rule, tuple(differences))


def _names(off: Offline, target: Target, verdict: Verdict | None) -> set[str]:
    """Return what a case may call that which decided."""
    if verdict is None or not verdict.origin:
        return {NO_POLICY}
    if verdict.origin.startswith(DEFAULT_DENY):
        closing = (Place.of(each.origin).name for each in off.closing(target.workload))
        return {DEFAULT_DENY_NAME, *closing}
    place = Place.of(verdict.origin)
    # A rule is called "NAMESPACE/NAME rules[0]", and its policy what stands in front. Anything else
    # that lets in is the PeerAuthentication: nobody chose the callers.
    names = {place.name, place.name.partition(" ")[0]}
    if verdict.allow and " " not in place.name:
        names.add(NO_POLICY)
    return names


def _by(verdict: Verdict | None) -> str:
    return verdict.origin if verdict is not None and verdict.origin else NO_POLICY


def _audits(expected: tuple[str, ...], verdict: Verdict | None) -> list[str]:
    found = [Place.of(each.origin) for each in verdict.audits] if verdict is not None else []
    names = [{place.name, place.name.partition(" ")[0]} for place in found]
    lacking = [name for name in expected if not any(name in each for each in names)]
    further = [
        place.text for place, each in zip(found, names, strict=True) if not each & {*expected}
    ]
    differences = [f"expected to be marked by {quote(name)}, which does not" for name in lacking]
    return differences + [f"marked by {text}, which was not expected" for text in further]
