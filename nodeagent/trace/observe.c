/*
 * What `nodeagent trace` sees of the pods' TCP. Compiled by bcc when the command runs.
 *
 * It promises to look and never to touch: it reads the kernel's structures and fills a ring. What
 * finds no room is counted in `lost`. Only network namespaces in `pods` are told of.
 *
 * Of the kernel's headers it uses those of its interface to user space alone. Where a field lies in
 * a structure the command reads from the running kernel's BTF and gives as AT_..., so that headers
 * of another kernel do no harm.
 */
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>

/* Numbers of include/net/tcp_states.h. */
#define ESTABLISHED 1
#define SYN_SENT 2
#define CLOSED 7

#define IP4 2
#define IP6 10
#define LO_IFINDEX 1

#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

enum kind { KIND_CONNECTION = 1, KIND_RETRANSMIT = 2, KIND_BYPASS = 3 };

/* Both sides as IPv6, IPv4-mapped (RFC 4291, 2.5.5.2). Ports in host byte order. */
struct tuple {
    u8 local[16];
    u8 remote[16];
    u16 local_port;
    u16 remote_port;
};

/* As nodeagent/trace/_events.py reads it. Times are those of CLOCK_MONOTONIC, nanoseconds. */
struct event {
    u64 time;
    u64 started;
    u64 sent;
    u64 received;
    u32 netns;
    u32 mark;
    u32 retransmits;
    u8 kind;
    u8 opened_here; /* a connection: by connect(); a bypass: the packet is a SYN */
    u8 pad[2];
    struct tuple tuple;
    char program[16]; /* of whoever connected */
    u8 end[4];
};

struct life {
    u64 started; /* 0: not established yet */
    struct tuple tuple;
    char program[16];
    u8 opened_here;
    u8 pad[3];
};

struct flow {
    u32 netns;
    struct tuple tuple;
};

/* Written by the command: the pods that it was asked for, by their namespaces' inodes. */
BPF_HASH(pods, u32, u8, 4096);
/* Connections that began while somebody looked, by socket. */
BPF_TABLE("lru_hash", u64, struct life, lives, 65536);
/* Flows past the tunnel that were told already. */
BPF_TABLE("lru_hash", struct flow, u8, told, 16384);
BPF_ARRAY(lost, u64, 1);
BPF_RINGBUF_OUTPUT(events, 256);

#define READ(to, from) bpf_probe_read_kernel(&(to), sizeof(to), (void *)(from))

static inline void map4(u8 to[16], u32 address) {
    __builtin_memset(to, 0, 10);
    to[10] = to[11] = 0xff;
    __builtin_memcpy(to + 12, &address, 4);
}

static inline void put(struct event *e) {
    int first = 0;
    u64 *count;

    e->time = bpf_ktime_get_ns();
    if (!events.ringbuf_output(e, sizeof(*e), 0)) return;
    count = lost.lookup(&first);
    if (count) __sync_fetch_and_add(count, 1);
}

static inline u32 netns_of(u64 net) {
    u32 inode = 0;

    READ(inode, net + AT_NET_INUM);
    return inode;
}

/* The namespace of a socket if it is one of the pods', else 0. */
static inline u32 pod_of(u64 sk) {
    u64 net = 0;
    u32 inode;

    READ(net, sk + AT_SOCK_NET);
    inode = netns_of(net);
    return pods.lookup(&inode) ? inode : 0;
}

static inline void read_tuple(struct tuple *to, u64 sk) {
    u16 family = 0, port = 0;
    u32 address = 0;

    READ(family, sk + AT_SOCK_FAMILY);
    READ(to->local_port, sk + AT_SOCK_NUM);
    READ(port, sk + AT_SOCK_DPORT);
    to->remote_port = bpf_ntohs(port);
    if (family == IP6) {
        READ(to->local, sk + AT_SOCK_LOCAL6);
        READ(to->remote, sk + AT_SOCK_REMOTE6);
        return;
    }
    READ(address, sk + AT_SOCK_LOCAL4);
    map4(to->local, address);
    READ(address, sk + AT_SOCK_REMOTE4);
    map4(to->remote, address);
}

/* Arguments: the socket, its old state, its new one. */
RAW_TRACEPOINT_PROBE(inet_sock_set_state) {
    u64 sk = ctx->args[0];
    int before = ctx->args[1], now = ctx->args[2];
    struct event e = {.kind = KIND_CONNECTION};
    struct life life = {}, *known;

    if (now == SYN_SENT) {
        if (!pod_of(sk)) return 0;
        /* connect() is still in its process. */
        bpf_get_current_comm(life.program, sizeof(life.program));
        lives.update(&sk, &life);
        return 0;
    }
    if (now == ESTABLISHED) {
        if (!pod_of(sk)) return 0;
        known = lives.lookup(&sk);
        if (known) __builtin_memcpy(life.program, known->program, sizeof(life.program));
        life.started = bpf_ktime_get_ns();
        life.opened_here = before == SYN_SENT;
        /* At the end the port has been given back. */
        read_tuple(&life.tuple, sk);
        lives.update(&sk, &life);
        return 0;
    }
    if (now != CLOSED) return 0;
    known = lives.lookup(&sk);
    if (!known) return 0;
    e.netns = pod_of(sk);
    e.started = known->started;
    __builtin_memcpy(e.program, known->program, sizeof(e.program));
    e.opened_here = known->opened_here;
    e.tuple = known->tuple;
    lives.delete(&sk);
    if (!e.netns || !e.started) return 0;
    READ(e.mark, sk + AT_SOCK_MARK);
    READ(e.sent, sk + AT_TCP_ACKED);
    READ(e.received, sk + AT_TCP_RECEIVED);
    READ(e.retransmits, sk + AT_TCP_RETRANSMITS);
    put(&e);
    return 0;
}

/* Arguments: the socket, the packet. */
RAW_TRACEPOINT_PROBE(tcp_retransmit_skb) {
    u64 sk = ctx->args[0];
    struct event e = {.kind = KIND_RETRANSMIT, .retransmits = 1};

    e.netns = pod_of(sk);
    if (!e.netns) return 0;
    READ(e.mark, sk + AT_SOCK_MARK);
    read_tuple(&e.tuple, sk);
    put(&e);
    return 0;
}

/*
 * A packet that has passed the guard and leaves a device. Argument: the packet. Extension headers of
 * IPv6 are not followed.
 */
RAW_TRACEPOINT_PROBE(net_dev_queue) {
    u64 skb = ctx->args[0], dev = 0, net = 0, head = 0, tcp;
    struct event e = {.kind = KIND_BYPASS};
    struct flow flow = {};
    u16 protocol = 0, offset = 0, port = 0;
    u8 byte = 0, one = 1;
    u32 index = 0, address = 0;

    READ(dev, skb + AT_SKB_DEV);
    READ(index, dev + AT_DEV_INDEX);
    if (index == LO_IFINDEX) return 0;
    READ(net, dev + AT_DEV_NET);
    flow.netns = netns_of(net);
    if (!pods.lookup(&flow.netns)) return 0;
    READ(e.mark, skb + AT_SKB_MARK);
    if (e.mark == MARK_TUNNEL) return 0;
    READ(protocol, skb + AT_SKB_PROTOCOL);
    READ(head, skb + AT_SKB_HEAD);
    READ(offset, skb + AT_SKB_NETWORK);
    head += offset;
    if (protocol == bpf_htons(ETH_P_IP)) {
        READ(byte, head + 9);
        if (byte != IPPROTO_TCP) return 0;
        READ(address, head + 12);
        map4(flow.tuple.local, address);
        READ(address, head + 16);
        map4(flow.tuple.remote, address);
        READ(byte, head);
        tcp = head + (byte & 0x0f) * 4;
    } else if (protocol == bpf_htons(ETH_P_IPV6)) {
        READ(byte, head + 6);
        if (byte != IPPROTO_TCP) return 0;
        READ(flow.tuple.local, head + 8);
        READ(flow.tuple.remote, head + 24);
        tcp = head + 40;
    } else {
        return 0;
    }
    READ(byte, tcp + 13);
    /* The kernel's own answer that a connection is over carries nothing. */
    if (byte & TCP_RST) return 0;
    READ(port, tcp);
    flow.tuple.local_port = bpf_ntohs(port);
    READ(port, tcp + 2);
    flow.tuple.remote_port = bpf_ntohs(port);
    if (told.lookup(&flow)) return 0;
    told.update(&flow, &one);
    e.netns = flow.netns;
    e.tuple = flow.tuple;
    e.opened_here = (byte & (TCP_SYN | TCP_ACK)) == TCP_SYN;
    put(&e);
    return 0;
}
