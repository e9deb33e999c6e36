"""Two configurations compared: for all callers, and for those that have called."""

from __future__ import annotations

import itertools
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nodeagent import api, whatif
from nodeagent.flows import SCHEMA, Recorded, Recording
from nodeagent.offline import Offline, pack
from nodeagent.settings import Settings
from nodeagent.whatif import CallChange, Comparison, _callers, _compare
from ztunnel.spiffe import SpiffeId

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
DOMAIN = "cluster.local"
NOBODY = "a caller without identity"
ANYBODY = f"any other identity of {DOMAIN}"

WORKLOADS = {"shop/web": 2, "shop/pay": 3, "ops/probe": 4}


def entry(uid: str, last: int, *, mesh: bool = True, account: str = "") -> str:
    namespace, name = uid.split("/")
    annotations = f"{{nodeagent.io/netns: {name}}}" if mesh else "{}"
    return f"""
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: {name}, namespace: {namespace}, annotations: {annotations}}}
spec: {{address: 10.1.0.{last}, serviceAccount: {account or name}, labels: {{app: {name}}}}}
"""


def mesh(**changes: str) -> list[str]:
    """Return the workloads; `changes` are others' documents by name ("" leaves one out)."""
    found = {uid.split("/")[1]: entry(uid, last) for uid, last in WORKLOADS.items()} | changes
    return [document for document in found.values() if document]


def strict(namespace: str = "istio-system", mode: str = "STRICT", spec: str = "") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: strict, namespace: {namespace}}}
spec: {{mtls: {{mode: {mode}}}{spec}}}
"""


def policy(rules: str, action: str = "ALLOW", name: str = "callers", app: str = "pay") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: {name}, namespace: shop}}
spec: {{action: {action}, selector: {{matchLabels: {{app: {app}}}}}, rules: {rules}}}
"""


def configuration(*documents: str, settings: Settings | None = None) -> Offline:
    text = "---\n".join(documents).encode()
    found = api.load(text, "mesh.yaml", "n1")
    assert not found.errors, [str(error) for error in found.errors]
    return Offline.of(found.documents, settings or Settings(node="n1"))


def compared(old: list[str], new: list[str]) -> Comparison:
    return whatif.compare(configuration(*old), configuration(*new), {DOMAIN})


def said(changes: tuple[CallChange, ...]) -> set[tuple[str, str, str]]:
    """Return each caller, workload and port that changes."""
    return {
        call
        for each in changes
        for call in itertools.product(each.callers, each.workloads, each.ports)
    }


def web(account: str = "web", namespace: str = "shop") -> str:
    return f"spiffe://{DOMAIN}/ns/{namespace}/sa/{account}"


# --- modes --------------------------------------------------------------------------------------


def test_nothing_differs_between_equals() -> None:
    documents = [*mesh(), strict(), policy("[{}]")]
    found = compared(documents, documents)
    assert found == Comparison(
        modes=(),
        refused=(),
        admitted=(),
        workloads_added=(),
        workloads_removed=(),
        sampled=False,
        unlooked=0,
        left_out=0,
    )


def test_another_name_place_or_order_is_no_difference() -> None:
    rules = '[{from: [{source: {namespaces: [ops]}}]}, {to: [{operation: {ports: ["80"]}}]}]'
    other = '[{to: [{operation: {ports: ["80"]}}]}, {from: [{source: {namespaces: [ops]}}]}]'
    found = compared([*mesh(), policy(rules)], [policy(other, name="renamed"), *reversed(mesh())])
    assert found.refused + found.admitted == ()
    assert found.modes == ()


def test_strict_refuses_callers_without_identity_and_nobody_else() -> None:
    found = compared(mesh(), [*mesh(), strict()])
    (change,) = found.refused
    assert change.callers == (NOBODY,)
    assert change.workloads == ("ops/probe", "shop/pay", "shop/web")
    assert change.ports == ("all",)
    assert change.new.reason == "strict_requires_mtls"
    assert change.new.origin.startswith("istio-system/strict (mesh.yaml:")
    assert found.admitted == ()
    (mode,) = found.modes
    assert (mode.old, mode.new, mode.port) == ("PERMISSIVE", "STRICT", "")
    assert mode.workloads == change.workloads
    back = compared([*mesh(), strict()], mesh())
    assert said(back.admitted) == said(found.refused)
    assert back.refused == ()


def test_one_ports_mode_is_one_ports_change() -> None:
    ports = ", selector: {matchLabels: {app: pay}}, portLevelMtls: {8080: {mode: PERMISSIVE}}"
    old, new = [*mesh(), strict("shop")], [*mesh(), strict("shop", spec=ports)]
    found = compared(old, new)
    assert said(found.admitted) == {
        (NOBODY, "shop/pay", "8080"),
        # The policy is for `pay` alone now.
        (NOBODY, "shop/web", "all"),
    }
    assert {(each.workloads, each.port, each.new) for each in found.modes} == {
        (("shop/pay",), "8080", "PERMISSIVE"),
        (("shop/web",), "", "PERMISSIVE"),
    }


# --- policies -----------------------------------------------------------------------------------


def test_a_first_allow_closes_to_all_it_does_not_name() -> None:
    rules = (
        '[{from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}], '
        'to: [{operation: {ports: ["8080"]}}]}]'
    )
    found = compared(mesh(), [*mesh(), policy(rules)])
    assert said(found.refused) == {
        (web("probe", "ops"), "shop/pay", "all"),
        (web("pay"), "shop/pay", "all"),
        (NOBODY, "shop/pay", "all"),
        (ANYBODY, "shop/pay", "all"),
        (web(), "shop/pay", "other"),
    }
    assert all("default deny" in each.new.origin for each in found.refused)


def test_a_deny_names_its_rule_and_touches_nobody_else() -> None:
    rules = "[{from: [{source: {namespaces: [ops]}}]}]"
    found = compared(mesh(), [*mesh(), policy(rules, "DENY")])
    assert said(found.refused) == {
        (web("probe", "ops"), "shop/pay", "all"),
        (f"any other identity of namespace ops of {DOMAIN}", "shop/pay", "all"),
    }
    (origin,) = {each.new.origin for each in found.refused}
    assert origin.startswith("shop/callers rules[0] (mesh.yaml:")


def test_networks_are_asked_for_by_an_address_of_theirs() -> None:
    rules = "[{from: [{source: {ipBlocks: [10.1.0.4/31, 192.168.0.0/16]}}]}]"
    found = compared([*mesh(), policy(rules)], mesh())
    refused_before = {call[0] for call in said(found.admitted)}
    assert refused_before == {NOBODY, ANYBODY, web(), web("pay")}
    found = compared(mesh(), [*mesh(), policy(rules, "DENY")])
    assert {call[0] for call in said(found.refused)} == {
        web("probe", "ops"),
        f"{NOBODY} from 10.1.0.4/31",
        f"{NOBODY} from 192.168.0.0/16",
    }


def test_an_identity_that_no_workload_has_is_asked_for_when_it_is_named() -> None:
    rules = '[{from: [{source: {principals: ["partner.example/ns/x/sa/api"]}}]}]'
    old = configuration(*mesh(), policy("[]"))
    trusting = Settings(node="n1")
    text = "---\n".join([*mesh(), policy(rules)]).encode()
    new = Offline.of(api.load(text, "m", "n1").documents, trusting, ("partner.example",))
    found = whatif.compare(old, new, {DOMAIN, "partner.example"})
    assert ("spiffe://partner.example/ns/x/sa/api", "shop/pay", "all") in said(found.admitted)


def test_dry_runs_and_audits_are_no_change() -> None:
    audit = policy("[{}]", "AUDIT", name="audit")
    dry = policy("[{}]", "DENY", name="dry").replace(
        "namespace: shop", 'namespace: shop, annotations: {istio.io/dry-run: "true"}'
    )
    found = compared(mesh(), [*mesh(), audit, dry])
    assert found.refused + found.admitted == ()


ONLY_WEB = '[{from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]}]'


def test_disable_takes_callers_their_identity_and_so_their_way_in() -> None:
    old, new = [*mesh(), policy(ONLY_WEB)], [*mesh(), policy(ONLY_WEB), strict("shop", "DISABLE")]
    found = compared(old, new)
    assert said(found.refused) == {(web(), "shop/pay", "all")}
    assert found.admitted == ()
    assert said(compared(new, old).admitted) == said(found.refused)
    denied = policy(ONLY_WEB, "DENY")
    found = compared([*mesh(), denied], [*mesh(), denied, strict("shop", "DISABLE")])
    assert said(found.admitted) == {(web(), "shop/pay", "all")}


# --- workloads ----------------------------------------------------------------------------------


def test_workloads_that_come_and_go_are_named() -> None:
    found = compared(mesh(web=""), mesh(pay=""))
    assert (found.workloads_added, found.workloads_removed) == (("shop/web",), ("shop/pay",))
    assert found.refused + found.admitted == ()


def test_a_workload_that_leaves_the_mesh_is_open_to_all() -> None:
    out = entry("shop/pay", 3, mesh=False)
    found = compared([*mesh(), strict()], [*mesh(pay=out), strict()])
    assert (NOBODY, "shop/pay", "all") in said(found.admitted)
    assert all(not each.new.judged for each in found.admitted if "shop/pay" in each.workloads)
    # And it calls without identity now.
    assert {call[1] for call in said(found.refused)} == {"ops/probe", "shop/web"}


def test_a_caller_who_gets_another_identity_is_asked_for_everywhere() -> None:
    rules = '[{from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]}]'
    old = [*mesh(), policy(rules)]
    new = [*mesh(web=entry("shop/web", 2, account="renamed")), policy(rules)]
    found = compared(old, new)
    name = f"shop/web ({web()}, then {web('renamed')})"
    assert said(found.refused) == {(name, "shop/pay", "all")}
    assert found.admitted == ()


# --- against every call one by one --------------------------------------------------------------

PARTS = {
    "principals": ['["cluster.local/ns/shop/sa/web"]', '["*"]', '["cluster.local/ns/ops/*"]'],
    "notPrincipals": ['["*/sa/probe"]', '["cluster.local/ns/shop/sa/pay"]'],
    "namespaces": ["[shop]", "[ops, shop]"],
    "notNamespaces": ["[shop]"],
    "ipBlocks": ["[10.1.0.2/31]", "[10.1.0.0/16]"],
    "notIpBlocks": ["[10.1.0.4]"],
}


def some_documents(chance: random.Random) -> list[str]:
    found = mesh()
    if chance.random() < 0.5:
        mode = chance.choice(("STRICT", "DISABLE"))
        found.append(strict(chance.choice(("istio-system", "shop")), mode))
    for number in range(chance.randrange(3)):
        rules = []
        for _ in range(chance.randrange(1, 3)):
            fields = {name: chance.choice(PARTS[name]) for name in chance.sample(sorted(PARTS), 2)}
            source = ", ".join(f"{name}: {value}" for name, value in fields.items())
            ports = chance.choice(("", ', to: [{operation: {ports: ["80"]}}]'))
            rules.append(f"{{from: [{{source: {{{source}}}}}]{ports}}}")
        action = chance.choice(("ALLOW", "DENY"))
        app = chance.choice(("pay", "web"))
        found.append(policy(f"[{', '.join(rules)}]", action, f"p{number}", app))
    return found


@pytest.mark.parametrize("sampled", [False, True])
def test_every_change_is_found_and_none_is_invented(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        # Of each kind of caller as many as there are workloads.
        monkeypatch.setattr(_callers.Callers, "all_of", _callers.Callers.some_of)
        monkeypatch.setattr(_callers, "SAMPLE", len(WORKLOADS))
    chance = random.Random(20260102)  # noqa: S311 - a test's chance must be repeatable
    changed = 0
    for _ in range(60):
        old, new = (configuration(*some_documents(chance)) for _ in range(2))
        found = whatif.compare(old, new, {DOMAIN})
        assert not found.unlooked
        for caller, target, port in itertools.product(
            WORKLOADS, ("shop/web", "shop/pay"), (80, 81)
        ):
            identity = SpiffeId.parse(old.workloads[caller].identity)
            source = pack(old.workloads[caller].addresses[0])
            before, after = (
                off.judge(target, port, off.shown(target, port, identity), source)
                for off in (old, new)
            )
            assert before is not None
            assert after is not None
            changes = found.refused if before.allow else found.admitted
            spelled = "80" if port == 80 else "other"
            listed = {"all", spelled} & {
                call[2] for call in said(changes) if call[:2] == (str(identity), target)
            }
            changed += before.allow != after.allow
            assert bool(listed) is (before.allow != after.allow), (caller, target, port)
    assert changed > 100


def test_what_is_too_much_is_counted_and_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compare, "MAX_JUDGED", 3)
    monkeypatch.setattr(_compare, "MAX_LISTED", 1)
    found = compared([*mesh(), strict("ops")], [*mesh(), policy("[]"), strict()])
    assert found.unlooked > 0
    assert found.sampled
    monkeypatch.setattr(_compare, "MAX_JUDGED", 1000)
    found = compared([*mesh(), strict("ops")], [*mesh(), policy("[]"), strict()])
    assert len(found.refused) == 1
    assert found.left_out > 0


# --- recorded flows -----------------------------------------------------------------------------


def flow(**changes: Any) -> Recorded:  # noqa: ANN401 - fields of a flow
    values: dict[str, Any] = {
        "identity": web(),
        "source": "10.1.0.2",
        "workload": "shop/web",
        "arrival": "hbone",
        "destination": "shop/pay",
        "address": "10.1.0.3",
        "port": 8080,
        "allowed": True,
        "reason": "",
        "first": NOW - timedelta(hours=2),
        "last": NOW - timedelta(minutes=1),
        "connections": 3,
        "most_open": 1,
        "received": 1,
        "sent": 1,
    }
    return Recorded(**(values | changes))


PLAIN = {"identity": "", "workload": "", "source": "10.9.9.9", "arrival": "plaintext"}


def recording(*flows: Recorded, **changes: Any) -> Recording:  # noqa: ANN401 - fields of it
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "node": "n1",
        "time": NOW,
        "since": NOW - timedelta(hours=6),
        "oldest": NOW - timedelta(days=1),
        "flows": flows,
    }
    return Recording(**(values | changes))


def replayed(old: list[str], new: list[str], *flows: Recorded, **changes: Any) -> whatif.Replay:  # noqa: ANN401 - as above
    return whatif.replay(
        configuration(*old), configuration(*new), recording(*flows, **changes), "a test"
    )


def test_who_called_in_plaintext_would_break_under_strict() -> None:
    found = replayed(mesh(), [*mesh(), strict()], flow(), flow(**PLAIN, connections=7))
    (change,) = found.breaks
    assert (change.sources, change.destination, change.port) == (("10.9.9.9",), "shop/pay", 8080)
    assert (change.connections, change.new.reason) == (7, "strict_requires_mtls")
    assert change.new.origin.startswith("istio-system/strict (mesh.yaml:")
    assert found.admits == ()
    assert (found.flows, found.connections) == (2, 10)


def test_who_was_refused_and_would_be_let_in() -> None:
    refused = flow(**PLAIN, allowed=False, reason="strict_requires_mtls")
    found = replayed([*mesh(), strict()], mesh(), refused)
    assert [each.sources for each in found.admits] == [("10.9.9.9",)]
    assert found.breaks == ()


def test_many_addresses_of_one_kind_of_caller_are_one_entry() -> None:
    flows = [flow(**PLAIN | {"source": f"10.9.9.{n}"}, most_open=0) for n in range(1, 31)]
    (change,) = replayed(mesh(), [*mesh(), strict()], *flows).breaks
    assert (change.connections, change.source_count, len(change.sources)) == (90, 30, 5)


def test_a_flow_is_judged_from_its_address() -> None:
    deny = policy("[{from: [{source: {ipBlocks: [10.9.9.9]}}]}]", "DENY")
    found = replayed(mesh(), [*mesh(), deny], flow(**PLAIN), flow(**PLAIN | {"source": "10.9.9.8"}))
    assert [each.sources for each in found.breaks] == [("10.9.9.9",)]


def test_callers_not_known_one_by_one_may_break_where_something_changes() -> None:
    folded = {"identity": "", "source": "", "workload": "", "address": "", "port": 0}
    found = replayed(
        mesh(),
        [*mesh(), policy("[]")],
        flow(**folded, connections=5),
        flow(**folded, destination="shop/web", connections=9),
    )
    assert found.unknown == 5
    assert found.breaks == ()


def test_where_identities_change_any_of_them_may_be_one_that_does() -> None:
    folded = flow(identity="", source="", workload="", address="", port=0, connections=5)
    new = mesh(web=entry("shop/web", 2, account="renamed"))
    assert replayed(mesh(), mesh(), folded).unknown == 0
    assert replayed(mesh(), new, folded).unknown == 5


def test_what_cannot_be_judged_again_is_counted_by_why() -> None:
    found = replayed(
        mesh(),
        [*mesh(), strict()],
        flow(destination="other/gone"),
        flow(allowed=False, reason="authority_mismatch"),
        flow(allowed=False, reason="policy_denied"),
    )
    assert (found.elsewhere, found.unjudged, found.otherwise) == (1, 1, 1)


def test_a_caller_who_leaves_the_mesh_would_call_without_identity() -> None:
    out = entry("shop/web", 2, mesh=False)
    found = replayed([*mesh(), strict()], [*mesh(web=out), strict()], flow())
    (change,) = found.breaks
    assert (change.identity, change.new.reason) == (web(), "strict_requires_mtls")


def test_who_called_by_mutual_tls_would_break_under_disable_and_the_other_way_round() -> None:
    kept, clear = (
        [*mesh(), policy(ONLY_WEB)],
        [*mesh(), policy(ONLY_WEB), strict("shop", "DISABLE")],
    )
    (change,) = replayed(kept, clear, flow()).breaks
    assert (change.identity, change.new.reason) == (web(), "policy_denied")
    plain = flow(identity="", arrival="plaintext", allowed=False, reason="policy_denied")
    (change,) = replayed(clear, kept, plain).admits
    assert change.new.allowed
    # Of whom the mesh knows nothing it knows no identity either.
    assert not replayed(clear, kept, flow(**PLAIN, allowed=False, reason="policy_denied")).admits
    # Who proved an identity that is no workload's knows no mode: as another mesh's clients.
    stranger = flow(identity=web("probe", "ops"))
    assert not replayed(kept, clear, stranger).breaks


def test_a_caller_who_gets_another_identity_is_judged_by_it() -> None:
    rules = '[{from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]}]'
    new = [*mesh(web=entry("shop/web", 2, account="renamed")), policy(rules)]
    assert replayed([*mesh(), policy(rules)], new, flow()).breaks
    # Who had shown another identity from there keeps it.
    stays = flow(identity=web("probe", "ops"))
    assert not replayed([*mesh(), policy("[{}]")], new, flow()).admits
    assert replayed([*mesh(), policy("[{}]")], new, stays).breaks


def test_a_called_workload_with_another_address_is_the_same_workload() -> None:
    moved = mesh(pay=entry("shop/pay", 77))
    assert not replayed(mesh(), moved, flow()).breaks


def test_a_called_workload_that_goes_is_judged_by_nobody() -> None:
    refused = flow(**PLAIN, allowed=False, reason="strict_requires_mtls")
    found = replayed([*mesh(), strict()], [*mesh(pay=""), strict()], flow(), refused)
    assert found.breaks == ()
    assert [each.new.judged for each in found.admits] == [False]


def test_what_got_in_says_which_trust_domains_were_trusted() -> None:
    found = whatif.domains(
        recording(
            flow(),
            flow(identity="spiffe://partner.example/a"),
            flow(identity="spiffe://evil.example/a", allowed=False, reason="policy_denied"),
            flow(**PLAIN),
        )
    )
    assert found == {DOMAIN, "partner.example"}
