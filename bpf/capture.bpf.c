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
 * shared by all pods could not tell this from that pod's own outbound connection, and it cannot
 * learn its namespace. So the copies differ in one number, and share their maps.
 *
 * Needs Linux 5.17 (ingress_ifindex).
 */
#include "pods.h"

#include <linux/in.h>

/* sys/socket.h does not compile for BPF. */
#define AF_INET 2

/* What nodeagent replaces by the pod's number in each copy; no pod has this one. */
#define POD_PLACEHOLDER 0x706f6400

/*
 * The tunnel's listening sockets. Written by nodeagent, read here, pinned. The kernel empties a slot
 * when its socket closes.
 */
struct {
    __uint(type, BPF_MAP_TYPE_SOCKHASH);
    __uint(max_entries, SLOTS *MAX_PODS);
    __type(key, struct pod_slot);
    __type(value, __u64);
} sockets SEC(".maps");

/*
 * A field of the context, read here and nowhere else: left to itself the compiler lets branches
 * share one read by a changed pointer, which the verifier refuses.
 */
#define READ(field)                     \
    ({                                  \
        __u32 value = (field);          \
        asm volatile("" : "+r"(value)); \
        value;                          \
    })

struct flow {
    struct address local;
    struct address remote;
    __u16 local_port; /* host byte order */
    bool on_lo;
};

static __always_inline __u32 pod_number(void) {
    __u64 number;

    asm("%0 = %1 ll" : "=r"(number) : "i"(POD_PLACEHOLDER));
    return number;
}

/*
 * Whether `a` is one of the pod's addresses, without a branch: this program is verified once for
 * each pod, and the verifier follows every branch. Unused places are zero, which no packet has.
 */
static __always_inline bool is_own_flat(const struct pod *pod, const struct address *a) {
    __u64 found = 0;

    for (__u32 i = 0; i < MAX_ADDRESSES; i++) {
        const struct address *b = &pod->config.address[i];
        __u64 differs = (a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) |
                        (a->word[2] ^ b->word[2]) | (a->word[3] ^ b->word[3]);

        found |= (differs - 1) >> 63;
    }
    return found;
}

static __always_inline bool is_inside(const struct pod *pod, const struct address *a) {
    return is_loopback(a) || is_own_flat(pod, a);
}

/* Return the slot that takes the connection, or SLOTS if it stays inside the pod. */
static __always_inline __u32 classify(const struct pod *pod, const struct flow *flow) {
    bool local = is_inside(pod, &flow->local);

    /* The pod to itself, or, on `lo`, the tunnel to the application. */
    if (flow->on_lo) return local ? SLOTS : SLOT_OUTBOUND;
    /*
     * The pod to its own address is reported with the address's device. Packets from the wire
     * that claim such a source were dropped by the guard. Equal addresses are link-local ones.
     */
    if (same(&flow->local, &flow->remote) || (local && is_inside(pod, &flow->remote))) return SLOTS;
    return flow->local_port == HBONE_PORT ? SLOT_HBONE : SLOT_INBOUND;
}

static __always_inline int hand_over(struct bpf_sk_lookup *ctx, __u32 number, __u32 slot) {
    struct pod_slot key = {.pod = number, .slot = slot};
    struct bpf_sock *sk;
    long error;

    sk = bpf_map_lookup_elem(&sockets, &key);
    if (!sk) {
        count(number, COUNT_CLOSED_OUTBOUND + slot);
        return SK_DROP;
    }
    /* A pod's own SO_REUSEPORT socket on the same port must not get a share. */
    error = bpf_sk_assign(ctx, sk, BPF_SK_LOOKUP_F_NO_REUSEPORT);
    bpf_sk_release(sk);
    count(number, (error ? COUNT_CLOSED_OUTBOUND : COUNT_CAPTURED_OUTBOUND) + slot);
    return error ? SK_DROP : SK_PASS;
}

SEC("sk_lookup")
int capture(struct bpf_sk_lookup *ctx) {
    __u32 number = pod_number();
    const struct pod *pod;
    struct flow flow = {};
    __u32 slot, local4, remote4;

    if (ctx->protocol != IPPROTO_TCP) return SK_PASS;
    pod = find_pod(number);
    if (!pod) return SK_DROP;
    flow.local_port = ctx->local_port;
    flow.on_lo = ctx->ingress_ifindex == LO_IFINDEX;
    local4 = READ(ctx->local_ip4);
    remote4 = READ(ctx->remote_ip4);
    /* Of the family that it is not the kernel gives zeros. */
    for (__u32 i = 0; i < 4; i++) {
        flow.local.word[i] = READ(ctx->local_ip6[i]);
        flow.remote.word[i] = READ(ctx->remote_ip6[i]);
    }
    if (ctx->family == AF_INET) {
        flow.local = mapped(local4);
        flow.remote = mapped(remote4);
    }
    slot = classify(pod, &flow);
    return slot == SLOTS ? SK_PASS : hand_over(ctx, number, slot);
}

char LICENSE[] SEC("license") = "GPL";
