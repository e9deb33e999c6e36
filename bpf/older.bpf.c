/*
 * Marks the connections that a pod had before it was enrolled. Run once or twice per enrolment, on
 * a thread inside the pod's namespace; the kernel walks that namespace's TCP sockets.
 *
 * It promises that connections older than the enrolment keep their route to the wire: without the
 * mark the routing rules would turn their next packet to the tunnel, which knows nothing of them
 * and resets them. Whether they may live on is the guard's affair. It touches neither listening
 * sockets (what they accept later is no older connection) nor the tunnel's own.
 *
 * Needs Linux 5.15 (bpf_setsockopt in TCP iterators) and the kernel's BTF.
 */
#include "nodeagent.h"

#include <asm-generic/socket.h>

/* Kernel types by their names: the loader corrects the offsets (CO-RE). */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct sock_common {
    volatile unsigned char skc_state;
};

struct bpf_iter__tcp {
    struct sock_common *sk_common;
};

struct tcp_sock {
    int unused;
};
#pragma clang attribute pop

/* States of include/net/tcp_states.h in which a connection is made and not yet over. */
enum {
    ESTABLISHED = 1,
    FIN_WAIT1 = 4,
    FIN_WAIT2 = 5,
    CLOSE_WAIT = 8,
    LAST_ACK = 9,
    CLOSING = 11,
};

static __always_inline bool is_made(unsigned char state) {
    return state == ESTABLISHED || state == FIN_WAIT1 || state == FIN_WAIT2 ||
           state == CLOSE_WAIT || state == LAST_ACK || state == CLOSING;
}

SEC("iter/tcp")
int mark_older(struct bpf_iter__tcp *ctx) {
    struct sock_common *common = ctx->sk_common;
    struct tcp_sock *tcp;
    int mark = 0;

    if (!common || !is_made(common->skc_state)) return 0;
    tcp = bpf_skc_to_tcp_sock(common);
    if (!tcp || bpf_getsockopt(tcp, SOL_SOCKET, SO_MARK, &mark, sizeof(mark))) return 0;
    if (mark == MARK_TUNNEL || mark == MARK_DELIVERY || mark == MARK_OLDER) return 0;
    mark = MARK_OLDER;
    bpf_setsockopt(tcp, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
