/*
 * What every file of the core shares: addresses, lists, clocks, single-writer counters and the
 * named limits. Nothing here knows of connections.
 */
#ifndef ZT_BASE_H
#define ZT_BASE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "reasons.h"

/* --- limits, each with its reason ------------------------------------------------------------ */

/* Worker threads: one for each core of the largest node that we have a use for. */
#define ZT_MAX_WORKERS 64
/* Addresses of one pod: dual stack and a few extra networks. */
#define ZT_MAX_POD_ADDRS 8
/* Cached decisions of one worker. Full means that something scans addresses: start afresh. */
#define ZT_TABLE_MAX 65536
/* One decision's lines of the access log: names of 253 and identities of 2,048 bytes, four of each in
 * two lines, fit in. Each of two lines has five places to fill in. */
#define ZT_LINE_MAX 16384
#define ZT_LINE_PLACES 10
/* Bytes of lines that wait for the control side: a few seconds at full connection rate, as much as
 * it keeps for the disk. Beyond it they are counted, not kept. */
#define ZT_LINES_MAX (16 * 1024 * 1024)
/* Ended connections that wait for the control side, for they have no line ready; beyond it they are
 * counted, not kept. */
#define ZT_EVENTS_MAX 65536
/* Ends are reported this many (or so many bytes of lines) at once, or after this long: waking the
 * interpreter for each costs more than the connection, and what it delays is then one connection in
 * some hundreds. A log line may be so much late. */
#define ZT_EVENTS_BATCH 1024
#define ZT_LINES_BATCH (1024 * 1024)
#define ZT_REPORT_US 100000u
/* Failed handshakes that wait for the log: fewer, for an outsider makes them. */
#define ZT_FAILURES_MAX 4096
/* Bytes read or encrypted in one system call: 16 full TLS records (measured: the size of each
 * call, not the cipher, decides the throughput). */
#define ZT_CHUNK (256 * 1024)
/* The same in TLS 1.3 records of 16 KiB, each with 22 bytes of header, type and tag (RFC 8446, 5.2):
 * what a peer like us sends at once is received at once, without a rest of 352 bytes. */
#define ZT_WIRE (ZT_CHUNK + ZT_CHUNK / 16384 * 22)
/* Bytes of an HBONE connection that may wait in the kernel without being on their way. Whatever has
 * been written there goes before everything that comes later: without this a bulk stream fills some
 * megabytes, and a small request of a neighbour on the same connection waits behind all of them
 * (docs/performance.md). One call's worth keeps the path full. */
#define ZT_UNSENT ZT_CHUNK
/* Bytes that one event may move before the others get their turn. */
#define ZT_BUDGET (1024 * 1024)
/* What a peer may have sent to a stream whose reader does not read: at first, and at most. A window
 * doubles while its reader is quick, so a stream that never was holds little. */
#define ZT_STREAM_WINDOW (256 * 1024)
#define ZT_STREAM_WINDOW_MOST (4 * 1024 * 1024)
/* Quick is who reads half a window in this time: with a round trip longer than that, a wide window
 * is not what the stream lacks. */
#define ZT_WINDOW_QUICK_US 100000u
/* What the windows of one HBONE connection may grow by together: four streams at their most. So one
 * connection holds at most ZT_SERVER_STREAMS * ZT_STREAM_WINDOW + ZT_CONN_GROWTH = 66 MiB. */
#define ZT_CONN_GROWTH (16 * 1024 * 1024)
/* Bytes that the kernel keeps for an application that does not read, besides what the application's
 * own socket takes: without a bound up to tcp_wmem's 4 MiB for each connection. Four calls' worth: what
 * finds no room here is copied once more, to wait in this process. */
#define ZT_UNSENT_BYTES (4 * ZT_CHUNK)
/* The whole connection's window is given back as it comes (the streams' windows bound it): a slow
 * reader must not stop its neighbours. What the field's node proxy announces. */
#define ZT_CONN_WINDOW (16 * 1024 * 1024)
#define ZT_MAX_FRAME (1024 * 1024)
#define ZT_SERVER_STREAMS 200
#define ZT_CLIENT_STREAMS 100
/* Frames that wait to be sent on one HBONE connection: a few for each stream in honest use. A peer
 * that makes us answer and does not read the answers has no other bound. */
#define ZT_MAX_QUEUED 4096
/* Frames without work in them that one HBONE connection may send at once, and in a second: a
 * keepalive, a SETTINGS or a cancelled stream now and then never come near it. */
#define ZT_GLITCH_BURST 1000
#define ZT_GLITCH_RATE 100
/* Window updates come with the data that we send: for each frame one of the stream and one of the
 * connection, or for each KiB that the peer has read. */
#define ZT_GLITCH_UPDATES(bytes) (2 + (bytes) / 512)
/* Header bytes of one CONNECT: authority, baggage and forwarded fit many times. */
#define ZT_MAX_HEADER_BYTES (16 * 1024)
/* Connections of one pool that may be dialled at once by one worker for one peer. */
#define ZT_POOL_DIALS 4
/* Connections of one pool of one worker: with a hundred streams each, more than a node's
 * descriptors allow. A peer that allows few streams costs so many connections and no more. */
#define ZT_POOL_CONNECTIONS 128
/* Connections on which one CONNECT is tried after the first: a peer may be going away, and its
 * successor may have lowered its limit meanwhile. */
#define ZT_STREAM_RETRIES 2
/* After a failed dial nobody dials for so long, doubled with each further one: at first short, for
 * a peer that restarts is back in no time, and at most so that a peer which is back is found while
 * a caller still tries. */
#define ZT_BACKOFF_FIRST_US 200000u
#define ZT_BACKOFF_MAX_US 3000000u
/* Connections accepted for one readiness event before other events are served. */
#define ZT_ACCEPT_BATCH 16
/* Connections that a listener may hold when we part with it: the largest backlog that is used. */
#define ZT_ACCEPT_LAST 65536
/* Certificates of a peer's chain that are handed on: leaf, intermediates and some slack. */
#define ZT_MAX_CHAIN 8
/* Tickets and KeyUpdates of one TLS connection: two tickets, and a KeyUpdate for each few hundred
 * gigabytes. A flood of them costs a peer nothing and us a key derivation each. */
#define ZT_MAX_POST_HANDSHAKE 1000
/* Pipes kept for reuse by one worker (two descriptors each). */
#define ZT_PIPE_POOL 64

/*
 * Deadlines: X(NAME, name in the settings, seconds unless the settings say otherwise). All waits of
 * one class are equally long, so each class is a queue. They may be changed while they run.
 *
 * DECISION    Python answers in microseconds; a young pod's own state may take ten seconds.
 * CREDENTIAL  A pod's first certificate: an identity provider that answers at all answers in less.
 * CONNECT     Three SYNs, 1 + 2 + 4 s, and some slack.
 * FIRST_BYTE  Who dials the HBONE port speaks at once: two lost segments, and some slack.
 * HANDSHAKE   TLS, both sides: a few round trips, and a signature on a busy node.
 * SETTINGS    The preface and SETTINGS come right behind the handshake and its judgement.
 * REQUEST     A CONNECT that has begun is one segment; until it is whole, nothing else may come.
 * ANSWER      The peer dials its application, for as long as CONNECT, before it answers.
 * STREAM      Waiting for a stream of a peer that allows no more of them: longer than a dial takes
 *             to fail (CONNECT, HANDSHAKE, SETTINGS), which tells those that wait by itself.
 * HALF_CLOSED One direction has ended and nothing moves in the other: whoever still computes an
 *             answer does so within an hour; what is left over by a crash would stay for ever.
 * PING        How often an HBONE connection is looked after.
 * PONG        The answer to a PING: several retransmissions.
 * SUSPECT     The answer to a PING whose peer's workload has left the mesh: it has probably gone,
 *             and its callers should not wait for the keepalive to find out.
 * IDLE        An HBONE connection without streams; a new one costs a handshake, an old one memory.
 *             Looked at with each PING.
 * SURPLUS     The same while another connection of its pool has room: a burst is over after seconds,
 *             and each connection that it left behind holds 150 KB on either side.
 * GOODBYE     The other side's end of an HBONE connection that we have ended in good order.
 * DRAIN       What a tunnel still carries that has handed over to its successor: an hour, the life
 *             of a certificate, so that sessions that people use end by themselves, and old code
 *             does not stay for ever.
 */
#define ZT_DEADLINE_TABLE(X)            \
    X(DECISION, "decision", 15)         \
    X(CREDENTIAL, "credential", 15)     \
    X(CONNECT, "connect", 10)           \
    X(FIRST_BYTE, "first_byte", 5)      \
    X(HANDSHAKE, "tls_handshake", 10)   \
    X(SETTINGS, "http2_settings", 10)   \
    X(REQUEST, "connect_request", 10)   \
    X(ANSWER, "connect_answer", 20)     \
    X(STREAM, "stream_wait", 35)        \
    X(HALF_CLOSED, "half_closed", 3600) \
    X(PING, "ping_interval", 10)        \
    X(PONG, "ping_answer", 20)          \
    X(SUSPECT, "ping_suspect", 3)       \
    X(IDLE, "idle", 300)                \
    X(SURPLUS, "idle_surplus", 3)       \
    X(GOODBYE, "goodbye", 10)           \
    X(DRAIN, "drain", 3600)

enum zt_deadline {
#define X(name, setting, seconds) ZT_D_##name,
    ZT_DEADLINE_TABLE(X)
#undef X
        ZT_DEADLINES
};
#define ZT_SECONDS(n) ((uint64_t)(n)*1000000u) /* microseconds */
/* The longest that may be set: a week. What is set longer is meant as "never", and leaks. */
#define ZT_DEADLINE_MAX_US ZT_SECONDS(7 * 24 * 3600)
/* Memory is given back to the system this long after more than half of at least so many connections
 * of a worker have ended, or so many bytes that waited for applications have been taken: it stops the
 * worker for a few milliseconds, and the next burst may be near. */
#define ZT_TRIM_CONNECTIONS 1000u
#define ZT_TRIM_BYTES (1024 * 1024)
#define ZT_TRIM_US ZT_SECONDS(5)

/* How long a worker looks for the next event before it sleeps, after a turn of one event that moved no
 * more bytes than this: a request or its answer. To fall asleep and be woken costs more, on a virtual machine
 * several times as much (docs/performance.md). */
#define ZT_SPIN_US 50u
#define ZT_SPIN_BYTES (16 * 1024)
/* After looking in vain so often, or a turn that moved so many bytes, it sleeps at once, this many
 * turns long: events are far apart, or what moves is bulk. */
#define ZT_SPIN_VAIN 8
#define ZT_SPIN_BULK (128 * 1024)
#define ZT_SPIN_PAUSE 32

/*
 * Limits of one pod, so that none starves its neighbours: X(NAME, name in the settings, unless the
 * settings say otherwise). 0 is no limit. They may be changed while they are in use.
 *
 * CONNECTIONS  Open at once, both directions. None by number: descriptors are what runs out, and of
 *              those each pod has its share (limit.c).
 * DIALS        TCP connects under way. To a destination that does not answer each lasts CONNECT: 400
 *              of them each second, which no application makes for long.
 * QUESTIONS    For the control side, without an answer: a scan by one must not keep others waiting.
 * HANDSHAKES   As a server. Whoever can reach the port can begin one, at some 50 KiB each; when there
 *              are too many the oldest gives way, as an honest one lasts milliseconds.
 * HELD         Bytes that all its stalled readers hold in this process; beyond it the stream that
 *              would hold more is reset. Room for 512 streams that never read.
 */
#define ZT_LIMIT_TABLE(X)            \
    X(CONNECTIONS, "connections", 0) \
    X(DIALS, "dials", 4096)          \
    X(QUESTIONS, "questions", 512)   \
    X(HANDSHAKES, "handshakes", 512) \
    X(HELD, "held_bytes", 128 * 1024 * 1024)

enum zt_limit {
#define X(name, setting, most) ZT_L_##name,
    ZT_LIMIT_TABLE(X)
#undef X
        ZT_LIMITS
};
/* Descriptors that connections never take: for the control socket and a change of pods on it, for
 * logs, health and metrics, and for the workers themselves. A quarter where so few are allowed that
 * this would leave nothing. */
#define ZT_RESERVED_DESCRIPTORS 256
/* Descriptors of one pod besides its connections': three listeners and a namespace, kept here and by
 * the control side. */
#define ZT_POD_DESCRIPTORS 8
/* Of what connections may take, the part (one of so many) that only HBONE connections take: each of
 * those carries a hundred others. */
#define ZT_HBONE_SHARE 16
/* When the kernel gives no socket and taking callers in to send them away fails too, no worker looks
 * at its listeners for so long: they would wake it without end. */
#define ZT_ACCEPT_PAUSE_US 100000u

/* Marks of our own sockets (docs/architecture.md, table of marks). */
#define ZT_MARK_TUNNEL 0x539
#define ZT_MARK_DELIVER 0x111

/* --- addresses ------------------------------------------------------------------------------- */

/* IPv4 is kept IPv4-mapped (RFC 4291, 2.5.5.2); port in host order. */
struct zt_addr {
    uint8_t ip[16];
    uint16_t port;
};

/* "[xxxx:…]:65535" and the terminating zero. */
#define ZT_ADDR_TEXT 60

bool zt_addr_is_v4(const struct zt_addr *a);
bool zt_addr_ip_equal(const struct zt_addr *a, const struct zt_addr *b);
void zt_addr_from_sockaddr(struct zt_addr *a, const struct sockaddr_storage *ss);
/* Returns the length of the socket address written. */
socklen_t zt_addr_to_sockaddr(const struct zt_addr *a, struct sockaddr_storage *ss);
/* Writes "a.b.c.d:port" or "[v6]:port"; returns its length. */
int zt_addr_text(const struct zt_addr *a, char out[ZT_ADDR_TEXT]);
/*
 * Parses an HTTP/2 :authority that must be an IP address and a port, in exactly the forms that
 * zt_addr_text writes plus any RFC 4291 spelling of the IPv6 address but the IPv4-mapped; no name, no userinfo, no
 * scope, no leading zeros, port 1 to 65535. Returns 0 or -EINVAL.
 */
int zt_authority_parse(const char *text, size_t len, struct zt_addr *out);

/* --- clock ----------------------------------------------------------------------------------- */

static inline uint64_t zt_now_us(void) {
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000u + (uint64_t)ts.tv_nsec / 1000u;
}

/* --- counters: one thread writes, others read ------------------------------------------------- */

typedef _Atomic uint64_t zt_count;

static inline void zt_add(zt_count *c, uint64_t n) {
    atomic_store_explicit(c, atomic_load_explicit(c, memory_order_relaxed) + n,
                          memory_order_relaxed);
}

static inline uint64_t zt_get(const zt_count *c) {
    return atomic_load_explicit(c, memory_order_relaxed);
}

/* Latency histograms: upper bounds of the buckets, microseconds. */
#define ZT_HISTOGRAM(X) \
    X(100)              \
    X(250)              \
    X(500)              \
    X(1000)             \
    X(2500)             \
    X(5000)             \
    X(10000) X(25000) X(50000) X(100000) X(250000) X(500000) X(1000000) X(2500000) X(10000000)
#define X(us) +1
enum { ZT_BUCKETS = 0 ZT_HISTOGRAM(X) };
#undef X

struct zt_histogram {
    zt_count bucket[ZT_BUCKETS + 1];
    zt_count sum_us;
};

void zt_observe(struct zt_histogram *h, uint64_t us);

/* --- intrusive doubly linked lists; an unlinked node points at itself -------------------------- */

struct zt_list {
    struct zt_list *next, *prev;
};

static inline void zt_list_init(struct zt_list *l) {
    l->next = l->prev = l;
}

static inline bool zt_list_empty(const struct zt_list *l) {
    return l->next == l;
}

static inline void zt_list_append(struct zt_list *head, struct zt_list *n) {
    n->prev = head->prev;
    n->next = head;
    head->prev->next = n;
    head->prev = n;
}

static inline void zt_list_remove(struct zt_list *n) {
    n->prev->next = n->next;
    n->next->prev = n->prev;
    zt_list_init(n);
}

/* Moves all of `from` to `to`. Objects that may end one another are looked at so: take all, and
 * move each back before it is looked at, for the one after it may be gone then. */
static inline void zt_list_take_all(struct zt_list *from, struct zt_list *to) {
    zt_list_init(to);
    if (zt_list_empty(from)) return;
    *to = *from;
    to->next->prev = to->prev->next = to;
    zt_list_init(from);
}

/* The first of `from`, put at the end of `to`. */
static inline struct zt_list *zt_list_move_first(struct zt_list *from, struct zt_list *to) {
    struct zt_list *n = from->next;

    zt_list_remove(n);
    zt_list_append(to, n);
    return n;
}

#define ZT_CONTAINER(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

#endif
