/*
 * What the control side tells the core, as reference-counted objects: pods, credentials, peers,
 * series and decisions, found by the numbers that it chose; and the queues that lead back to it.
 *
 * Every function here may be called from any thread. Objects are immutable after creation but for
 * the fields that say otherwise. Functions return 0 or -errno; -EEXIST for a number in use,
 * -ENOENT for one that is not known, -ENOMEM.
 */
#ifndef ZT_STATE_H
#define ZT_STATE_H

#include <pthread.h>

#include "base.h"
#include "line.h"
#include "map.h"
#include "ossl.h"
#include "trace.h"

struct zt_core;
struct zt_msg;
struct zt_worker;

enum zt_kind {
    ZT_OUTBOUND = 1,
    ZT_INBOUND_PLAINTEXT,
    ZT_INBOUND_HBONE,
    ZT_PEER_CERTIFICATE,
    ZT_SERVER_CERTIFICATE,
};

/* --- credentials --------------------------------------------------------------------------------
 * A context is kept alive by an SSL that is never used: SSL_new holds a reference, and no function
 * of the table could take one otherwise. */

struct zt_credential {
    struct zt_map_node node;
    _Atomic int refs;
    pthread_mutex_t lock; /* guards client, server and generation together */
    SSL *client_anchor, *server_anchor;
    SSL_CTX *client, *server;
    _Atomic uint64_t generation; /* 0: none yet; grows with each rotation */
};

/* --- pods --------------------------------------------------------------------------------------- */

/* One event source: a listener, an accepted or a dialled socket, a TLS connection. The handler
 * runs on the worker whose epoll reported it. */
struct zt_io {
    void (*on_event)(struct zt_worker *w, struct zt_io *io, uint32_t events);
    int fd;
};

struct zt_listener {
    struct zt_io io; /* shared by all workers, each of which has it in its epoll */
    struct zt_pod *pod;
    enum zt_kind kind;
};

struct zt_pod {
    struct zt_map_node node;
    _Atomic int refs;
    struct zt_core *core;
    int netns;
    struct zt_listener listeners[3]; /* in the order of enum zt_kind */
    struct zt_addr addrs[ZT_MAX_POD_ADDRS];
    int naddrs;
    struct zt_credential *credential;
    _Atomic bool removed;
    struct zt_msg *orders;   /* two for each worker: to drain, and that the pod has gone */
    _Atomic int hearing;     /* while draining: workers that may still use the listeners */
    _Atomic int connections; /* of all workers, as all that follows */
    _Atomic int descriptors; /* of its connections */
    _Atomic int dials;       /* TCP connects under way */
    _Atomic uint64_t refused[ZT_REASON_COUNT]; /* by zt_is_limit() */
    _Atomic int asking;     /* questions of this pod that wait for an answer, of all workers */
    _Atomic int handshakes; /* as a server, not open yet, of all workers */
    _Atomic int64_t held;   /* bytes that wait for its readers, of all workers */
};

/* --- peers: one pool for each worker, touched by that worker only --------------------------------- */

struct zt_pool {
    struct zt_list connections; /* struct zt_h2 */
    struct zt_list waiting;     /* struct zt_conn that want a stream */
    int dialling, total;        /* dialling <= total */
    int limit;                  /* streams that the peer allows on a connection, if known */
    bool known;
    int failures;               /* dials that failed in a row, as far as they count for the wait */
    uint64_t retry_at;          /* nobody dials before this */
    uint64_t failed_generation; /* the certificate with which it failed */
    enum zt_reason failure;
};

struct zt_peer {
    struct zt_map_node node;
    _Atomic int refs;
    struct zt_pod *pod;
    struct zt_credential *credential;
    struct zt_addr addr;
    _Atomic bool draining;
    struct zt_pool pools[]; /* one for each worker */
};

/* --- series ------------------------------------------------------------------------------------- */

struct zt_series_counters {
    zt_count opened, closed, received, sent;
    zt_count failed[ZT_REASON_COUNT];
};

struct zt_series {
    struct zt_map_node node;
    _Atomic int refs;
    struct zt_series_counters by_worker[];
};

/* --- decisions ---------------------------------------------------------------------------------- */

enum zt_action { ZT_REFUSE, ZT_FORWARD, ZT_DELIVER, ZT_HAND_OVER, ZT_TUNNEL, ZT_BALANCE };

struct zt_choice {
    struct zt_decision *decision;
    uint32_t weight;
};

struct zt_decision {
    struct zt_map_node node;
    _Atomic int refs;
    struct zt_core *core;
    enum zt_action action;
    enum zt_reason reason;    /* REFUSE */
    struct zt_series *series; /* all but BALANCE */
    struct zt_series *mirror; /* the same counts by another name, HAND_OVER only */
    struct zt_addr addr;      /* FORWARD; port 0: to the original destination. HAND_OVER */
    struct zt_pod *pod;       /* HAND_OVER: the destination */
    struct zt_peer *peer;     /* TUNNEL */
    char *authority, *baggage, *host;
    struct zt_line
        *line; /* of ends that are no failures; NULL: they are reported like all others */
    struct zt_choice *choices; /* BALANCE */
    size_t nchoices;
    uint64_t total_weight;
    bool released;      /* the control side has given its reference back */
    _Atomic int killed; /* 0, or 1 + the reason: carries no new and no old connection */
    struct zt_decision *next_freed;
    uint64_t freed_at; /* how many ends were queued when the last reference went */
};

/* --- towards the control side ---------------------------------------------------------------------- */

/* The question that a decision answers. Zeroed before it is filled: it is hashed as bytes. */
struct zt_key {
    uint64_t pod, identity;
    uint8_t source[16]; /* inbound only */
    uint8_t destination[16];
    uint16_t port;
    uint8_t kind;
};

struct zt_der {
    uint8_t *data;
    size_t len;
};

struct zt_upcall {
    struct zt_upcall *next; /* in the queue; unused once collected */
    struct zt_map_node node;
    struct zt_worker *worker;
    struct zt_key key;
    uint64_t epoch, peer;
    struct zt_addr source, destination;
    struct zt_msg *reply; /* an answer must not fail for want of memory */
    bool cancelled;       /* while queued: free instead of collecting */
    bool queued;
    int nchain;
    struct zt_der chain[ZT_MAX_CHAIN];
};

struct zt_ended {
    enum zt_kind kind;
    uint64_t pod, decision, identity;
    struct zt_addr source, destination, upstream;
    uint64_t started_us, duration_us, received, sent;
    enum zt_reason reason;
    bool traced;           /* the rest is there */
    struct zt_trace trace; /* trace.h */
};

#define ZT_DETAIL 121

struct zt_failed {
    enum zt_kind kind;
    uint64_t pod, peer;
    struct zt_addr addr;
    enum zt_reason reason;
    char detail[ZT_DETAIL];
};

/* Positions in a ring: they grow for ever, tail at most the ring's size before head. An empty ring
 * begins at its first slot again, so that only as much of it is touched as has ever waited. */
struct zt_ring {
    uint64_t head, tail, first;
};

/* What a handshake has agreed on, by OpenSSL's names; "" where there is none. */
struct zt_tls_about {
    char version[8];
    char cipher[32];
    char group[32];
};

/* A snapshot of connections that is being made or taken (listing.h). */
struct zt_slice;
struct zt_listing {
    bool begun;
    int working;     /* workers that are not through */
    size_t room;     /* for so many connections more */
    uint64_t missed; /* for which there was none */
    struct zt_slice *head, **tail;
};

struct zt_core {
    int nworkers;
    struct zt_worker **workers;
    bool running, draining;
    _Atomic int parting;   /* messages about draining that no worker has served yet */
    struct zt_msg *orders; /* to drain, one for each worker */
    _Atomic uint64_t epoch;
    _Atomic uint64_t deadline_us[ZT_DEADLINES];
    _Atomic uint64_t limit[ZT_LIMITS];
    _Atomic uint64_t tracing;  /* 0: off; else 1 + the part of 2^32 that is sampled (trace.h) */
    uint64_t descriptors_most; /* RLIMIT_NOFILE when the core was made */
    _Atomic int npods;
    int event_fd;

    pthread_mutex_t lock; /* the maps */
    struct zt_map pods, credentials, peers, series, decisions;

    pthread_mutex_t queue_lock; /* all below */
    struct zt_upcall *upcalls_head, **upcalls_tail;
    struct zt_map asked; /* upcalls that have no answer yet, by id */
    uint64_t next_upcall;
    struct zt_ended *ended;   /* of ZT_EVENTS_MAX */
    struct zt_failed *failed; /* of ZT_FAILURES_MAX */
    struct zt_ring ended_at, failed_at;
    struct zt_lines lines,
        lines_taken; /* swapped when they are taken, so that nothing is copied here */
    struct zt_decision *freed_head, **freed_tail;
    uint64_t events_lost;
    struct zt_listing listing;
};

/* queue.c's part of a core. */
int zt_queues_init(struct zt_core *core);
void zt_queues_free(struct zt_core *core);

int zt_core_new(struct zt_core **out, int nworkers);
int zt_core_start(struct zt_core *core);
void zt_core_stop(struct zt_core *core);
/* Accept nothing more, and say goodbye; serve what is there. Again: nothing to do. */
int zt_core_drain(struct zt_core *core);
/* True when a draining core carries nothing any more. */
bool zt_core_drained(const struct zt_core *core);
void zt_core_free(struct zt_core *core);

/* get: a new reference, or NULL. put: gives one back; NULL is allowed. */
struct zt_pod *zt_pod_get(struct zt_pod *pod);
void zt_pod_put(struct zt_pod *pod);
void zt_credential_put(struct zt_credential *c);
void zt_peer_put(struct zt_peer *peer);
struct zt_peer *zt_peer_get(struct zt_peer *peer);
struct zt_decision *zt_decision_get(struct zt_decision *d);
void zt_decision_put(struct zt_decision *d);

int zt_pod_add(struct zt_core *core, uint64_t number, int netns, const int listeners[3],
               const struct zt_addr *addrs, int naddrs, uint64_t credential);
int zt_pod_remove(struct zt_core *core, uint64_t number);
int zt_credential_set(struct zt_core *core, uint64_t number, SSL_CTX *client, SSL_CTX *server);
int zt_credential_remove(struct zt_core *core, uint64_t number);
/* A new SSL for one handshake, and the generation it belongs to; NULL if there is none yet. */
SSL *zt_credential_ssl(struct zt_credential *c, bool server, uint64_t *generation);
int zt_peer_add(struct zt_core *core, uint64_t number, uint64_t pod, const struct zt_addr *addr,
                uint64_t credential);
int zt_peer_remove(struct zt_core *core, uint64_t number);
/* Asks the pool's connections whether the peer is there, and waits for the answer only so long. */
int zt_peer_suspect(struct zt_core *core, uint64_t number);
int zt_peer_close(struct zt_core *core, uint64_t number, enum zt_reason reason);
int zt_series_add(struct zt_core *core, uint64_t number);
int zt_series_remove(struct zt_core *core, uint64_t number);
/* Sums the workers' counters into `out` (one plain struct). */
int zt_series_read(struct zt_core *core, uint64_t number, struct zt_series_counters *out);

/* What a decision refers to, by number; 0: nothing. */
struct zt_referred {
    uint64_t series, mirror, peer, pod;
};

/* The template's owned pointers (authority, baggage, host, choices) pass to the decision on
 * success and stay with the caller on failure. */
int zt_decision_add(struct zt_core *core, const struct zt_decision *template, uint64_t number,
                    struct zt_referred refers);
/* A reference by number, for building BALANCE; -ENOENT. */
int zt_decision_find(struct zt_core *core, uint64_t number, struct zt_decision **out);
int zt_decision_release(struct zt_core *core, uint64_t number);
/* The lines of connections under this decision that end as they should. Before it is an answer, and
 * once: -EEXIST. -EINVAL: not a valid form. */
int zt_decision_describe(struct zt_core *core, uint64_t number, const char *form, size_t len);
/* Nothing to do, and no error, for a decision that nothing refers to any more. */
int zt_decision_kill(struct zt_core *core, uint64_t number, enum zt_reason reason);

/* Cuts the inbound HBONE connections that proved this identity. */
int zt_identity_kill(struct zt_core *core, uint64_t identity, enum zt_reason reason);

/* What a pod has now, and how often it was refused what it asked for, by reason. */
struct zt_pod_counters {
    uint64_t connections, descriptors, dials, questions, handshakes, held;
    zt_count refused[ZT_REASON_COUNT];
};
int zt_pod_read(struct zt_core *core, uint64_t number, struct zt_pod_counters *out);
/* Looks at the listeners of all pods, or leaves them alone. */
void zt_pods_listen(struct zt_core *core, const struct zt_worker *w, bool look);

/* Queues an upcall, which passes to the core; returns its id, or 0 without memory. */
uint64_t zt_upcall_send(struct zt_core *core, struct zt_upcall *u);
/* Forgets an upcall whose asker has gone. */
void zt_upcall_cancel(struct zt_core *core, uint64_t id);
void zt_upcall_free(struct zt_upcall *u);
/* 1: passed on; 0: the epoch is stale, the core asks again; -ENOENT: no such decision. */
int zt_upcall_answer(struct zt_core *core, uint64_t id, uint64_t epoch, uint64_t decision);
void zt_upcall_answer_certificate(struct zt_core *core, uint64_t id, uint64_t identity,
                                  enum zt_reason reason);
/* Takes the next question for the control side: `out` gets a copy and owns its chain; false when
 * there is none. */
bool zt_upcall_collect(struct zt_core *core, struct zt_upcall *out);
/* True when so many wait that the control side should be woken now; otherwise soon is enough. */
bool zt_ended_push(struct zt_core *core, const struct zt_ended *e, const struct zt_line *line);
void zt_failed_push(struct zt_core *core, const struct zt_failed *f);
void zt_core_wake(struct zt_core *core);
/* Takes up to `most` of what waits; returns how many. */
size_t zt_ended_take(struct zt_core *core, struct zt_ended *out, size_t most);
size_t zt_failed_take(struct zt_core *core, struct zt_failed *out, size_t most);
/* Takes all lines: valid until the next call, from one thread. */
const struct zt_lines *zt_lines_take(struct zt_core *core);
/* Decisions that nothing refers to any more and whose ends have all been taken. */
size_t zt_freed_take(struct zt_core *core, uint64_t *out, size_t most);

#endif
