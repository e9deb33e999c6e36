"""AuthorizationPolicy to rules: what of a document this node's tunnel is told.

This module owns the meaning of AuthorizationPolicy and of the annotation that names a workload's
callers, down to conditions on single attributes. It promises that the order of documents never
matters, nor what was compiled before; that nothing is lost without a word; and that what cannot be
known (a reference that is not resolved, a policy that is too large) never lets anybody in. It may
not evaluate a rule.

Theory of operation: two readings of a rule are possible where a part of it cannot be evaluated. An
ALLOW takes the *narrow* one, which matches no more than its author can have meant: a layer-7 part
drops the rule, an unresolved set is nobody where it is asked for and everybody where it is
excluded. DENY and AUDIT take the *wide* one: a layer-7 part is left out, an unresolved set is
everybody where it is asked for and nobody where it is excluded.

Scope, from Istio's reference: a policy is for its namespace, in the root namespace for the mesh;
with a selector for the workloads there that carry all of its labels. Policies of every level count
together, unlike PeerAuthentication's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, NamedTuple, TypeVar

import msgspec

from nodeagent import api
from nodeagent.api import (
    AuthorizationPolicy,
    ConfigError,
    ConfigWarning,
    IdentitySet,
    PolicyAction,
    WorkloadEntry,
    WorkloadSelector,
)
from nodeagent.memo import Last
from nodeagent.policy._identity_sets import Expansion, IdentitySets
from nodeagent.policy._subjects import Subject, Subjects
from ztunnel.protocol import Action, Attribute, Authorization, Condition, Rule

__all__ = ["MAX_VALUES", "Authorizations", "Authorizer", "LeftOut"]

MAX_VALUES: Final = 20_000
"""Values of one policy with its identity sets expanded: it is held in the memory of every tunnel
that has one of its workloads."""

MAX_BYTES: Final = 3 * 1024 * 1024
"""Bytes of one policy on the wire, about: three quarters of a frame. What does not fit a frame
would be left out, and a DENY that is left out lets everybody in."""

_OVERHEAD: Final = 64
"""Bytes of a rule or a condition on the wire beside its values: the names of its fields."""

_VALUE_OVERHEAD: Final = 5
"""Bytes in front of a text in MessagePack, at most (str 32)."""

_NAMED: Final = 5
"""Workloads named in one warning; a mesh-wide policy may concern thousands."""


class LeftOut(msgspec.Struct, frozen=True):
    """A rule that is in a document and that no tunnel is told: it would match nobody."""

    origin: str
    reason: str


class Authorizations(msgspec.Struct, frozen=True):
    """`policies` by uid; `problems` are references that lead nowhere, with their places.

    `left_out` has, by the uid of their policy, the rules that are not among its rules.
    """

    policies: dict[str, Authorization]
    left_out: dict[str, tuple[LeftOut, ...]] = {}
    problems: tuple[ConfigError, ...] = ()
    warnings: tuple[ConfigWarning, ...] = ()


class _TooLargeError(Exception):
    pass


class _Never(Exception):  # noqa: N818 - no error: an outcome
    """A part of a rule can match nobody."""


D = TypeVar("D", AuthorizationPolicy, WorkloadEntry)


class _Compiled(NamedTuple):
    """What became of a document, and all that it depends on beside the document itself."""

    document: AuthorizationPolicy | WorkloadEntry
    workloads: tuple[str, ...] | None
    sets: tuple[Expansion, ...]
    policy: Authorization
    left_out: tuple[LeftOut, ...]
    problems: tuple[ConfigError, ...]


_Made = tuple[Authorization, tuple[LeftOut, ...], list[ConfigError]]


class Authorizer:
    """Compiles one set of documents after another; what concerns no document compiles none anew."""

    def __init__(self, root_namespace: str) -> None:
        self._scopes = Last(_Scopes)
        self._expander = Last(IdentitySets)
        self._root = root_namespace
        self._known: dict[int, _Compiled] = {}
        """By the document's `id`, which is its own while it is held here."""

    def authorize(
        self,
        policies: Iterable[AuthorizationPolicy],
        sets: Iterable[IdentitySet],
        entries: Iterable[WorkloadEntry],
        subjects: Subjects,
        here: Collection[str],
    ) -> Authorizations:
        """Return what is in force for the workloads `here` (uids). No argument's order matters.

        `entries` are the workloads' documents that name callers, `subjects` all workloads as
        policy sees them.
        """
        documents = sorted(policies, key=lambda item: item.uid)
        annotated = sorted(entries, key=lambda item: item.uid)
        scopes = self._scopes(subjects, here, self._root)
        expander = self._expander(sets)
        problems = expander.problems((*documents, *annotated))
        warnings: list[ConfigWarning] = []
        compiled: list[_Compiled] = []
        for document in documents:
            if document.spec.target_ref is not None or document.spec.target_refs:
                # For a waypoint: said when the document was read.
                continue
            outside = scopes.outside(document)
            if outside:
                warnings.append(_outside(document, outside))
            selected = scopes.selected(document)
            if selected:
                workloads = tuple(each.uid for each in selected) if document.spec.selector else None
                compiled.append(self._compiled(document, workloads, expander, self._policy))
        for entry in annotated:
            if entry.uid in scopes.here:
                compiled.append(self._compiled(entry, (entry.uid,), expander, _callers))
        self._known = {id(each.document): each for each in compiled}
        for each in compiled:
            problems += each.problems
        order = sorted(problems, key=lambda item: (item.file, item.line, item.column, item.field))
        return Authorizations(
            policies={each.policy.uid: each.policy for each in compiled},
            left_out={each.policy.uid: each.left_out for each in compiled if each.left_out},
            problems=tuple(order),
            warnings=tuple(sorted(warnings)),
        )

    def _compiled(
        self,
        document: D,
        workloads: tuple[str, ...] | None,
        expander: IdentitySets,
        make: Callable[[D, IdentitySets, tuple[str, ...] | None], _Made],
    ) -> _Compiled:
        sets = tuple(expander.stands_for(mark.refers) for mark in document.marks if mark.refers)
        known = self._known.get(id(document))
        if known is not None and known.workloads == workloads and known.sets == sets:
            return known
        policy, left_out, problems = make(document, expander, workloads)
        return _Compiled(document, workloads, sets, policy, left_out, tuple(problems))

    def _policy(
        self,
        document: AuthorizationPolicy,
        sets: IdentitySets,
        workloads: tuple[str, ...] | None,
    ) -> _Made:
        return _policy(document, sets, _namespace(document, self._root), workloads)


class _Index:
    """Workloads by namespace and label: policies are many, and select few each."""

    def __init__(self, subjects: Iterable[Subject]) -> None:
        self._scoped: dict[str, list[Subject]] = {}
        self._labelled: dict[tuple[str, str, str], list[Subject]] = {}
        for subject in sorted(subjects, key=lambda item: item.uid):
            for scope in ("", subject.namespace):
                self._scoped.setdefault(scope, []).append(subject)
                for key, value in subject.labels.items():
                    self._labelled.setdefault((scope, key, value), []).append(subject)

    def select(self, scope: str, selector: WorkloadSelector | None) -> Sequence[Subject]:
        """Return the workloads of a namespace, "" for the mesh, that a selector selects."""
        scoped = self._scoped.get(scope, ())
        if selector is None or not scoped:
            return scoped
        labels = selector.match_labels
        # As with PeerAuthentication: a selector that is empty in spite of all selects nothing.
        fewest = min(
            (self._labelled.get((scope, *label), []) for label in labels.items()),
            key=len,
            default=[],
        )
        return [
            subject
            for subject in fewest
            if all(subject.labels.get(key) == value for key, value in labels.items())
        ]


class _Scopes:
    """Which workloads a policy is for."""

    def __init__(self, subjects: Subjects, here: Iterable[str], root_namespace: str) -> None:
        self.here = frozenset(here)
        self._root = root_namespace
        self._here = _Index(subjects.some(self.here))
        self._outside = _Index(subjects.outside.values())

    def selected(self, document: AuthorizationPolicy) -> Sequence[Subject]:
        """Return the workloads of this node that the policy is for."""
        return self._here.select(_namespace(document, self._root), document.spec.selector)

    def outside(self, document: AuthorizationPolicy) -> Sequence[Subject]:
        """Return the workloads outside the mesh that the policy cannot protect."""
        return self._outside.select(_namespace(document, self._root), document.spec.selector)


def _namespace(document: AuthorizationPolicy, root_namespace: str) -> str:
    """Return where a policy counts; empty for the mesh."""
    namespace = document.metadata.namespace
    return "" if namespace == root_namespace else namespace


def _policy(
    document: AuthorizationPolicy,
    sets: IdentitySets,
    namespace: str,
    workloads: tuple[str, ...] | None,
) -> _Made:
    spec = document.spec
    action = Action(spec.action.value)
    origin = f"{document.uid} ({document.origin})"
    compiler = _Compiler(sets, document.metadata.namespace, narrow=action is Action.ALLOW)
    written = spec.rules or ()
    lines = [mark.line for mark in document.marks if not mark.refers]
    places = [
        f"{document.uid} rules[{index}] ({document.origin.file}:{line})"
        for index, line in enumerate(lines or [document.origin.line] * len(written))
    ]
    problems: list[ConfigError] = []
    dropped: tuple[LeftOut, ...] = ()
    try:
        compiled = [compiler.rule(rule, place) for rule, place in zip(written, places, strict=True)]
        rules = tuple(each for each in compiled if isinstance(each, Rule))
        dropped = tuple(each for each in compiled if isinstance(each, LeftOut))
    except _TooLargeError:
        rules, problem = _closed(action, document, "spec.rules", origin)
        problems.append(problem)
    dry_run = document.metadata.annotations.get(api.DRY_RUN) == "true"
    policy = Authorization(
        uid=f"AuthorizationPolicy/{document.uid}",
        action=action,
        rules=rules,
        origin=origin,
        namespace=namespace,
        workloads=workloads,
        dry_run=dry_run and spec.action is not PolicyAction.AUDIT,
    )
    return policy, dropped, problems


def _callers(entry: WorkloadEntry, sets: IdentitySets, workloads: tuple[str, ...] | None) -> _Made:
    """Return what the annotation of a workload's callers means: an ALLOW for that workload."""
    line = next((mark.line for mark in entry.marks), entry.origin.line)
    origin = f"{entry.uid} {api.ANNOTATION_CALLERS} ({entry.origin.file}:{line})"
    compiler = _Compiler(sets, entry.metadata.namespace, narrow=True)
    rules: tuple[Rule, ...] = ()
    problems: list[ConfigError] = []
    try:
        found = compiler.condition(Attribute.PRINCIPAL, api.callers(entry) or (), ())
        rules = (Rule(origin=origin, sources=((found,),)),) if found is not None else ()
    except _Never:
        pass
    except _TooLargeError:
        rules, problem = _closed(Action.ALLOW, entry, "metadata.annotations", origin)
        problems.append(problem)
    policy = Authorization(
        uid=f"WorkloadEntry/{entry.uid}",
        action=Action.ALLOW,
        rules=rules,
        origin=origin,
        namespace=entry.metadata.namespace,
        workloads=workloads,
    )
    return policy, (), problems


def _closed(
    action: Action, document: AuthorizationPolicy | WorkloadEntry, field: str, origin: str
) -> tuple[tuple[Rule, ...], ConfigError]:
    """Return the rules of a policy that is too large to be told: as narrow or wide as can be."""
    place = document.origin
    what = "lets nobody in" if action is Action.ALLOW else "matches everyone"
    reason = (
        f"has more than {MAX_VALUES} values, or {MAX_BYTES} bytes, with its identity sets; "
        f"until it is split it {what}"
    )
    problem = ConfigError(place.file, place.line, place.column, field, reason)
    return (() if action is Action.ALLOW else (Rule(origin=origin),)), problem


class _Compiler:
    """Compiles the rules of one document, written in `namespace`.

    `narrow` says which reading is right where a part cannot be evaluated.
    """

    def __init__(self, sets: IdentitySets, namespace: str, *, narrow: bool) -> None:
        self._sets = sets
        self._namespace = namespace
        self._narrow = narrow
        self._values = 0
        self._bytes = 0
        self._missing: dict[str, None] = {}

    def rule(self, rule: api.AuthorizationRule, origin: str) -> Rule | LeftOut:
        """Return the rule, or why it is left out: it matches nobody. Raises _TooLargeError."""
        unread = tuple(dict.fromkeys(name for _, name in api.layer7(rule)))
        if unread and self._narrow:
            fields = ", ".join(unread)
            return LeftOut(origin, f"an ALLOW rule with fields of layer 7 lets nobody in: {fields}")
        self._missing = {}
        try:
            sources = self._alternatives([self._source(each.source) for each in rule.sources])
            operations = self._alternatives(
                [self._operation(each.operation) for each in rule.operations]
            )
            conditions = [
                self.condition(
                    Attribute(each.key),
                    self._canonical(each.key, each.values),
                    self._canonical(each.key, each.not_values),
                )
                for each in rule.when
                if each.key in api.CONDITION_KEYS
            ]
        except _Never:
            return LeftOut(origin, f"it can match nobody: {', '.join(self._missing)}")
        unread = (*unread, *self._missing)
        self._count((origin, *unread))
        return Rule(
            origin=origin,
            sources=sources,
            operations=operations,
            conditions=tuple(each for each in conditions if each is not None),
            unread=unread,
        )

    def condition(
        self, attribute: Attribute, wanted: Sequence[str], unwanted: Sequence[str]
    ) -> Condition | None:
        """Return the condition, None if it always holds. Raises _Never if it never does."""
        values, not_values = tuple(wanted), tuple(unwanted)
        if attribute is Attribute.PRINCIPAL:
            found = self._sets.expand(wanted, self._namespace)
            excluded = self._sets.expand(unwanted, self._namespace)
            self._missing.update(dict.fromkeys((*found.missing, *excluded.missing)))
            values, not_values = found.known, excluded.known
            if excluded.missing and self._narrow:
                raise _Never
            if found.missing and not self._narrow:
                values = ()
            elif wanted and not values:
                raise _Never
        elif attribute is Attribute.SERVICE_ACCOUNT:
            values, not_values = self._qualified(values), self._qualified(not_values)
        self._count((*values, *not_values))
        return Condition(attribute, values, not_values) if values or not_values else None

    def _source(self, source: api.Source) -> tuple[Condition, ...] | None:
        return self._all(
            (Attribute.PRINCIPAL, source.principals, source.not_principals),
            (Attribute.NAMESPACE, source.namespaces, source.not_namespaces),
            (Attribute.SERVICE_ACCOUNT, source.service_accounts, source.not_service_accounts),
            (Attribute.SOURCE_IP, source.ip_blocks, source.not_ip_blocks),
        )

    def _operation(self, operation: api.Operation) -> tuple[Condition, ...] | None:
        return self._all((Attribute.DESTINATION_PORT, operation.ports, operation.not_ports))

    def _all(
        self, *parts: tuple[Attribute, Sequence[str], Sequence[str]]
    ) -> tuple[Condition, ...] | None:
        """Return the conditions of one alternative, None if one of them never holds."""
        try:
            found = [
                self.condition(attribute, wanted, unwanted)
                for attribute, wanted, unwanted in parts
                if wanted or unwanted
            ]
        except _Never:
            return None
        return tuple(each for each in found if each is not None)

    def _alternatives(
        self, found: Sequence[tuple[Condition, ...] | None]
    ) -> tuple[tuple[Condition, ...], ...]:
        """Return the alternatives; () if one of them asks for nothing. Raises _Never."""
        possible = [each for each in found if each is not None]
        if found and not possible:
            raise _Never
        return () if () in possible else tuple(possible)

    def _canonical(self, key: str, values: Sequence[str]) -> tuple[str, ...]:
        check = api.CONDITION_KEYS[key]
        return tuple(check(value) for value in values)

    def _qualified(self, accounts: Sequence[str]) -> tuple[str, ...]:
        return tuple(
            account if "/" in account else f"{self._namespace}/{account}" for account in accounts
        )

    def _count(self, values: Sequence[str]) -> None:
        self._values += len(values)
        self._bytes += _OVERHEAD + sum(_VALUE_OVERHEAD + len(value.encode()) for value in values)
        if self._values > MAX_VALUES or self._bytes > MAX_BYTES:
            raise _TooLargeError


def _outside(document: AuthorizationPolicy, subjects: Sequence[Subject]) -> ConfigWarning:
    named = ", ".join(subject.uid for subject in subjects[:_NAMED])
    more = f" and {len(subjects) - _NAMED} more" if len(subjects) > _NAMED else ""
    reason = (
        f"AuthorizationPolicy {document.uid} has no effect on workloads outside the mesh: "
        f"{named}{more}; enrol them, or do not count on it"
    )
    origin = document.origin
    return ConfigWarning(origin.file, origin.line, origin.column, "spec", reason)
