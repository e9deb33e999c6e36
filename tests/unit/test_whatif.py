"""Two configurations compared: for all callers."""

from __future__ import annotations

import ipaddress
import itertools
import random

import pytest

from nodeagent import api, whatif
from nodeagent.offline import Offline, pack
from nodeagent.settings import Settings
from nodeagent.whatif import CallChange, Comparison, _callers, _compare
from support.whatif import (
    DOMAIN,
    ONLY_WEB,
    WORKLOADS,
    configuration,
    entry,
    mesh,
    policy,
    strict,
    web,
)
from ztunnel.spiffe import SpiffeId

NOBODY = "a caller without identity"
ANYBODY = f"any other identity of {DOMAIN}"


def compared(old: list[str], new: list[str]) -> Comparison:
    return whatif.compare(configuration(*old), configuration(*new), {DOMAIN})


def said(changes: tuple[CallChange, ...]) -> set[tuple[str, str, str]]:
    """Return each caller, workload and port that changes."""
    return {
        call
        for each in changes
        for call in itertools.product(each.callers, each.workloads, each.ports)
    }


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


def test_a_workload_that_nobody_can_call_does_not_stand_for_others() -> None:
    """shop/agent has the node's own address, which no workload may have."""
    documents = mesh(agent=entry("shop/agent", 9))
    settings = Settings(node="n1", node_addresses=("10.1.0.9",))
    old = configuration(*documents, settings=settings)
    new = configuration(
        *documents,
        policy(ONLY_WEB).replace("selector: {matchLabels: {app: pay}}, ", ""),
        settings=settings,
    )
    found = whatif.compare(old, new, {DOMAIN})
    assert {uid for change in found.refused for uid in change.workloads} == {"shop/pay", "shop/web"}


def test_the_nodes_own_address_does_not_stand_for_any_other() -> None:
    """In labs nodes have addresses of documentation, and their plaintext may pass STRICT."""
    settings = Settings(node="n1", node_addresses=("192.0.2.1",), node_plaintext=True)
    old = configuration(*mesh(), settings=settings)
    new = configuration(*mesh(), strict(), settings=settings)
    (change,) = whatif.compare(old, new, {DOMAIN}).refused
    assert change.callers == (NOBODY,)


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
        f"{ANYBODY} from 10.1.0.4/31",
        f"{ANYBODY} from 192.168.0.0/16",
    }


def test_networks_of_all_of_ipv4_leave_callers_by_ipv6() -> None:
    rules = "[{from: [{source: {ipBlocks: [0.0.0.0/0]}}]}]"
    found = compared(mesh(), [*mesh(), policy(rules)])
    assert {call[0] for call in said(found.refused)} == {f"{NOBODY} by IPv6", f"{ANYBODY} by IPv6"}
    rules = '[{from: [{source: {ipBlocks: [0.0.0.0/0, "::/0"]}}]}]'
    assert compared(mesh(), [*mesh(), policy(rules)]).refused == ()


def test_what_is_left_of_a_network_is_asked_for_too() -> None:
    rules = (
        "[{from: [{source: {ipBlocks: [10.0.0.0/8], notIpBlocks: [10.0.0.0/16, 10.1.0.0/16]}}]}]"
    )
    found = compared(mesh(), [*mesh(), policy(rules, "DENY")])
    # What is allowed stays so: 10.1/16, where all workloads are, and 10.0/16.
    assert {call[0] for call in said(found.refused)} == {
        f"{NOBODY} from 10.0.0.0/8",
        f"{ANYBODY} from 10.0.0.0/8",
    }


def test_an_identity_that_no_workload_has_is_asked_for_from_everywhere() -> None:
    rules = (
        '[{from: [{source: {principals: ["cluster.local/ns/x/sa/y"], ipBlocks: ["fd00::/8"]}}]}]'
    )
    found = compared(mesh(), [*mesh(), policy(rules, "DENY")])
    assert said(found.refused) == {(f"{web('y', 'x')} from fd00::/8", "shop/pay", "all")}


def test_addresses_of_a_workload_are_told_apart_where_policies_do() -> None:
    both = entry("shop/pay", 3).replace(
        "{nodeagent.io/netns: pay}",
        '{nodeagent.io/netns: pay, nodeagent.io/addresses: "fd00::3"}',
    )
    rules = '[{when: [{key: destination.ip, values: ["fd00::/8"]}]}]'
    found = compared(mesh(pay=both), [*mesh(pay=both), policy(rules, "DENY")])
    assert {call[2] for call in said(found.refused)} == {"other at fd00::3"}


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
    "notIpBlocks": ["[10.1.0.4]", "[10.1.0.0/24]"],
}
ANYWHERE = ("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.9.9", "203.0.113.9", "fd00::9")


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


def stands_for(name: str, address: str) -> bool:
    """Return whether a caller without identity from `address` may be meant by a name."""
    if not name.startswith(NOBODY):
        return False
    network = name.removeprefix(NOBODY).removeprefix(" from ")
    return not network or ipaddress.ip_address(address) in ipaddress.ip_network(network)


def test_no_change_for_callers_without_identity_is_missed() -> None:
    chance = random.Random(20260103)  # noqa: S311 - as above
    changed = 0
    for _ in range(60):
        old, new = (configuration(*some_documents(chance)) for _ in range(2))
        found = whatif.compare(old, new, {DOMAIN})
        for address, target, port in itertools.product(
            ANYWHERE, ("shop/web", "shop/pay"), (80, 81)
        ):
            before, after = (off.judge(target, port, None, pack(address)) for off in (old, new))
            assert before is not None
            assert after is not None
            if before.allow == after.allow:
                continue
            changed += 1
            spelled = {"all", "80" if port == 80 else "other"}
            changes = said(found.refused if before.allow else found.admitted)
            assert any(
                stands_for(call[0], address) and call[1] == target and call[2] in spelled
                for call in changes
            ), (address, target, port)
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
