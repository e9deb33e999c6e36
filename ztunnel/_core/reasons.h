/*
 * Why a connection ended: the closed set of tokens that the access log, the metrics and the
 * control side share. The order is the number; append, never reorder within a release.
 *
 * X(NAME, token)
 */
#ifndef ZT_REASONS_H
#define ZT_REASONS_H

#define ZT_REASONS(X)                                  \
    /* ends that are nobody's fault */                 \
    X(CLOSED, "closed")                                \
    X(CLIENT_RESET, "client_reset")                    \
    X(SERVER_RESET, "server_reset")                    \
    X(PEER_RESET, "peer_reset")                        \
    /* the core could not reach whom it should */      \
    X(CONNECT_REFUSED, "connect_refused")              \
    X(CONNECT_TIMEOUT, "connect_timeout")              \
    X(CONNECT_UNREACHABLE, "connect_unreachable")      \
    /* TLS */                                          \
    X(NO_CREDENTIAL, "no_credential")                  \
    X(TLS_TIMEOUT, "tls_timeout")                      \
    X(TLS_FAILED, "tls_failed")                        \
    X(TLS_ALERT, "tls_alert")                          \
    X(TLS_ALPN, "tls_wrong_alpn")                      \
    X(TLS_TRUNCATED, "tls_truncated")                  \
    X(CERT_MISSING, "certificate_missing")             \
    X(CERT_EXPIRED, "certificate_expired")             \
    X(CERT_NOT_YET_VALID, "certificate_not_yet_valid") \
    X(CERT_UNTRUSTED, "certificate_untrusted")         \
    X(CERT_INVALID, "certificate_invalid")             \
    X(TRUST_DOMAIN, "trust_domain_mismatch")           \
    X(IDENTITY_MISMATCH, "identity_mismatch")          \
    X(TRUST_WITHDRAWN, "trust_withdrawn")              \
    /* HTTP/2 and HBONE */                             \
    X(H2_TIMEOUT, "h2_timeout")                        \
    X(H2_PROTOCOL, "h2_protocol")                      \
    X(H2_LIMIT, "h2_limit")                            \
    X(H2_GOAWAY, "h2_goaway")                          \
    X(KEEPALIVE_TIMEOUT, "keepalive_timeout")          \
    X(IDLE, "idle")                                    \
    X(ANSWER_TIMEOUT, "connect_answer_timeout")        \
    X(PEER_DENIED, "denied_by_peer")                   \
    X(PEER_BAD_REQUEST, "bad_request_by_peer")         \
    X(PEER_UNAVAILABLE, "unavailable_by_peer")         \
    X(PEER_STATUS, "unexpected_status_by_peer")        \
    X(PEER_LOST, "peer_connection_lost")               \
    X(BAD_REQUEST, "bad_request")                      \
    X(AUTHORITY_MISMATCH, "authority_mismatch")        \
    /* judged by policy or by the mesh's state */      \
    X(STRICT_PLAINTEXT, "strict_requires_mtls")        \
    X(POLICY_DENIED, "policy_denied")                  \
    X(POLICY_MISSING, "policy_missing")                \
    X(POLICY_CHANGED, "policy_changed")                \
    X(SELF_CALL, "self_call")                          \
    X(FOREIGN_SOURCE, "foreign_source_address")        \
    X(UNKNOWN_WORKLOAD, "unknown_workload")            \
    X(UNKNOWN_PORT, "unknown_port")                    \
    X(NO_ENDPOINTS, "no_endpoints")                    \
    X(DECISION_TIMEOUT, "decision_timeout")            \
    /* limits and ends of our own */                   \
    X(NO_DESCRIPTORS, "no_descriptors")                \
    X(NO_MEMORY, "no_memory")                          \
    X(NO_PORTS, "no_ephemeral_ports")                  \
    X(POD_QUESTIONS, "pod_question_limit")             \
    X(POD_REMOVED, "pod_removed")                      \
    X(SHUTDOWN, "shutdown")                            \
    X(INTERNAL, "internal_error")                      \
    /* deadlines of their own */                       \
    X(FIRST_BYTE_TIMEOUT, "first_byte_timeout")        \
    X(REQUEST_TIMEOUT, "connect_request_timeout")      \
    X(STREAM_TIMEOUT, "stream_wait_timeout")           \
    X(HALF_CLOSED_TIMEOUT, "half_closed_timeout")      \
    /* an application's connection broke by itself */  \
    X(CLIENT_LOST, "client_lost")                      \
    X(SERVER_LOST, "server_lost")                      \
    X(DRAIN_TIMEOUT, "drain_timeout")                  \
    /* limits of a pod */                              \
    X(POD_CONNECTIONS, "pod_connection_limit")         \
    X(POD_DESCRIPTORS, "pod_descriptor_limit")         \
    X(POD_DIALS, "pod_dial_limit")                     \
    X(POD_HANDSHAKES, "pod_handshake_limit")           \
    X(POD_HELD, "pod_held_bytes_limit")

enum zt_reason {
#define X(name, token) ZT_R_##name,
    ZT_REASONS(X)
#undef X
        ZT_REASON_COUNT
};

#endif
