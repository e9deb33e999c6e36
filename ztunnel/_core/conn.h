/*
 * One application connection, from accept (or CONNECT) to its end: two ends, each a TCP socket
 * ("leg") or a stream of an HBONE connection, and what is known of it. It is the unit that
 * decisions, counters and the access log speak of.
 *
 *   outbound, tunnel    client leg  <->  stream        (h2.c relays)
 *   inbound, HBONE      stream      <->  server leg    (h2.c relays)
 *   outbound, forward   client leg  <->  server leg    (relay.c)
 *   outbound, hand over client leg  <->  server leg    (relay.c), the latter in the other pod
 *   inbound, plaintext  client leg  <->  server leg    (relay.c)
 */
#ifndef ZT_CONN_H
#define ZT_CONN_H

#include "worker.h"

/*
 * X(NAME, its name in a listing)
 *
 * DECIDING    asked the table
 * POOL        waits for an HBONE connection
 * CONNECTING  dials the server leg, or CONNECT has no answer yet
 */
#define ZT_CONN_STATES(X)       \
    X(DECIDING, "deciding")     \
    X(POOL, "waiting")          \
    X(CONNECTING, "connecting") \
    X(OPEN, "open")

enum zt_conn_state {
#define X(name, text) ZT_C_##name,
    ZT_CONN_STATES(X)
#undef X
        ZT_C_ENDED, /* in the graveyard */
};

struct zt_leg {
    struct zt_io io;
    bool readable, writable; /* as far as edge-triggered epoll has told */
    bool drain; /* FIN, worse or urgent data has been seen: a short read may not be the last */
    bool ended; /* the other side has sent its end, whether we have read it or not */
    bool eof;   /* we have read the end */
    bool shut;  /* we have sent our end */
    int error;  /* errno of what failed on it */
};

struct zt_chunk {
    struct zt_chunk *next;
    size_t room, len, pos; /* pos <= len <= room */
    uint8_t data[];
};

struct zt_stream {
    struct zt_h2 *h2; /* NULL once the stream is gone */
    struct zt_list link;
    int32_t id;
    int16_t status;                          /* client: of the answer; 0 until it comes */
    bool is_connect;                         /* server: the method was CONNECT */
    bool has_authority;                      /* server: and there was one that parses */
    bool traceparent;                        /* server: there was one */
    enum zt_traced traced;                   /* server: what it says, if it was one only */
    uint8_t retries;                         /* client: attempts after the first */
    bool answered;                           /* 200 went or came: data may flow */
    bool deferred;                           /* nghttp2 waits for zt_h2_resume */
    bool broken;                             /* the peer broke HTTP/2 on it, and we reset it */
    bool remote_end;                         /* END_STREAM came */
    bool local_end;                          /* END_STREAM was sent */
    struct zt_chunk *pending, *pending_last; /* both NULL, or both not */
    uint32_t window, taken;                  /* what the peer may send; read since `taken_at` */
    uint64_t taken_at;
};

struct zt_half {
    struct zt_pipe pipe;
    size_t in_pipe;
    bool bulk; /* reads come back full: bytes go by the pipe */
};

struct zt_conn {
    struct zt_list link; /* worker's conns */
    struct zt_list wait; /* an entry's waiting, or a pool's */
    struct zt_timer timer;
    struct zt_task task;
    struct zt_grave grave;
    struct zt_worker *worker;
    struct zt_pod *pod;
    struct zt_decision *decision;
    enum zt_kind kind;
    enum zt_conn_state state;
    bool dials;      /* the server leg; counted by the pod */
    uint64_t number; /* of the worker's connections, from 1 */
    uint64_t listed; /* the last listing that it is in (listing.h) */
    uint64_t identity;
    struct zt_addr source, destination, upstream;
    uint64_t started, received, sent;
    uint64_t moved;               /* when bytes last reached one of the two ends; 0: never */
    struct zt_leg client, server; /* io.fd -1: none */
    struct zt_stream stream;
    struct zt_half up, down; /* client to server, server to client */
    struct zt_trace *trace;  /* NULL: not sampled */
};

/* An accepted socket begins its life; the descriptor and the pod's reference pass over. */
void zt_conn_accepted(struct zt_worker *w, struct zt_pod *pod, enum zt_kind kind, int fd,
                      const struct zt_addr *source, const struct zt_addr *destination);
/* A CONNECT has begun on an HBONE connection of ours as server; NULL without memory. */
struct zt_conn *zt_conn_requested(struct zt_worker *w, struct zt_h2 *h2, int32_t stream_id);
/* Its headers are complete and right: judge it. */
void zt_conn_judge(struct zt_conn *c);
/* The table's answer. */
void zt_conn_decided(struct zt_conn *c, struct zt_decision *d);
/* The stream is answered with 200, or the server leg stands: let the bytes flow. */
void zt_conn_open(struct zt_conn *c);
/* The end, exactly once; safe to call again. Anything but CLOSED resets both ends. */
void zt_conn_end(struct zt_conn *c, enum zt_reason reason);
void zt_conn_count(struct zt_conn *c, uint64_t received, uint64_t sent);
/* Whether one of its ends is in this pod. */
bool zt_conn_uses(const struct zt_conn *c, const struct zt_pod *pod);
/* One direction has ended: the other must move, or end, before its deadline. May be repeated. */
void zt_conn_half_closed(struct zt_conn *c);
/* The leg that is a socket, of a connection with a stream. */
struct zt_leg *zt_conn_leg(struct zt_conn *c);
/* Updates the leg's flags from epoll's events. */
void zt_leg_events(struct zt_leg *leg, uint32_t events);
enum zt_reason zt_reason_of_connect(int error);
/* Of a connection that stood: its application has reset it, or it broke by itself. */
enum zt_reason zt_reason_of_leg(const struct zt_conn *c, const struct zt_leg *leg, int error);

/* --- sock.c --------------------------------------------------------------------------------------- */

/* Non-blocking sockets that begin to connect, from the pod's namespace; descriptor or -errno. */
int zt_sock_to_peer(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *to);
int zt_sock_forward(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *from,
                    const struct zt_addr *to);
int zt_sock_deliver(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *from,
                    const struct zt_addr *to);
/* For a connection that many streams share: none of them may fill the kernel's buffer. */
int zt_sock_share(int fd);
int zt_sock_error(int fd);
/* Close an application's socket, with a reset or in good order. */
void zt_sock_abort(int fd);
void zt_sock_close(int fd);

/* --- relay.c -------------------------------------------------------------------------------------- */

/* Moves what can be moved between the two legs; ends the connection when both sides are done. */
void zt_relay_run(struct zt_conn *c);
/* Gives the pipes back. */
void zt_relay_release(struct zt_conn *c);
void zt_relay_drop_pool(struct zt_worker *w);

#endif
