from __future__ import annotations

import msgspec
import pytest

from support.mesh_state import (
    SETTINGS,
    identity,
    ip,
    local,
    pod,
    policy,
    service,
    state,
    workload,
)
from ztunnel.protocol import DataPlane, Endpoint, Mode, Resource
from ztunnel.reasons import Reason
from ztunnel.route import (
    MAX_CHOICES,
    Balance,
    Passthrough,
    Plain,
    Refuse,
    Route,
    Tunnel,
    baggage,
    route,
)
from ztunnel.state import OWN_PORTS

SLEEP = workload("sleep", "10.1.0.1", "fd00:1::1")
HTTPBIN = workload("httpbin", "10.2.0.1", "fd00:2::1")
LEGACY = workload("legacy", "10.3.0.1", plane=DataPlane.TCP)
VIP = ("10.96.0.1", "fd96::1")


def go(destination: str, port: int, *resources: Resource) -> Route:
    found = state(
        SLEEP,
        HTTPBIN,
        LEGACY,
        pod("pod-sleep", SLEEP.uid, *SLEEP.addresses),
        *resources,
    )
    return route(found, local(found, "pod-sleep"), ip(destination), port)


def test_a_workload_that_speaks_hbone_is_tunnelled_under_both_identities() -> None:
    found = go("10.2.0.1", 8080)
    assert isinstance(found, Tunnel)
    assert (found.target, found.hbone_port) == (ip("10.2.0.1"), 15008)
    assert found.identity == identity("sleep")
    assert found.expected == {identity("httpbin")}
    assert found.authority == "10.2.0.1:8080"
    assert found.host == ""


def test_ipv6_is_tunnelled_alike() -> None:
    found = go("fd00:2::1", 8080)
    assert isinstance(found, Tunnel)
    assert found.authority == "[fd00:2::1]:8080"
    assert found.target == ip("fd00:2::1")


def test_a_workload_without_hbone_gets_plain_tcp() -> None:
    assert go("10.3.0.1", 8080) == Plain(ip("10.3.0.1"), 8080, LEGACY.uid)


def test_disable_is_obeyed_port_by_port_and_names_its_policy() -> None:
    plain = Plain(ip("10.2.0.1"), 8080, HTTPBIN.uid, origin="istio-system/default")
    assert go("10.2.0.1", 8080, policy(HTTPBIN.uid, Mode.DISABLE)) == plain
    ports = policy(HTTPBIN.uid, Mode.STRICT, p8080=Mode.DISABLE)
    clear = msgspec.structs.replace(plain, origin=f"{HTTPBIN.uid}-ports")
    assert go("10.2.0.1", 8080, ports) == clear
    assert isinstance(go("10.2.0.1", 8081, ports), Tunnel)
    kept = policy(HTTPBIN.uid, Mode.DISABLE, p8080=Mode.PERMISSIVE)
    assert isinstance(go("10.2.0.1", 8080, kept), Tunnel)


@pytest.mark.parametrize("mode", [Mode.PERMISSIVE, Mode.STRICT])
def test_no_other_mode_takes_mutual_tls_away(mode: Mode) -> None:
    assert isinstance(go("10.2.0.1", 8080, policy(HTTPBIN.uid, mode)), Tunnel)
    # It is a destination's mode that counts, and not a caller's.
    assert isinstance(go("10.2.0.1", 8080, policy(SLEEP.uid, Mode.DISABLE)), Tunnel)


def test_disable_is_obeyed_behind_a_service_by_the_workloads_own_port() -> None:
    web = service("web", VIP, (Endpoint(HTTPBIN.uid, ""),))
    found = go("10.96.0.1", 80, web, policy(HTTPBIN.uid, p8080=Mode.DISABLE))
    assert found == Plain(ip("10.2.0.1"), 8080, HTTPBIN.uid, web.uid, origin=f"{HTTPBIN.uid}-ports")
    assert isinstance(go("10.96.0.1", 80, web, policy(HTTPBIN.uid, p80=Mode.DISABLE)), Tunnel)


@pytest.mark.parametrize("port", sorted(OWN_PORTS))
def test_disable_opens_none_of_the_tunnels_own_ports(port: int) -> None:
    asked = go("10.2.0.1", port, policy(HTTPBIN.uid, Mode.DISABLE))
    assert asked == Refuse(Reason.SELF_CALL)


def test_what_is_not_in_the_mesh_passes_through() -> None:
    assert go("192.0.2.7", 443) == Passthrough()
    # Not our ports there: nobody of us listens.
    assert go("192.0.2.7", 15008) == Passthrough()


@pytest.mark.parametrize(
    "destination", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "::", "::127.0.0.1"]
)
def test_this_host_is_never_a_destination(destination: str) -> None:
    assert go(destination, 80) == Refuse(Reason.SELF_CALL)


@pytest.mark.parametrize("port", sorted(OWN_PORTS))
@pytest.mark.parametrize("destination", ["10.2.0.1", "10.3.0.1", "10.1.0.1", "::ffff:10.2.0.1"])
def test_the_tunnels_own_ports_are_refused(destination: str, port: int) -> None:
    assert go(destination, port) == Refuse(Reason.SELF_CALL)


@pytest.mark.parametrize("port", sorted(OWN_PORTS))
def test_they_are_refused_also_behind_a_service(port: int) -> None:
    by_service = service("s", VIP, (Endpoint(HTTPBIN.uid, ""),), ports=((80, port),))
    assert go("10.96.0.1", 80, by_service) == Refuse(Reason.SELF_CALL, by_service.uid)
    by_endpoint = service("s", VIP, (Endpoint(HTTPBIN.uid, "", 1, {80: port}),))
    assert go("10.96.0.1", 80, by_endpoint) == Refuse(Reason.SELF_CALL, by_endpoint.uid)


def test_an_endpoint_that_is_loopback_is_refused() -> None:
    evil = service("s", VIP, (Endpoint("", "127.0.0.1"),))
    assert go("10.96.0.1", 80, evil) == Refuse(Reason.SELF_CALL, evil.uid)


def test_port_zero_is_refused() -> None:
    assert go("10.2.0.1", 0) == Refuse(Reason.SELF_CALL)


def test_a_service_becomes_its_endpoint_and_its_port() -> None:
    web = service("web", VIP, (Endpoint(HTTPBIN.uid, ""),))
    found = go("10.96.0.1", 80, web)
    assert isinstance(found, Tunnel)
    assert found.authority == "10.2.0.1:8080"
    assert found.host == "web.default.svc.cluster.local"
    assert (found.workload, found.service) == (HTTPBIN.uid, web.uid)


def test_an_endpoints_own_port_wins() -> None:
    web = service("web", VIP, (Endpoint(HTTPBIN.uid, "", 1, {80: 9090}),))
    found = go("10.96.0.1", 80, web)
    assert isinstance(found, Tunnel)
    assert found.authority == "10.2.0.1:9090"


@pytest.mark.parametrize(
    "vip, target", [("10.96.0.1", "10.2.0.1:8080"), ("fd96::1", "[fd00:2::1]:8080")]
)
def test_the_endpoints_address_is_of_the_family_that_was_called(vip: str, target: str) -> None:
    web = service("web", VIP, (Endpoint(HTTPBIN.uid, "10.2.0.1"),))
    found = go(vip, 80, web)
    assert isinstance(found, Tunnel)
    assert found.authority == target


def test_the_other_family_is_better_than_none() -> None:
    only4 = workload("only4", "10.4.0.1")
    found = go("fd96::1", 80, only4, service("web", VIP, (Endpoint(only4.uid, ""),)))
    assert isinstance(found, Tunnel)
    assert found.authority == "10.4.0.1:8080"


def test_an_unknown_port_of_a_service_is_refused() -> None:
    web = service("web", VIP, (Endpoint(HTTPBIN.uid, ""),))
    assert go("10.96.0.1", 81, web) == Refuse(Reason.UNKNOWN_PORT, web.uid)


def test_an_unknown_port_of_a_service_that_shares_a_workloads_address_is_the_workloads() -> None:
    headless = service("headless", ("10.2.0.1",), (Endpoint(HTTPBIN.uid, ""),))
    found = go("10.2.0.1", 9999, headless)
    assert isinstance(found, Tunnel)
    assert found.authority == "10.2.0.1:9999"


def test_services_may_share_an_address_by_ports() -> None:
    one = service("one", VIP, (Endpoint(HTTPBIN.uid, ""),), ports=((80, 1000),))
    two = service("two", VIP, (Endpoint(LEGACY.uid, ""),), ports=((90, 2000),))
    assert isinstance(go("10.96.0.1", 80, one, two), Tunnel)
    assert go("10.96.0.1", 90, one, two) == Plain(ip("10.3.0.1"), 2000, LEGACY.uid, two.uid)


@pytest.mark.parametrize(
    "endpoints",
    [
        (),
        (Endpoint("default/not-known", ""),),
        (Endpoint("default/not-known", "10.9.9.9"),),
        (Endpoint("default/sick", ""),),
    ],
    ids=["none", "unknown", "unknown with address", "unhealthy"],
)
def test_a_service_without_a_usable_endpoint_is_refused(endpoints: tuple[Endpoint, ...]) -> None:
    sick = workload("sick", "10.5.0.1", healthy=False)
    web = service("web", VIP, endpoints)
    assert go("10.96.0.1", 80, sick, web) == Refuse(Reason.NO_ENDPOINTS, web.uid)


def test_an_endpoint_by_address_is_judged_as_the_workload_that_has_it() -> None:
    found = go("10.96.0.1", 80, service("web", VIP, (Endpoint("", "10.2.0.1"),)))
    assert isinstance(found, Tunnel)
    assert found.expected == {identity("httpbin")}


def test_an_endpoint_outside_the_mesh_gets_plain_tcp() -> None:
    web = service("web", VIP, (Endpoint("", "192.0.2.9"),))
    assert go("10.96.0.1", 80, web) == Plain(ip("192.0.2.9"), 8080, "", web.uid)


def test_several_endpoints_are_balanced_by_weight() -> None:
    web = service("web", VIP, (Endpoint(HTTPBIN.uid, "", 3), Endpoint(LEGACY.uid, "", 1)))
    found = go("10.96.0.1", 80, web)
    assert isinstance(found, Balance)
    assert [weight for _, weight in found.choices] == [3, 1]
    assert [type(choice) for choice, _ in found.choices] == [Tunnel, Plain]


def test_the_nearest_locality_takes_all() -> None:
    same_zone = workload("same-zone", "10.6.0.1", locality="eu/eu-1/b")
    same_region = workload("same-region", "10.6.0.2", locality="eu/eu-2/a")
    abroad = workload("abroad", "10.6.0.3", locality="us/us-1/a")
    endpoints = tuple(Endpoint(each.uid, "") for each in (abroad, same_region, same_zone))
    found = go("10.96.0.1", 80, abroad, same_region, same_zone, service("web", VIP, endpoints))
    assert SETTINGS.locality == "eu/eu-1/a"
    assert isinstance(found, Tunnel)
    assert found.workload == same_zone.uid


def test_a_zone_of_the_same_name_in_another_region_is_not_near() -> None:
    here = workload("here", "10.6.0.1", locality="eu/x/x")
    there = workload("there", "10.6.0.2", locality="us/eu-1/a")
    endpoints = tuple(Endpoint(each.uid, "") for each in (here, there))
    found = go("10.96.0.1", 80, here, there, service("web", VIP, endpoints))
    assert isinstance(found, Tunnel)
    assert found.workload == here.uid


def test_a_large_service_is_thinned_alike_for_one_pod() -> None:
    many = [
        workload(f"w{number}", f"10.7.{number // 250}.{number % 250 + 1}") for number in range(200)
    ]
    web = service("web", VIP, tuple(Endpoint(each.uid, "", 2) for each in many))
    first = go("10.96.0.1", 80, *many, web)
    again = go("10.96.0.1", 80, *reversed(many), web)
    assert isinstance(first, Balance)
    assert isinstance(again, Balance)
    assert len(first.choices) == MAX_CHOICES
    assert first == again


def test_the_pod_itself_behind_a_service_is_delivered_inside() -> None:
    own = service("own", VIP, (Endpoint(SLEEP.uid, ""),))
    assert go("10.96.0.1", 80, own) == Plain(ip("10.1.0.1"), 8080, SLEEP.uid, own.uid, hairpin=True)
    assert go("10.1.0.1", 8080) == Plain(ip("10.1.0.1"), 8080, SLEEP.uid, hairpin=True)


def test_without_the_pods_own_workload_nothing_is_carried() -> None:
    found = state(HTTPBIN, pod("pod-sleep", SLEEP.uid, *SLEEP.addresses))
    for destination in ("10.2.0.1", "192.0.2.7"):
        outcome = route(found, local(found, "pod-sleep"), ip(destination), 80)
        assert outcome == Refuse(Reason.UNKNOWN_WORKLOAD)


def test_a_source_without_identity_does_not_fall_back_to_plaintext() -> None:
    opted_out = workload("sleep", "10.1.0.1", plane=DataPlane.TCP)
    found = state(opted_out, HTTPBIN, pod("pod-sleep", opted_out.uid, "10.1.0.1"))
    outcome = route(found, local(found, "pod-sleep"), ip("10.2.0.1"), 80)
    assert outcome == Refuse(Reason.NO_CREDENTIAL)


def test_baggage_leaves_out_what_is_empty_and_encodes_the_rest() -> None:
    full = workload("sl,e=ep", "10.1.0.1", locality="eu/1")
    assert baggage(full) == (
        "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=sl%2Ce%3Dep,"
        "service.name=sl%2Ce%3Dep,service.version=v1,cloud.region=eu"
    )
    assert "cloud.region" not in baggage(SLEEP)
