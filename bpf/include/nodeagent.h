/*
 * What the BPF programs share with each other and with nodeagent/capture/layout.py: marks, slots, a
 * pod's settings, addresses and counters. Types of fixed width only; every size is asserted here and
 * checked again by the Python side's unit test, which reads this file.
 *
 * Addresses are 16 bytes, IPv4 as IPv4-mapped (RFC 4291, 2.5.5.2), so that one function serves both
 * families.
 */
#ifndef NODEAGENT_H
#define NODEAGENT_H

#include <linux/bpf.h>
#include <stdbool.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* The tunnel's own sockets: they take the main routing table and pass the guard. */
#define MARK_TUNNEL 0x539
/* The tunnel's connections to the application, and the application's answers. Never on a device. */
#define MARK_DELIVERY 0x111
/* Connections older than the enrolment: they live on while their port may speak plaintext. */
#define MARK_OLDER 0x53a

#define HBONE_PORT 15008

/* ifindex of `lo`, the same in every network namespace (LOOPBACK_IFINDEX of the kernel). */
#define LO_IFINDEX 1

enum slot {
    SLOT_OUTBOUND = 0,
    SLOT_INBOUND = 1,
    SLOT_HBONE = 2,
    SLOTS = 3,
};

/* Addresses of one pod: more than anything real, and a bound for the verifier. */
#define MAX_ADDRESSES 16
/*
 * Ports that differ from the pod's default mode. They matter to connections older than the
 * enrolment only. With more, nodeagent treats all as strict; each costs the verifier time.
 */
#define MAX_EXCEPTIONS 16

struct address {
    __u32 word[4]; /* network byte order */
};
_Static_assert(sizeof(struct address) == 16, "layout.py: ADDRESS");

struct pod_config {
    __u32 count;
    struct address address[MAX_ADDRESSES];
};
_Static_assert(sizeof(struct pod_config) == 4 + 16 * MAX_ADDRESSES, "layout.py: CONFIG");

/* Which local ports accept nothing but mutual TLS. */
struct guard_settings {
    __u32 strict_default;            /* mode of ports that are no exception */
    __u32 count;                     /* exceptions in use */
    __u16 exception[MAX_EXCEPTIONS]; /* ports of the other mode, host byte order */
};
_Static_assert(sizeof(struct guard_settings) == 8 + 2 * MAX_EXCEPTIONS, "layout.py: SETTINGS");

/* All that the programs know of one pod. `cookie` is its namespace's, for nodeagent only. */
struct pod {
    __u64 cookie;
    struct guard_settings settings;
    struct pod_config config;
    __u32 padding;
};
_Static_assert(sizeof(struct pod) == 312, "layout.py: POD_SIZE");

/*
 * Pods of one node, with their numbers from 1 on. The guard learns a pod's number from the class id
 * of the filter that runs it, of which the kernel keeps 16 bits.
 */
#define MAX_PODS 4096

struct pod_slot {
    __u32 pod;
    __u32 slot;
};
_Static_assert(sizeof(struct pod_slot) == 8, "layout.py: slot_key");

/* Every counter, in the order of its number. The names are those of `Capture.counters()`. */
#define COUNTERS(X)                         \
    X(CAPTURED_OUTBOUND, captured_outbound) \
    X(CAPTURED_INBOUND, captured_inbound)   \
    X(CAPTURED_HBONE, captured_hbone)       \
    X(CLOSED_OUTBOUND, closed_outbound)     \
    X(CLOSED_INBOUND, closed_inbound)       \
    X(CLOSED_HBONE, closed_hbone)           \
    X(EGRESS_BYPASS, egress_bypass)         \
    X(EGRESS_DELIVERY, egress_delivery)     \
    X(EGRESS_OLDER, egress_older)           \
    X(EGRESS_FRAGMENT, egress_fragment)     \
    X(EGRESS_UNREADABLE, egress_unreadable) \
    X(INGRESS_SPOOFED, ingress_spoofed)     \
    X(INGRESS_DELIVERY, ingress_delivery)   \
    X(INGRESS_OLDER, ingress_older)         \
    X(INGRESS_UNREADABLE, ingress_unreadable)

enum counter {
#define X(number, name) COUNT_##number,
    COUNTERS(X)
#undef X
        COUNTER_COUNT,
};

/* Packets or lookups per counter; never reset. */
struct pod_counters {
    __u64 value[COUNTER_COUNT];
};

static __always_inline struct address mapped(__u32 ip4) {
    return (struct address){.word = {0, 0, bpf_htonl(0xffff), ip4}};
}

static __always_inline bool same(const struct address *a, const struct address *b) {
    return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
           a->word[3] == b->word[3];
}

static __always_inline bool is_loopback(const struct address *a) {
    if (a->word[0] || a->word[1]) return false;
    if (a->word[2] == bpf_htonl(0xffff))
        return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
    return a->word[2] == 0 && a->word[3] == bpf_htonl(1);
}

#endif
