"""A small shop as documents: a web front end that calls a till, and policies for it.

Owns the texts, which tests join as they need them. `pay` has addresses of both families and a
service, and runs on another node than `web`; `legacy` is outside the mesh.
"""

from __future__ import annotations

__all__ = ["CALLERS", "DENY", "MESH", "STRICT"]

MESH = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: web
  namespace: shop
  labels: {app: web}
  annotations: {nodeagent.io/netns: web}
spec: {address: 10.1.0.2, serviceAccount: web}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: pay
  namespace: shop
  labels: {app: pay}
  annotations: {nodeagent.io/netns: "other:pay", nodeagent.io/addresses: "fd00::3"}
spec: {address: 10.1.0.3, serviceAccount: pay}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: legacy, namespace: shop}
spec: {address: 10.1.0.9}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: pay, namespace: shop}
spec:
  hosts: [pay.shop.example]
  addresses: [10.9.0.1]
  ports: [{number: 80, name: http, targetPort: 8080}]
  resolution: STATIC
  location: MESH_INTERNAL
  workloadSelector: {labels: {app: pay}}
"""
CALLERS = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: callers, namespace: shop}
spec:
  selector: {matchLabels: {app: pay}}
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/till"]}}]
    to: [{operation: {ports: ["443"]}}]
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/web"]}}]
    to: [{operation: {ports: ["443", "8443"]}}]
"""
DENY = """\
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-web, namespace: shop}
spec:
  action: DENY
  rules:
  - from: [{source: {namespaces: [shop]}}]
    to: [{operation: {ports: ["443"], methods: [GET]}}]
"""
STRICT = """\
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""
