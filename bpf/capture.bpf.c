/*
 * Which socket of a pod takes a connection. One copy is loaded for each pod, attached to the pod's
 * network namespace, and runs when a TCP packet matches no established connection there.
 *
 * It promises that a connection is either handed to the tunnel, or passes because it never leaves
 * the pod, or is dropped: a missing tunnel is never a way around it. It reads no packet and
 * changes none.
 *
 * Why one copy each: in the destination's namespace the tunnel's connection to the application
 * arrives on `lo` from the client's address, which may be another pod's on this node; a program
 * shared by all pods could not tell this from that pod's own outbound connection.
 *
 * Needs Linux 5.17 (ingress_ifindex).
 */
#include "nodeagent.h"

#include <linux/in.h>

/* sys/socket.h does not compile for BPF. */
#define AF_INET 2

/* Set before the program is loaded. */
const volatile struct pod_config config = {};

/*
 * The tunnel's listening sockets by enum slot. Written by nodeagent, read here, pinned: lives as
 * long as the pod's capture. The kernel empties a slot when its socket closes.
 */
struct {
    __uint(type, BPF_MAP_TYPE_SOCKMAP);
    __uint(max_entries, SLOTS);
    __type(key, __u32);
    __type(value, __u64);
} slots SEC(".maps");

struct flow {
    struct address local;
    struct address remote;
    __u16 local_port; /* host byte order */
    bool on_lo;
};

static __always_inline bool is_inside(const struct address *a) {
    return is_loopback(a) || is_own(&config, a);
}

/* Return the slot that takes the connection, or SLOTS if it stays inside the pod. */
static __always_inline __u32 classify(const struct flow *flow) {
    /* The pod to itself, or, on `lo`, the tunnel to the application. */
    if (flow->on_lo) return is_inside(&flow->local) ? SLOTS : SLOT_OUTBOUND;
    /*
     * The pod to its own address is reported with the address's device. Packets from the wire
     * that claim such a source were dropped by the guard. Equal addresses are link-local ones.
     */
    if (same(&flow->local, &flow->remote) || (is_inside(&flow->local) && is_inside(&flow->remote)))
        return SLOTS;
    return flow->local_port == HBONE_PORT ? SLOT_HBONE : SLOT_INBOUND;
}

static __always_inline int hand_over(struct bpf_sk_lookup *ctx, __u32 slot) {
    struct bpf_sock *sk = bpf_map_lookup_elem(&slots, &slot);
    long error;

    if (!sk) {
        count(COUNT_CLOSED_OUTBOUND + slot);
        return SK_DROP;
    }
    /* A pod's own SO_REUSEPORT socket on the same port must not get a share. */
    error = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
    bpf_sk_release(sk);
    count((error ? COUNT_CLOSED_OUTBOUND : COUNT_CAPTURED_OUTBOUND) + slot);
    return error ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int capture(struct bpf_sk_lookup *ctx) {
    struct flow flow = {};
    __u32 slot;

    if (ctx->protocol != IPPROTO_TCP) return SK_PASS;
    flow.local_port = ctx->local_port;
    flow.on_lo = ctx->ingress_ifindex == LO_IFINDEX;
    if (ctx->family == AF_INET) {
        flow.local = mapped(ctx->local_ip4);
        flow.remote = mapped(ctx->remote_ip4);
    } else {
        flow.local.word[0] = ctx->local_ip6[0];
        flow.local.word[1] = ctx->local_ip6[1];
        flow.local.word[2] = ctx->local_ip6[2];
        flow.local.word[3] = ctx->local_ip6[3];
        flow.remote.word[0] = ctx->remote_ip6[0];
        flow.remote.word[1] = ctx->remote_ip6[1];
        flow.remote.word[2] = ctx->remote_ip6[2];
        flow.remote.word[3] = ctx->remote_ip6[3];
    }
    slot = classify(&flow);
    return slot == SLOTS ? SK_PASS : hand_over(ctx, slot);
}

char LICENSE[] SEC("license") = "GPL";
