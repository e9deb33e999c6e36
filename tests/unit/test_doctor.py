"""Every finding of the doctor: what provokes it, what hides it, what the page says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from nodeagent.admin.model import (
    CertificateReport,
    ConfigReport,
    PodReport,
    PodState,
    Problem,
    RecordingReport,
    Status,
    UnenforcedReport,
    ZtunnelReport,
)
from nodeagent.cli.doctor_view import show
from nodeagent.cli.output import Printer
from nodeagent.doctor.codes import CODES, page
from nodeagent.doctor.facts import (
    Agent,
    Authority,
    CaCertificate,
    Clock,
    Daemon,
    Disk,
    Drop,
    Facts,
    Feature,
    Loose,
    Network,
    Outcome,
    Peer,
    PodLook,
    PortHolder,
    Probe,
    ProbeOutcome,
    SocketProgram,
    Stranger,
    TunnelCounts,
    Unexamined,
)
from nodeagent.doctor.judge import judge
from nodeagent.doctor.model import Report, Severity

PAGE: Final = Path(__file__).parents[2] / "docs/doctor.md"
NOW: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
IDENTITY: Final = "spiffe://cluster.local/ns/shop/sa/web"
WEB: Final = "shop/web"


def days(number: float) -> timedelta:
    return timedelta(days=number)


def certificate(left: float, life: float = 3600, **fields: Any) -> CertificateReport:  # noqa: ANN401 - the report's
    until = NOW + timedelta(seconds=left)
    return CertificateReport(
        identity=IDENTITY, not_before=until - timedelta(seconds=life), not_after=until, **fields
    )


def root(left: float, life: float = 3650) -> CaCertificate:
    return CaCertificate("root", "root.pem", NOW + days(left - life), NOW + days(left))


def intermediate(left: float, life: float = 90) -> CaCertificate:
    began = NOW + days(left - life)
    return CaCertificate("intermediate", "intermediate.pem", began, NOW + days(left))


POD: Final = PodReport(
    workload=WEB, identity=IDENTITY, netns="web", state=PodState.ENROLLED, since=NOW
)
OWN: Final[dict[str, Any]] = {
    "protocol_version": 4,
    "ready": {"state": "", "workers": "", "certificates": "", "decisions": ""},
    "audit": {"stdout": ""},
}
TUNNEL: Final = ZtunnelReport(connected=True, pid=20, own=OWN)
STATUS: Final = Status(
    schema=1,
    time=NOW,
    version="1.0",
    node="node-1",
    cluster="Kubernetes",
    trust_domain="cluster.local",
    pid=10,
    started=NOW,
    ready=True,
    missing=(),
    ztunnel=TUNNEL,
    config=ConfigReport(source="/etc/nodeagent/mesh.d", loaded=True),
    pods=(POD,),
    certificates=(certificate(2400),),
)
LOOK: Final = PodLook(
    workload=WEB,
    netns="web",
    probes=(Probe(4, ProbeOutcome.ANSWERED), Probe(6, ProbeOutcome.ANSWERED)),
    hbone={"10.0.0.2": Outcome.ANSWERED},
    holders=(PortHolder(15008, 10, "nodeagent", ours=True),),
)
HEALTHY: Final = Facts(
    now=NOW,
    node="node-1",
    release="1.0",
    protocol_version=4,
    features=(Feature("sk_lookup", True, "loads"), Feature("sock_destroy", True, "works", "x")),
    agent=Agent(STATUS),
    nodeagent=Daemon("nodeagent", 10, 100, 65536),
    ztunnel=Daemon("ztunnel", 20, 100, 1048576),
    counts=TunnelCounts(release="1.0"),
    node_ports=(PortHolder(15000, 10, "nodeagent", ours=True),),
    pods=(LOOK,),
    peers=(Peer("shop/db", "node-2", "10.0.1.2", WEB, Outcome.ANSWERED),),
    clock=Clock(True, 0.01),
    authority=Authority("/var/lib/nodeagent/ca", True, (root(3000), intermediate(60)), True),
    disks=(Disk("/var/lib", 10**10, 10**11, 10**6, 10**7),),
)


def facts(**changes: Any) -> Facts:  # noqa: ANN401 - the fields of Facts
    return msgspec.structs.replace(HEALTHY, **changes)


def status(**changes: Any) -> Facts:  # noqa: ANN401 - the fields of Status
    return facts(agent=Agent(msgspec.structs.replace(STATUS, **changes)))


def tunnel(**changes: Any) -> Facts:  # noqa: ANN401 - the fields of ZtunnelReport
    return status(ztunnel=msgspec.structs.replace(TUNNEL, **changes))


def config(**changes: Any) -> Facts:  # noqa: ANN401 - the fields of ConfigReport
    return status(config=msgspec.structs.replace(STATUS.config, **changes))


def look(**changes: Any) -> Facts:  # noqa: ANN401 - the fields of PodLook
    return facts(pods=(msgspec.structs.replace(LOOK, **changes),))


def pod(state: PodState, **changes: Any) -> Facts:  # noqa: ANN401 - the fields of PodReport
    return status(pods=(msgspec.structs.replace(POD, state=state, **changes),))


def ca(*certificates: CaCertificate, **changes: Any) -> Facts:  # noqa: ANN401 - the fields of Authority
    known = HEALTHY.authority
    assert known is not None
    return facts(authority=msgspec.structs.replace(known, certificates=certificates, **changes))


def codes(report: Report) -> set[str]:
    return {each.code for each in report.findings}


DOWN: Final = Agent(None, "nobody listens", "systemctl start nodeagent")
PROBLEM: Final = Problem(file="a.yaml", line=3, column=1, field="spec", reason="is wrong")
SILENT: Final = (Probe(4, ProbeOutcome.SILENT, "nothing within 3 s"),)
DROP: Final = Drop("rule 2 of inet t c", "nft delete rule inet t c handle 2")

PROVOKED: Final[Mapping[str, tuple[Facts, ...]]] = {
    "NA1001": (
        facts(features=(Feature("sk_lookup", False, "Linux 5.4: no such program type"),)),
        facts(features=(Feature("bpffs", False, "not mounted"),)),
    ),
    "NA1002": (facts(features=(Feature("sock_destroy", False, "no", "older connections"),)),),
    "NA1003": (facts(policy_routing="Operation not supported"),),
    "NA2001": (
        facts(agent=DOWN),
        facts(agent=DOWN, control_socket="/run/nodeagent/ztunnel.sock"),
    ),
    "NA2002": (
        facts(ztunnel=None, agent=Agent(msgspec.structs.replace(
            STATUS, ztunnel=ZtunnelReport(connected=False)))),
        tunnel(connected=False),
        facts(ztunnel=None, agent=DOWN),
    ),
    "NA2003": (
        tunnel(own=OWN | {"ready": {"workers": "worker 1 has not turned for 8 s"}}),
        tunnel(own=None, error="it did not answer within 3 s"),
        facts(agent=DOWN, counts=None, tunnel_silent=True),
    ),
    "NA2004": (
        facts(release="2.0"),
        facts(counts=TunnelCounts(release="0.9")),
        tunnel(own=OWN | {"protocol_version": 3}),
    ),
    "NA2005": (tunnel(rejected="too many pods"), tunnel(oversized=("service a/b",))),
    "NA2006": (
        facts(ztunnel=Daemon("ztunnel", 20, 10, 1024)),
        facts(nodeagent=Daemon("nodeagent", 10, 65000, 65536)),
    ),
    "NA2007": (facts(control_socket="/run/nodeagent/ztunnel.sock"),),
    "NA3001": (pod(PodState.FAILED, error="verifier says no"),),
    "NA3002": (
        pod(PodState.DEGRADED, deviations=("rule 101 is missing",)),
        look(unguarded=("eth0 (egress)",)),
        facts(agent=DOWN, pods=(msgspec.structs.replace(LOOK, unguarded=("eth0 (egress)",)),)),
    ),
    "NA3003": (
        pod(PodState.WAITING),
        facts(agent=DOWN, pods=(PodLook(workload=WEB, netns="web", problem="gone", gone=True),)),
    ),
    "NA3004": (
        look(probes=(Probe(4, ProbeOutcome.NOT_TAKEN, "nobody answered the SYN"),)),
        look(probes=(Probe(6, ProbeOutcome.STRANGE, "it sent bytes"),)),
    ),
    "NA3005": (look(holders=(PortHolder(15008, 99, "evil\x1b[2J", ours=False),)),),
    "NA3006": (
        look(foreign=("rule 50: table 100",)),
        look(programs=(SocketProgram(12, "cil_sock"),)),
    ),
    "NA3007": (look(probes=SILENT),),
    "NA3008": (
        look(hbone={"10.0.0.2": Outcome.SILENT}),
        look(hbone={"10.0.0.2": Outcome.REFUSED}),
    ),
    "NA3009": (look(rules_before=("rule 50: table 7",)),),
    "NA4001": (
        status(certificates=(certificate(-5),)),
        status(certificates=(certificate(800),)),
        status(certificates=(CertificateReport(identity=IDENTITY),)),
        facts(agent=DOWN, counts=TunnelCounts(expiries={IDENTITY: NOW.timestamp() - 1})),
    ),
    "NA4002": (status(certificates=(certificate(2000, error="disk full"),)),),
    "NA4003": (
        ca(root(3000), intermediate(20)),
        ca(root(3000), intermediate(-1)),
        ca(root(100), intermediate(60)),
        ca(root(3000), intermediate(20), root_key=False),
    ),
    "NA4004": (ca(root(3000), problem="intermediate.pem cannot be read"),),
    "NA4005": (
        ca(root(3000), intermediate(95)),
        ca(root(3660), intermediate(60)),
        facts(counts=TunnelCounts(handshake_failures={"certificate_not_yet_valid": 3})),
    ),
    "NA4006": (facts(clock=Clock(False)), facts(clock=Clock(True, 1000.0))),
    "NA5001": (facts(node_ports=(PortHolder(15000, 99, "nginx", ours=False),)),),
    "NA5002": (
        facts(peers=(Peer("shop/db", "node-2", "10.0.1.2", WEB, Outcome.SILENT),)),
        facts(peers=(Peer("shop/db", "node-2", "10.0.1.2", WEB, Outcome.UNREACHABLE),)),
    ),
    "NA5003": (look(drops=(DROP,)), facts(node_drops=(DROP,))),
    "NA5004": (facts(peers=(Peer("shop/db", "node-2", "10.0.1.2", WEB, Outcome.REFUSED),)),),
    "NA5005": (facts(strangers=(Stranger("Istio's ztunnel", 99),)),),
    "NA5006": (facts(counts=TunnelCounts(release="1.0", blocked=4)),),
    "NA5007": (
        facts(
            peers=(Peer("shop/db", "node-2", "10.0.1.2", WEB, Outcome.SILENT),),
            network=Network({4: False, 6: True}),
        ),
    ),
    "NA5008": (facts(network=Network({4: True}, 250_000, 262_144)),),
    "NA6001": (facts(settings_problem="nodeagent.yaml:3: unknown field"),),
    "NA6002": (config(problems=(PROBLEM,)), config(problems=(PROBLEM,) * 9)),
    "NA6003": (config(unresolved=(PROBLEM,)),),
    "NA6004": (config(loaded=False),),
    "NA6005": (
        config(unenforced=(
            UnenforcedReport(policy="a/b", action="DENY", origin="f:1", fields=("to",), effect=""),
        )),
    ),
    "NA7001": (
        facts(disks=(Disk("/var/lib", 1024, 10**11, 10**6, 10**7),)),
        facts(disks=(Disk("/var/lib", 10**10, 10**11, 3, 10**7),)),
    ),
    "NA7002": (status(recording=RecordingReport(recorded=1, lost=2, bytes=3, problem="full")),),
    "NA7003": (tunnel(own=OWN | {"audit": {"syslog": "connection refused"}}),),
    "NA7004": (facts(loose=(Loose("/run/nodeagent", "mode 0777", "chmod go-rwx /run/x"),)),),
    "NA9001": (facts(unexamined=(Unexamined("the clock", "not permitted", "true"),)),),
}  # fmt: skip


def test_a_healthy_node_has_nothing() -> None:
    report = judge(HEALTHY)
    assert (report.healthy, report.findings, report.hidden) == (True, (), ())
    assert report.verdict == "node-1: nothing is wrong, 1 pod examined"


def test_every_code_is_provoked_here() -> None:
    assert PROVOKED.keys() == CODES.keys()


@pytest.mark.parametrize(
    "code, found", [(code, each) for code, several in PROVOKED.items() for each in several]
)
def test_each_finding_is_found_alone(code: str, found: Facts) -> None:
    report = judge(found)
    assert code in codes(report)
    # What comes with it is what it explains, or says of itself: nothing else is wrong.
    allowed = {code, *CODES[code].hidden_by} | ({"NA2001"} if found.agent is DOWN else set())
    assert codes(report) <= allowed
    for each in report.findings:
        assert each.page == page(each.code)
        assert each.text
        assert each.remedy
        assert each.affects
        assert each.commands or each.code in {"NA9001", "NA6001"}
    assert report.healthy is (CODES[code].severity is Severity.NOTE)


def test_a_certificate_near_its_end_is_an_error() -> None:
    for code in ("NA4001", "NA4002", "NA4003"):
        assert CODES[code].severity is Severity.ERROR


def test_a_cause_hides_its_symptoms_and_they_stay_in_the_report() -> None:
    broken = msgspec.structs.replace(
        STATUS, ztunnel=ZtunnelReport(connected=False), ready=False, missing=("ztunnel",)
    )
    silent = msgspec.structs.replace(LOOK, probes=SILENT)
    report = judge(facts(agent=Agent(broken), ztunnel=None, counts=None, pods=(silent,)))
    assert codes(report) == {"NA2002"}
    assert [(each.cause, each.finding.code) for each in report.hidden] == [("NA2002", "NA3007")]
    assert report.verdict == "node-1: 1 error, 1 more that these explain; 1 pod examined"


def test_a_cause_in_one_pod_hides_nothing_of_another() -> None:
    dropped = msgspec.structs.replace(LOOK, drops=(DROP,), hbone={"10.0.0.2": Outcome.SILENT})
    other = msgspec.structs.replace(LOOK, workload="shop/db", hbone={"10.0.0.3": Outcome.SILENT})
    report = judge(facts(pods=(dropped, other)))
    shown = {(each.code, each.affects) for each in report.findings}
    assert shown == {("NA5003", (WEB,)), ("NA3008", ("shop/db",))}
    assert [each.finding.affects for each in report.hidden] == [(WEB,)]


def test_a_port_that_ztunnel_lacks_does_not_explain_nodeagent() -> None:
    taken = (PortHolder(15020, 99, "nginx", ours=False),)
    report = judge(facts(agent=DOWN, node_ports=taken))
    assert codes(report) == {"NA2001", "NA5001"}
    mine = (PortHolder(15000, 99, "nginx", ours=False),)
    assert codes(judge(facts(agent=DOWN, node_ports=mine))) == {"NA5001"}


def test_a_node_that_need_not_forward_is_well() -> None:
    """Pods may have another way out (macvlan, ipvlan): only where peers are lost it is a cause."""
    assert judge(facts(network=Network({4: False, 6: False}))).healthy
    lost = Peer("shop/db", "node-2", "10.0.1.2", WEB, Outcome.SILENT)
    off = judge(facts(peers=(lost,), network=Network({4: False})))
    assert (codes(off), [each.cause for each in off.hidden]) == ({"NA5007"}, ["NA5007"])
    other = judge(facts(peers=(lost,), network=Network({4: True, 6: False})))
    assert codes(other) == {"NA5002"}


def test_a_stopped_daemon_is_told_to_go_on_and_its_silence_is_one_finding() -> None:
    agent = Daemon("nodeagent", 10, 100, 65536, stopped=True)
    ztunnel = Daemon("ztunnel", 20, 100, 1048576, stopped=True)
    report = judge(
        facts(agent=DOWN, nodeagent=agent, ztunnel=ztunnel, counts=None, tunnel_silent=True,
              pods=(msgspec.structs.replace(LOOK, probes=SILENT),))
    )  # fmt: skip
    found = {each.code: each for each in report.findings}
    assert found.keys() == {"NA2001", "NA2003"}
    assert "process 10 holds its lock" in found["NA2001"].text
    assert found["NA2001"].commands[0] == "kill -CONT 10"
    assert "it is stopped" in found["NA2003"].text
    assert found["NA2003"].commands == ("kill -CONT 20",)
    assert [(each.cause, each.finding.code) for each in report.hidden] == [("NA2003", "NA3007")]


def test_a_pod_without_a_route_is_not_called_filtered() -> None:
    lost = Peer("shop/db", "node-2", "10.0.1.2", WEB, Outcome.UNREACHABLE)
    (found,) = judge(facts(peers=(lost,))).findings
    assert found.code == "NA5002"
    assert "no route" in found.text
    assert found.commands == ("ip netns exec web ip route get 10.0.1.2 mark 0x539",)


def test_of_a_chain_of_causes_the_first_is_named() -> None:
    """A full disk keeps a certificate from renewal: the disk is what to see to."""
    failing = msgspec.structs.replace(STATUS, certificates=(certificate(2000, error="no room"),))
    full = (Disk("/var/lib", 0, 10**11, 10**6, 10**7),)
    report = judge(facts(agent=Agent(failing), disks=full))
    assert codes(report) == {"NA7001"}
    assert [(each.cause, each.finding.code) for each in report.hidden] == [("NA7001", "NA4002")]


def test_causes_form_no_circle() -> None:
    def follow(code: str, path: tuple[str, ...]) -> None:
        assert code not in path, f"{code} is hidden by itself: {path}"
        for cause in CODES[code].hidden_by:
            follow(cause, (*path, code))

    for code in CODES:
        follow(code, ())


def test_every_code_has_its_section_and_every_section_its_code() -> None:
    sections = re.findall(r"^### (NA\d{4})$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sections == sorted(CODES)


def test_names_of_programs_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(wide=True)
    for found in PROVOKED["NA3005"]:
        show(printer, judge(found))
    assert "evil\\x1b[2J (process 99)" in printer.done()
    assert "\x1b" not in printer.done()


def test_of_many_pods_with_one_trouble_some_are_told_and_all_are_named() -> None:
    looks = tuple(
        msgspec.structs.replace(LOOK, workload=f"shop/web-{number}", probes=SILENT)
        for number in range(5)
    )
    printer = Printer()
    show(printer, judge(facts(pods=looks)))
    said = printer.done()
    assert said.count("ERROR NA3007") == 3
    assert "and 2 more NA3007: shop/web-3, shop/web-4" in said


def test_a_report_is_one_json_document_with_a_schema() -> None:
    report = judge(tunnel(connected=False))
    document = msgspec.json.decode(msgspec.json.encode(report))
    assert document["schema"] == 1
    assert document["findings"][0].keys() >= {
        "code", "severity", "title", "text", "affects", "remedy", "commands", "page",
    }  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
