"""PeerAuthentication: who wins, what is inherited, and what is said about the rest."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeagent.api import MtlsMode, PeerAuthentication, PeerAuthenticationSpec, WorkloadSelector
from nodeagent.policy import Resolution, Subject, Subjects, resolve
from support.resources import peer, read
from ztunnel.protocol import Mode, WorkloadPolicy

ROOT = "istio-system"
WEB = Subject("shop/web", "shop", {"app": "web", "tier": "front"})
AGES = ["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]


def policies(*texts: str) -> list[PeerAuthentication]:
    return [document for document in read(*texts) if isinstance(document, PeerAuthentication)]


def decide(*texts: str, subject: Subject = WEB) -> WorkloadPolicy:
    return resolve(policies(*texts), Subjects.of([subject]), ROOT).policies[subject.uid]


def reasons(resolution: Resolution) -> str:
    return "\n".join(str(warning) for warning in resolution.warnings)


def test_policy_default_is_permissive() -> None:
    assert decide() == WorkloadPolicy("shop/web", Mode.PERMISSIVE, "default")


def test_policy_mesh_namespace_workload_narrowest_wins() -> None:
    mesh = peer(f"{ROOT}/mesh", "STRICT")
    namespace = peer("shop/all", "PERMISSIVE")
    workload = peer("shop/web", "DISABLE", selector={"app": "web"})
    assert decide(mesh).mode is Mode.STRICT
    assert decide(mesh, namespace).mode is Mode.PERMISSIVE
    assert decide(mesh, namespace, workload).mode is Mode.DISABLE
    assert decide(mesh, workload).mode is Mode.DISABLE


def test_policy_origin_names_document_file_and_line() -> None:
    found = decide(peer("other/x"), peer("shop/all", "STRICT"))
    assert found.origin == "shop/all (mesh.yaml:3)"


def test_policy_unset_inherits_level_by_level() -> None:
    workload = peer("shop/web", "UNSET", selector={"app": "web"})
    bare = peer("shop/web", selector={"app": "web"})
    namespace = peer("shop/all", "UNSET")
    mesh = peer(f"{ROOT}/mesh", "STRICT")
    for narrow in (workload, bare):
        assert decide(narrow, namespace).mode is Mode.PERMISSIVE
        assert decide(narrow, namespace, mesh).mode is Mode.STRICT
        assert decide(narrow, namespace, mesh).origin.startswith(f"{ROOT}/mesh")
        assert decide(narrow, peer("shop/all", "DISABLE"), mesh).mode is Mode.DISABLE
    assert decide(peer(f"{ROOT}/mesh", "UNSET")).mode is Mode.PERMISSIVE


def test_policy_namespace_policy_stays_in_its_namespace() -> None:
    """An author in one namespace must never affect another."""
    assert decide(peer("evil/all", "DISABLE")).mode is Mode.PERMISSIVE
    assert decide(peer("evil/web", "DISABLE", selector={"app": "web"})).mode is Mode.PERMISSIVE
    assert decide(peer("shop-evil/all", "DISABLE"), peer("sho/all", "DISABLE")).origin == "default"


def test_policy_selector_needs_every_label_exactly() -> None:
    def mode(labels: dict[str, str]) -> Mode:
        return decide(peer("shop/x", "STRICT", selector=labels)).mode

    assert mode({"app": "web"}) is Mode.STRICT
    assert mode({"app": "web", "tier": "front"}) is Mode.STRICT
    assert mode({"app": "web", "tier": "back"}) is Mode.PERMISSIVE
    assert mode({"app": "we"}) is Mode.PERMISSIVE
    assert mode({"app": "Web"}) is Mode.PERMISSIVE
    assert mode({"missing": ""}) is Mode.PERMISSIVE


def test_policy_emptied_selector_selects_nothing() -> None:
    """The loader refuses it; one that was made otherwise must not become select-all."""
    (document,) = policies(peer("shop/x", "DISABLE", selector={"app": "web"}))
    spec = PeerAuthenticationSpec(
        selector=WorkloadSelector(match_labels={}), mtls=document.spec.mtls
    )
    emptied = PeerAuthentication(metadata=document.metadata, origin=document.origin, spec=spec)
    assert resolve([emptied], Subjects.of([WEB]), ROOT).policies["shop/web"].origin == "default"


def test_policy_oldest_wins_on_each_level() -> None:
    for uid, selector in ((f"{ROOT}/", None), ("shop/", None), ("shop/", {"app": "web"})):
        young = peer(f"{uid}a", "DISABLE", selector=selector, created=AGES[1])
        old = peer(f"{uid}b", "STRICT", selector=selector, created=AGES[0])
        undated = peer(f"{uid}0", "PERMISSIVE", selector=selector)
        assert decide(young, old, undated).mode is Mode.STRICT
        assert decide(young, undated).mode is Mode.DISABLE


def test_policy_same_age_is_decided_by_name() -> None:
    first = peer("shop/a", "STRICT", created=AGES[0])
    second = peer("shop/b", "DISABLE", created=AGES[0])
    assert decide(second, first).mode is Mode.STRICT
    assert decide(peer("shop/b", "DISABLE"), peer("shop/a", "STRICT")).mode is Mode.STRICT


def test_policy_of_one_level_are_not_merged_and_it_is_said() -> None:
    old = peer("shop/old", "UNSET", selector={"app": "web"}, created=AGES[0])
    young = peer(
        "shop/young", "STRICT", selector={"tier": "front"}, ports={80: "DISABLE"}, created=AGES[1]
    )
    resolution = resolve(policies(old, young), Subjects.of([WEB]), ROOT)
    found = resolution.policies["shop/web"]
    assert (found.mode, found.port_modes) == (Mode.PERMISSIVE, {})
    assert "shop/young has no effect for workload shop/web" in reasons(resolution)
    assert "shop/old" in reasons(resolution)


def test_policy_overruled_namespace_and_mesh_policies_are_named() -> None:
    for namespace in ("shop", ROOT):
        texts = [peer(f"{namespace}/{name}", "STRICT") for name in "abc"]
        resolution = resolve(policies(*texts), Subjects.of([]), ROOT)
        assert reasons(resolution).count("has no effect") == 2


def test_policy_selector_in_the_root_namespace_is_ignored_with_a_warning() -> None:
    text = peer(f"{ROOT}/web", "STRICT", selector={"app": "web"})
    inside = Subject(f"{ROOT}/web", ROOT, {"app": "web"})
    resolution = resolve(policies(text), Subjects.of([WEB, inside]), ROOT)
    assert {found.mode for found in resolution.policies.values()} == {Mode.PERMISSIVE}
    assert "is ignored" in reasons(resolution)


def test_policy_port_level_beats_the_workloads_mode() -> None:
    found = decide(
        peer("shop/web", "STRICT", selector={"app": "web"}, ports={80: "DISABLE", 81: "PERMISSIVE"})
    )
    assert found.mode is Mode.STRICT
    assert found.port_modes == {80: Mode.DISABLE, 81: Mode.PERMISSIVE}
    assert found.port_origins == dict.fromkeys((80, 81), "shop/web (mesh.yaml:1)")


def test_policy_port_level_unset_inherits_the_workloads_mode() -> None:
    mesh = peer(f"{ROOT}/mesh", "STRICT")
    found = decide(
        mesh, peer("shop/web", selector={"app": "web"}, ports={80: "UNSET", 81: "DISABLE"})
    )
    assert (found.mode, found.port_modes) == (Mode.STRICT, {81: Mode.DISABLE})


def test_policy_strict_outside_the_mesh_is_a_warning() -> None:
    outside = [Subject(f"shop/vm{i}", "shop", {"app": "vm"}, in_mesh=False) for i in range(9)]
    for text in (
        peer(f"{ROOT}/mesh", "STRICT"),
        peer("shop/all", "STRICT"),
        peer("shop/vm", "STRICT", selector={"app": "vm"}),
        peer("shop/vm", "PERMISSIVE", selector={"app": "vm"}, ports={80: "STRICT"}),
    ):
        resolution = resolve(policies(text), Subjects.of([*outside, WEB]), ROOT)
        assert list(resolution.policies) == ["shop/web"]
        assert len(resolution.warnings) == 1
        assert "outside the mesh: shop/vm0, " in reasons(resolution)
        assert "and 4 more" in reasons(resolution)
    for text in (peer("shop/all", "PERMISSIVE"), peer("other/all", "STRICT")):
        assert resolve(policies(text), Subjects.of(outside), ROOT).warnings == ()


def test_policy_disable_is_a_warning_that_names_who_is_in_the_clear() -> None:
    text = reasons(resolve(policies(peer("shop/all", "DISABLE")), Subjects.of([WEB]), ROOT))
    assert "PeerAuthentication shop/all says DISABLE: traffic is in the clear" in text
    assert "to shop/web;" in text
    ports = peer(
        "shop/web", "STRICT", selector={"app": "web"}, ports={81: "DISABLE", 80: "DISABLE"}
    )
    assert "to shop/web, on port 80, 81;" in reasons(
        resolve(policies(ports), Subjects.of([WEB]), ROOT)
    )


def test_policy_disable_that_is_overruled_or_for_nobody_puts_nobody_in_the_clear() -> None:
    narrower = peer("shop/web", "STRICT", selector={"app": "web"})
    for texts in (
        (peer("shop/all", "DISABLE"), narrower),
        (peer("other/all", "DISABLE"),),
        (peer("shop/none", "DISABLE", selector={"app": "none"}),),
    ):
        found = [document for text in texts for document in policies(text)]
        resolution = resolve(found, Subjects.of([WEB]), ROOT)
        assert "in the clear" not in reasons(resolution)
        assert "now it is in force for no workload" in reasons(resolution)
        assert resolution.policies["shop/web"].mode is not Mode.DISABLE


def test_policy_disable_is_known_of_workloads_elsewhere_and_no_other_mode() -> None:
    far = Subject("shop/far", "shop", {"app": "far"})
    for mode, known in (("DISABLE", {"shop/web", "shop/far"}), ("STRICT", {"shop/web"})):
        found = resolve(
            policies(peer("shop/all", mode)), Subjects.of([WEB, far]), ROOT, {"shop/web"}
        )
        assert found.policies.keys() == known
    ports = peer("shop/far", "STRICT", selector={"app": "far"}, ports={80: "DISABLE"})
    found = resolve(policies(ports), Subjects.of([WEB, far]), ROOT, frozenset())
    assert found.policies["shop/far"].port_modes == {80: Mode.DISABLE}


LABELS = st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy"), min_size=1)
MODES = st.sampled_from([mode.value for mode in MtlsMode])
POLICY = st.builds(
    lambda namespace, name, mode, selector, ports, created: peer(
        f"{namespace}/{name}",
        mode,
        selector=selector,
        ports=ports if selector else None,
        created=created,
    ),
    st.sampled_from([ROOT, "shop", "other"]),
    st.text("abc", min_size=1, max_size=3),
    MODES,
    st.none() | LABELS,
    st.none() | st.dictionaries(st.integers(1, 3), MODES, min_size=1),
    st.none() | st.sampled_from(AGES),
)
SUBJECTS = [
    Subject(f"{namespace}/w{i}", namespace, labels, in_mesh=bool(i))
    for namespace in (ROOT, "shop", "other")
    for i, labels in enumerate(({"a": "x"}, {"a": "x", "b": "y"}, {}))
]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        POLICY,
        max_size=10,
        unique_by=lambda text: text.split('"metadata": ')[1].split(', "spec"')[0],
    ),
    st.randoms(use_true_random=False),
)
def test_policy_document_order_never_matters(texts: list[str], chance: random.Random) -> None:
    found = []
    seen = set()
    for text in texts:
        (document,) = policies(text)
        if document.uid not in seen:
            found.append(document)
            seen.add(document.uid)
    expected = resolve(found, Subjects.of(SUBJECTS), ROOT)
    shuffled, subjects = list(found), list(SUBJECTS)
    chance.shuffle(shuffled)
    chance.shuffle(subjects)
    assert resolve(shuffled, Subjects.of(subjects), ROOT) == expected
    for policy in expected.policies.values():
        assert policy.mode in Mode
        assert policy.port_modes.keys() == policy.port_origins.keys()


@settings(max_examples=200, deadline=None)
@given(st.lists(POLICY, max_size=8))
def test_policy_agrees_with_the_rules_written_the_long_way(texts: list[str]) -> None:
    unique = {document.uid: document for text in texts for document in policies(text)}
    found = resolve(unique.values(), Subjects.of(SUBJECTS), ROOT)
    for subject in SUBJECTS:
        if not subject.in_mesh:
            assert subject.uid not in found.policies
            continue
        levels: list[list[PeerAuthentication]] = [[], [], []]
        for document in unique.values():
            namespace, selector = document.metadata.namespace, document.spec.selector
            if selector is not None:
                chosen = selector.match_labels.items() <= subject.labels.items()
                if namespace == subject.namespace != ROOT and chosen:
                    levels[0].append(document)
            elif namespace == ROOT:
                levels[2].append(document)
            elif namespace == subject.namespace:
                levels[1].append(document)
        expected = Mode.PERMISSIVE
        for level in reversed(levels):
            if level:
                mode = min(level, key=lambda item: item.age).spec.mtls.mode
                expected = expected if mode is MtlsMode.UNSET else Mode(mode.value)
        assert found.policies[subject.uid].mode is expected
