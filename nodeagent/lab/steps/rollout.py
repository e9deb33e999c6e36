"""Rolling out mutual TLS safely: the exercise of the istioinaction lab, step by step.

This module owns the order of that rollout and what each step must show. It promises the names,
namespaces, services and manifests of the exercise's text, and its outcomes. It may not soften one.

Where the text uses what is of another kind of mesh, the nearest thing of this one stands for it:

- The client certificate in the headers of a request (`X-Forwarded-Client-Cert`) is a proxy's of
  layer 7. Here it is in the access log of the called pod's tunnel, with both identities.
- Padlocks in Kiali are drawn from `istio_tcp_connections_opened_total` by its label
  `connection_security_policy`: it is that metric which is read.
- Envoy's own statistics (`tls_inspector`, `ssl.handshake`) are those of the node's /stats, which
  need no annotation. The text's proxy inspects a connection twice and counts 2; here it is 1.
  Plaintext comes in at port 15006 and mutual TLS at 15008, in the text both at 15006.
- An EnvoyFilter to have `audit_flag` and certificates in the access log: they always are. The rules
  that set the flag stand beside it.
- Methods and paths in the AUDIT rule are of layer 7. The record says that they were not looked at.
- As it is printed the AUDIT policy has no name, for want of two spaces. It is tried as printed, and
  then as meant.
"""

from __future__ import annotations

import json
from typing import ClassVar, Final

import msgspec

from nodeagent.lab.claims import chain, polled
from nodeagent.lab.model import LabSpec
from nodeagent.lab.steps.exercise import MUTUAL, PLAINTEXT, Call, Exercise, Stats, Step

__all__ = ["Rollout"]

SLEEP: Final = "istioinaction/sleep"
OUTSIDE: Final = "default/sleep"
HTTPBIN: Final = "default/httpbin"
WEB_API: Final = "istioinaction/web-api"
RECOMMENDATION: Final = "istioinaction/recommendation"
HISTORY: Final = "istioinaction/purchase-history"
IN_MESH: Final = (SLEEP, HTTPBIN, WEB_API, RECOMMENDATION, HISTORY)

HEADERS_URL: Final = "httpbin.default:8000/headers"
WEB_API_URL: Final = "web-api.istioinaction:8080"
HISTORY_URL: Final = "purchase-history.istioinaction:8080"

PLAIN: Final = "listener.0.0.0.0_15006"
HBONE: Final = "listener.0.0.0.0_15008"
NOT_FOUND: Final = "tls_inspector.tls_not_found"
ONCE: Final = "each connection is counted once (the text's proxy inspects it twice)"
INSPECTED: Final = frozenset(
    {
        "tls_inspector.alpn_found",
        "tls_inspector.alpn_not_found",
        "tls_inspector.client_hello_too_large",
        "tls_inspector.connection_closed",
        "tls_inspector.read_error",
        "tls_inspector.sni_found",
        "tls_inspector.sni_not_found",
        "tls_inspector.tls_found",
        NOT_FOUND,
    }
)
"""As the text prints them."""

MESH_POLICY: Final = "istio-system/default"
HISTORY_POLICY: Final = "istioinaction/purchase-history-strict"
NAMESPACE_POLICY: Final = "istioinaction/default"
AUDIT_POLICY: Final = "istioinaction/audit-web-api-authpolicy"


def _complete(call: Call) -> bool:
    """Return whether all three services of the call graph have answered."""
    if not call.answered:
        return False
    try:
        names = list(chain(call.body))
    except (json.JSONDecodeError, KeyError):
        return False
    return names == ["web-api", "recommendation", "purchase-history"]


class Rollout(Exercise):
    LAB: ClassVar[str] = "istioinaction"

    @classmethod
    def described(cls) -> LabSpec:
        # The mesh-wide policy is a manifest of the first step.
        return msgspec.structs.replace(super().described(), resources=())

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("First steps", self._first_steps),
            Step("Introduce strict mTLS one service at a time", self._one_service),
            Step("Who's calling with mTLS or Plaintext?", self._who_is_calling),
            Step("Use AuthorizationPolicy and Access Logging", self._audit),
            Step("Apply strict mTLS", self._strict),
        )

    def _first_steps(self) -> None:
        self.apply(
            "default-peerauth-permissive.yaml",
            self.have_mode(dict.fromkeys(IN_MESH, ("PERMISSIVE", MESH_POLICY))),
            f"every workload is PERMISSIVE, and explicitly so: by {MESH_POLICY}",
        )
        call = self.call(SLEEP, HEADERS_URL)
        self.claim("a client in the mesh is answered", call.answered)
        entry = self.logged(call, HTTPBIN)
        self.claim(
            f"by mutual TLS: {entry.get('src.identity')} → {entry.get('dst.identity')}",
            self.is_mutual(entry, SLEEP, HTTPBIN),
        )
        call = self.call(OUTSIDE, HEADERS_URL)
        self.claim("a client outside the mesh is answered, too", call.answered)
        entry = self.logged(call, HTTPBIN)
        self.claim(
            f"in plaintext: from {entry.get('src.addr')}, without an identity",
            self.is_plaintext(entry),
        )

    def _one_service(self) -> None:
        modes = dict.fromkeys(IN_MESH, ("PERMISSIVE", MESH_POLICY))
        modes[HISTORY] = ("STRICT", HISTORY_POLICY)
        self.apply(
            "purchase-history-strict.yaml",
            self.have_mode(modes),
            f"purchase-history is STRICT by {HISTORY_POLICY}, and no other workload is",
        )
        locked = self.opened(HISTORY, MUTUAL)
        clear = self.opened(HISTORY, PLAINTEXT)
        call = self.call(OUTSIDE, WEB_API_URL, _complete)
        self.claim("outside → web-api → recommendation → purchase-history: works", _complete(call))
        entry = self.logged(call, WEB_API)
        self.claim("outside → web-api is plaintext", self.is_plaintext(entry))
        entry = self.logged(call, HISTORY, source=RECOMMENDATION)
        self.claim(
            "recommendation → purchase-history is mutual TLS",
            self.is_mutual(entry, RECOMMENDATION, HISTORY),
        )
        self.claim(
            "the metric behind the padlock says so, and knows of nothing else",
            polled(lambda: self.opened(HISTORY, MUTUAL) > locked, self._patience)
            and self.opened(HISTORY, PLAINTEXT) == clear,
        )
        self._is_refused(HISTORY, HISTORY_URL, HISTORY_POLICY)

    def _who_is_calling(self) -> None:
        inspected = self.stats(WEB_API, "tls_inspector")
        self.claim("nine statistics of tls_inspector", set(inspected) == INSPECTED)
        before = self.stats(WEB_API, "listener.0.0.0.0")
        call = self.call(OUTSIDE, WEB_API_URL, _complete)
        self.claim("a plaintext call to web-api is answered", _complete(call))
        self._counted(inspected, "tls_inspector", {NOT_FOUND: 1}, ONCE)
        self._counted(
            before,
            "listener.0.0.0.0",
            {f"{PLAIN}.downstream_cx_total": 1, f"{PLAIN}.downstream_cx_destroy": 1},
            "one connection came in at 15006 and has ended, without a handshake",
        )
        caller = self.logged(call, WEB_API).get("src.addr", "")
        self.claim(
            f"the access log has its address: {caller}",
            caller.startswith(tuple(self._spelled(OUTSIDE))),
        )
        inspected = self.stats(WEB_API, "tls_inspector")
        before = self.stats(WEB_API, "listener.0.0.0.0")
        call = self.call(SLEEP, WEB_API_URL, _complete)
        self.claim("a call from the mesh is answered", _complete(call))
        self._counted(
            inspected,
            "tls_inspector",
            {f"tls_inspector.{name}": 1 for name in ("tls_found", "alpn_found", "sni_not_found")},
            "tls_found has grown by 1, tls_not_found has not",
        )
        # Handshakes are not of connections: this one may share an HBONE connection that stood.
        self._counted(
            {name: value for name, value in before.items() if "_cx_" in name},
            "listener.0.0.0.0",
            {f"{HBONE}.downstream_cx_total": 1, f"{HBONE}.downstream_cx_destroy": 1},
            "one connection came in at 15008, and none at 15006",
        )

    def _counted(self, before: Stats, part: str, more: Stats, said: str) -> None:
        """Claim that of these statistics just `more` has been added."""
        wanted = {name: value + more.get(name, 0) for name, value in before.items()}
        found = self.stats(WEB_API, part, lambda seen: wanted.items() <= seen.items())
        shown = ", ".join(f"{name}: {found.get(name)}, was {before[name]}" for name in more)
        self.claim(f"{said}: {shown}", wanted.items() <= found.items())

    def _spelled(self, pod: str) -> list[str]:
        return [f"[{text}]:" if ":" in text else f"{text}:" for text in self.addresses(pod)]

    def _audit(self) -> None:
        node = self._lab.pod(WEB_API).pod.node
        self.apply(
            "audit-auth-policy-as-printed.yaml",
            lambda: any(each["field"] == "name" for each in self.problems(node)),
            "as printed (metadata not indented) it is refused, with file, line and field",
            name="audit-auth-policy",
        )
        self.apply(
            "audit-auth-policy.yaml",
            lambda: not self.problems(node) and self._audited(),
            f"indented it is in force: {AUDIT_POLICY}, AUDIT, for web-api",
        )
        said = " ".join(self.warnings(node))
        self.claim(
            "methods and paths are of layer 7: a warning says that they are not looked at",
            "operation.methods" in said and "operation.paths" in said,
        )
        call = self.call(SLEEP, WEB_API_URL, _complete)
        entry = self.logged(call, WEB_API)
        self.claim(
            "a call from the mesh: both identities in the log, and audit_flag: false",
            _complete(call)
            and self.is_mutual(entry, SLEEP, WEB_API)
            and entry.get("audit_flag") == "false",
        )
        by, uri = self.identity(WEB_API), self.identity(SLEEP)
        self.claim(
            f"cert: {entry.get('cert')}",
            entry.get("cert") == f'By={by};Hash={self.shown(SLEEP)};Subject="";URI={uri}',
        )
        call = self.call(OUTSIDE, WEB_API_URL, _complete)
        entry = self.logged(call, WEB_API)
        self.claim(
            "a call from outside is still answered, without an identity or a certificate",
            _complete(call) and self.is_plaintext(entry) and "cert" not in entry,
        )
        rules = entry.get("audit_rules", "")
        self.claim(
            f"audit_flag: {entry.get('audit_flag')}, by {rules}",
            entry.get("audit_flag") == "true"
            and rules.startswith(f"{AUDIT_POLICY} rules[0] (")
            and rules.endswith("without methods, paths"),
        )

    def _audited(self) -> bool:
        return [
            (each["policy"], each["action"]) for each in self.row(WEB_API).get("authorizations", ())
        ] == [(f"AuthorizationPolicy/{AUDIT_POLICY}", "AUDIT")]

    def _strict(self) -> None:
        modes = dict.fromkeys(IN_MESH, ("STRICT", NAMESPACE_POLICY))
        modes[HISTORY] = ("STRICT", HISTORY_POLICY)
        modes[HTTPBIN] = ("PERMISSIVE", MESH_POLICY)
        self.apply(
            "istioinaction-peerauth-strict.yaml",
            self.have_mode(modes),
            "every workload of namespace istioinaction is STRICT, and no other",
        )
        self._is_refused(WEB_API, WEB_API_URL, NAMESPACE_POLICY)
        call = self.call(SLEEP, WEB_API_URL, _complete)
        self.claim("the client in the mesh still reaches all three services", _complete(call))
        call = self.call(OUTSIDE, HEADERS_URL)
        self.claim("httpbin, of another namespace, still takes plaintext", call.answered)

    def _is_refused(self, pod: str, url: str, policy: str) -> None:
        """Claim that the client outside the mesh is refused by the pod, because of this policy."""
        call = self.call(OUTSIDE, url, lambda made: made.refused)
        self.claim(f"the plaintext client is refused (curl: exit {call.exit_code})", call.refused)
        entry = self.logged(call, pod)
        self.claim(
            f"the log says why: {entry.get('reason')}, by {entry.get('policy')}",
            entry.get("reason") == "strict_requires_mtls"
            and entry.get("policy", "").startswith(f"{policy} ("),
        )
