/*
 * What TCP may cross a pod's device beside the tunnel. One copy serves all pods of a node, attached
 * (tc, direct action) to every device of their namespaces but `lo`, both ways. Which pod it is says
 * the filter's class id; of a pod that the maps do not have no TCP but the tunnel's passes.
 *
 * It promises that no new connection leaves but through the tunnel, and that no TCP but the
 * tunnel's enters or leaves on a port whose mode is STRICT. It passes everything that is not TCP,
 * and never changes a packet.
 *
 * Egress: the tunnel's sockets carry MARK_TUNNEL, which takes CAP_NET_RAW or CAP_NET_ADMIN to set.
 * The kernel copies it to retransmissions, SYN-ACKs, resets and TIME_WAIT's answers alike.
 * Ingress: the socket that would take the packet is looked up; the tunnel's carry the same mark.
 *
 * Limit: a fragment that is not the first has no ports. Leaving, it is dropped if any port is
 * strict (TCP of Linux fragments nothing by itself); entering, it passes, because it is of no use
 * without its first fragment, which is judged.
 */
#include "pods.h"

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/pkt_cls.h>

/* IPv6 headers between the fixed one and TCP; longer chains are refused as unreadable. */
#define MAX_EXTENSIONS 5

/* linux/ip.h and linux/ipv6.h use bit fields: these are the parts that are read here. */
struct ip4 {
    __u8 version_ihl;
    __u8 tos;
    __be16 length;
    __be16 id;
    __be16 fragment;
    __u8 ttl;
    __u8 protocol;
    __be16 check;
    __u32 source;
    __u32 destination;
};
_Static_assert(sizeof(struct ip4) == 20, "RFC 791");

struct ip6 {
    __be32 flow;
    __be16 length;
    __u8 next;
    __u8 hops;
    struct address source;
    struct address destination;
};
_Static_assert(sizeof(struct ip6) == 40, "RFC 8200");

struct ip6_extension {
    __u8 next;
    __u8 length;
    __be16 fragment;
};
_Static_assert(sizeof(struct ip6_extension) == 4, "RFC 8200");

struct tcp {
    __be16 source;
    __be16 destination;
    __be32 sequence;
    __be32 acknowledgement;
    __u8 offset;
    __u8 flags;
    __be16 window;
    __be16 check;
    __be16 urgent;
};
_Static_assert(sizeof(struct tcp) == 20, "RFC 9293");

#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define FRAGMENT_OFFSET4 0x1fff
#define FRAGMENT_OFFSET6 0xfff8

enum kind {
    NOT_TCP,
    TCP,
    LATER_FRAGMENT, /* of TCP; addresses are known, ports are not */
    UNREADABLE,     /* claims to be TCP, or hides what it is */
};

struct packet {
    struct address source;
    struct address destination;
    struct tcp tcp;
    bool ip4;
    bool bare_reset; /* RST without a byte of payload */
};

static __always_inline long load(struct __sk_buff *skb, __u32 offset, void *to, __u32 size) {
    return bpf_skb_load_bytes_relative(skb, offset, to, size, BPF_HDR_START_NET);
}

static __always_inline enum kind parse_tcp(struct __sk_buff *skb, __u32 offset, __u32 end,
                                           struct packet *packet) {
    __u32 header;

    if (load(skb, offset, &packet->tcp, sizeof(packet->tcp))) return UNREADABLE;
    header = (packet->tcp.offset >> 4) * 4;
    packet->bare_reset =
        (packet->tcp.flags & TCP_RST) && !(packet->tcp.flags & TCP_SYN) && offset + header == end;
    return TCP;
}

static __always_inline enum kind parse_ip4(struct __sk_buff *skb, struct packet *packet) {
    struct ip4 ip;
    __u32 header;

    if (load(skb, 0, &ip, sizeof(ip))) return UNREADABLE;
    header = (ip.version_ihl & 0x0f) * 4;
    if (ip.protocol != IPPROTO_TCP) return NOT_TCP;
    packet->source = mapped(ip.source);
    packet->destination = mapped(ip.destination);
    packet->ip4 = true;
    if (header < sizeof(ip)) return UNREADABLE;
    if (ip.fragment & bpf_htons(FRAGMENT_OFFSET4)) return LATER_FRAGMENT;
    return parse_tcp(skb, header, bpf_ntohs(ip.length), packet);
}

static __always_inline enum kind parse_ip6(struct __sk_buff *skb, struct packet *packet) {
    struct ip6_extension extension;
    __u32 offset = sizeof(struct ip6);
    bool later = false;
    struct ip6 ip;
    __u8 next;

    if (load(skb, 0, &ip, sizeof(ip))) return UNREADABLE;
    packet->source = ip.source;
    packet->destination = ip.destination;
    next = ip.next;
    for (int i = 0; i < MAX_EXTENSIONS; i++) {
        if (next == IPPROTO_TCP)
            return later
                       ? LATER_FRAGMENT
                       : parse_tcp(skb, offset, sizeof(struct ip6) + bpf_ntohs(ip.length), packet);
        if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
            next != IPPROTO_FRAGMENT && next != IPPROTO_AH)
            return NOT_TCP;
        /* What follows a later fragment's header is payload: no header to walk into. */
        if (later || load(skb, offset, &extension, sizeof(extension))) return UNREADABLE;
        if (next == IPPROTO_FRAGMENT) {
            later = extension.fragment & bpf_htons(FRAGMENT_OFFSET6);
            offset += 8;
        } else if (next == IPPROTO_AH) {
            offset += (extension.length + 2) * 4;
        } else {
            offset += (extension.length + 1) * 8;
        }
        next = extension.next;
    }
    return UNREADABLE;
}

static __always_inline enum kind parse(struct __sk_buff *skb, struct packet *packet) {
    if (skb->protocol == bpf_htons(ETH_P_IP)) return parse_ip4(skb, packet);
    if (skb->protocol == bpf_htons(ETH_P_IPV6)) return parse_ip6(skb, packet);
    return NOT_TCP;
}

/* Whether a local port (network byte order) takes mutual TLS only. */
static __always_inline bool is_strict(const struct pod *pod, __be16 port) {
    __u16 host = bpf_ntohs(port);

    for (__u32 i = 0; i < MAX_EXCEPTIONS; i++) {
        if (i >= pod->settings.count) break;
        if (pod->settings.exception[i] == host) return !pod->settings.strict_default;
    }
    return pod->settings.strict_default;
}

static __always_inline bool any_strict(const struct pod *pod) {
    return pod->settings.strict_default || pod->settings.count;
}

static __always_inline int drop(struct __sk_buff *skb, __u32 why) {
    count(skb->tc_classid, why);
    return TC_ACT_SHOT;
}

SEC("tc")
int guard_egress(struct __sk_buff *skb) {
    struct packet packet = {};
    const struct pod *pod;
    enum kind kind;

    /* TC_ACT_UNSPEC and not OK: filters of others after this one still have their say. */
    if (skb->mark == MARK_TUNNEL) return TC_ACT_UNSPEC;
    kind = parse(skb, &packet);
    switch (kind) {
    case NOT_TCP:
        return TC_ACT_UNSPEC;
    case UNREADABLE:
        return drop(skb, COUNT_EGRESS_UNREADABLE);
    case LATER_FRAGMENT:
    case TCP:
        break;
    }
    pod = find_pod(skb->tc_classid);
    if (!pod) return TC_ACT_SHOT;
    if (kind == LATER_FRAGMENT)
        return any_strict(pod) ? drop(skb, COUNT_EGRESS_FRAGMENT) : TC_ACT_UNSPEC;
    if ((packet.tcp.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN) return drop(skb, COUNT_EGRESS_BYPASS);
    if (skb->mark == MARK_DELIVERY) return drop(skb, COUNT_EGRESS_DELIVERY);
    /* Tells the peer that the connection is over, and carries nothing else. */
    if (packet.bare_reset) return TC_ACT_UNSPEC;
    return is_strict(pod, packet.tcp.source) ? drop(skb, COUNT_EGRESS_OLDER) : TC_ACT_UNSPEC;
}

/* Return the mark of the socket that would take the packet, MARK_TUNNEL if there is none. */
static __always_inline __u32 taker(struct __sk_buff *skb, const struct packet *packet) {
    struct bpf_sock_tuple tuple = {};
    struct bpf_sock *sk;
    __u32 mark;

    if (packet->ip4) {
        tuple.ipv4.saddr = packet->source.word[3];
        tuple.ipv4.daddr = packet->destination.word[3];
        tuple.ipv4.sport = packet->tcp.source;
        tuple.ipv4.dport = packet->tcp.destination;
        sk = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
    } else {
        __builtin_memcpy(tuple.ipv6.saddr, &packet->source, sizeof(packet->source));
        __builtin_memcpy(tuple.ipv6.daddr, &packet->destination, sizeof(packet->destination));
        tuple.ipv6.sport = packet->tcp.source;
        tuple.ipv6.dport = packet->tcp.destination;
        sk = bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
    }
    /* No socket, or only TIME_WAIT: no application hears the packet. */
    if (!sk) return MARK_TUNNEL;
    mark = sk->mark;
    bpf_sk_release(sk);
    return mark;
}

SEC("tc")
int guard_ingress(struct __sk_buff *skb) {
    struct packet packet = {};
    const struct pod *pod;
    __u32 mark;

    switch (parse(skb, &packet)) {
    case NOT_TCP:
    case LATER_FRAGMENT:
        return TC_ACT_UNSPEC;
    case UNREADABLE:
        return drop(skb, COUNT_INGRESS_UNREADABLE);
    case TCP:
        break;
    }
    pod = find_pod(skb->tc_classid);
    if (!pod) return TC_ACT_SHOT;
    /* The capture program trusts such packets to come from the pod itself. */
    if (is_own(pod, &packet.source) || is_loopback(&packet.source) ||
        same(&packet.source, &packet.destination))
        return drop(skb, COUNT_INGRESS_SPOOFED);
    mark = taker(skb, &packet);
    if (mark == MARK_TUNNEL) return TC_ACT_UNSPEC;
    /* The application's side of a delivery: its peer is the tunnel, on `lo`. */
    if (mark == MARK_DELIVERY) return drop(skb, COUNT_INGRESS_DELIVERY);
    if (packet.bare_reset) return TC_ACT_UNSPEC;
    return is_strict(pod, packet.tcp.destination) ? drop(skb, COUNT_INGRESS_OLDER) : TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "GPL";
