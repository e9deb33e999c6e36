/*
 * A worker: one thread, one epoll, and everything that only this thread touches. It turns events
 * into calls of their handlers, then serves its mailbox, its postponed work and its deadlines, and
 * last frees what ended meanwhile, so that no handler ever meets freed memory.
 *
 * Order of one turn, which the other files rely on:
 *   1. handlers of the events that epoll reported;
 *   2. the mailbox (a removed pod's last event has been handled before its memory may go);
 *   3. postponed work (connections that used up their budget);
 *   4. deadlines, and table entries of an older epoch;
 *   5. HBONE connections that have something to send, each flushed once;
 *   6. the graveyard;
 *   7. a word to the control side, if connections have ended.
 */
#ifndef ZT_WORKER_H
#define ZT_WORKER_H

#include <sys/uio.h>

#include "state.h"

struct zt_conn;
struct zt_h2;

/* --- deadlines, postponed work, graves: nodes inside the objects --------------------------------- */

struct zt_timer {
    struct zt_list link;
    uint64_t since; /* when the wait began, microseconds; 0 when not set */
    enum zt_deadline deadline;
    void (*fire)(struct zt_worker *w, struct zt_timer *t);
};

struct zt_task {
    struct zt_list link;
    void (*run)(struct zt_worker *w, struct zt_task *t);
};

struct zt_grave {
    struct zt_grave *next;
    void (*bury)(struct zt_worker *w, struct zt_grave *g);
};

/* --- the decision table ---------------------------------------------------------------------------- */

struct zt_entry {
    struct zt_entry *next;
    struct zt_key key;
    uint64_t epoch;
    struct zt_decision *decision; /* NULL while the question is asked */
    struct zt_pod *pod;           /* a reference, while asked */
    uint64_t upcall;              /* the question's id */
    uint64_t asked_us;
    struct zt_list waiting; /* struct zt_conn, while asked */
    struct zt_timer timer;
};

struct zt_table {
    struct zt_entry **buckets;
    size_t nbuckets, count;
    uint64_t seed[2];
    uint64_t swept; /* the epoch that the last zt_table_expire saw */
};

/* --- the mailbox ------------------------------------------------------------------------------------ */

enum zt_msg_type {
    ZT_MSG_ANSWER,        /* key, epoch, decision (a reference); decision NULL: ask again */
    ZT_MSG_CERTIFICATE,   /* id, identity, reason */
    ZT_MSG_KILL_DECISION, /* decision (a reference), reason */
    ZT_MSG_KILL_IDENTITY, /* identity, reason */
    ZT_MSG_CLOSE_PEER,    /* peer (a reference), reason */
    ZT_MSG_SUSPECT_PEER,  /* peer (a reference) */
    ZT_MSG_RETIRE,        /* look for pooled connections that may close, and for credentials */
    ZT_MSG_POD_GONE,      /* pod (a reference) */
    ZT_MSG_LIST,          /* copy what is carried (listing.h) */
    ZT_MSG_DEAF,          /* pod (a reference): no epoll has its listeners any more */
    ZT_MSG_DRAIN,
    ZT_MSG_ACCEPTED, /* pod (a reference), kind, fd, source, destination */
    ZT_MSG_STOP,
};

struct zt_msg {
    struct zt_msg *next;
    enum zt_msg_type type;
    enum zt_kind kind;
    enum zt_reason reason;
    uint64_t id, epoch, identity;
    struct zt_key key;
    struct zt_decision *decision;
    struct zt_peer *peer;
    struct zt_pod *pod;
    int fd;
    struct zt_addr source, destination;
};

/* --- what a worker counts ------------------------------------------------------------------------------ */

struct zt_worker_stats {
    zt_count connections, tls_connections, descriptors, held, accepted, upcalls, table_hits,
        last_loop_us, traces_left_out;
    zt_count handshake_failures[ZT_REASON_COUNT];
    zt_count expired[ZT_DEADLINES]; /* deadlines that ended something */
    struct zt_histogram handshakes_client, handshakes_server, upcall_latency;
};

/* Chunks of one stream that wait for one writev at the end of a read. */
#define ZT_GATHER_IOVS 64
#define ZT_GATHERS 16

struct zt_gather {
    struct zt_conn *conn;
    int n;
    struct iovec iov[ZT_GATHER_IOVS];
};

struct zt_pipe {
    int r, w; /* -1 when there is none */
};

struct zt_worker {
    struct zt_core *core;
    int index;
    pthread_t thread;
    int epfd, wake_fd, spare_fd;
    struct zt_io wake;
    bool woken, stopping;
    uint64_t listen_at; /* when to look at the listeners again; 0: they are looked at */
    uint64_t report_at; /* when to wake the control side for what has ended; 0: nothing has */
    uint64_t now;       /* microseconds, read once a turn */
    uint64_t peak;      /* most connections open at once since memory was given back */
    uint64_t trim_at;   /* when to give memory back; 0: no need */
    uint64_t held_peak; /* the most bytes that waited since then */
    struct zt_worker_stats stats;
    /* Read by the others when they balance accepts. */
    _Atomic int load_connections, load_tls;
    _Atomic int lingering; /* HBONE connections that are over but for the other side's end */
    bool draining;
    struct zt_timer drain_timer;

    pthread_mutex_t mail_lock;
    struct zt_msg *mail_head, **mail_tail;
    _Atomic unsigned lost; /* types of messages for which there was no memory, as bits */

    const struct zt_pod *netns; /* whose namespace this thread is in */
    struct zt_table table;
    struct zt_list conns; /* all struct zt_conn */
    struct zt_list h2s;   /* all struct zt_h2 */
    struct zt_list dirty; /* struct zt_h2 to flush */
    struct zt_list lingers;
    struct zt_list tasks;
    struct zt_task listing_task;
    uint64_t born;                 /* connections so far */
    uint64_t listing;              /* the last listing that was ordered */
    uint64_t trace_seed, trace_at; /* trace.c: of the ids; when `trace_room` last grew */
    int trace_room;                /* traces that may begin now */
    struct zt_list deadlines[ZT_DEADLINES];
    struct zt_grave *graves;
    struct zt_pipe pipes[ZT_PIPE_POOL];
    int npipes;

    uint8_t *in;    /* ciphertext as received: ZT_WIRE */
    uint8_t *plain; /* plaintext received: ZT_CHUNK */
    uint8_t *out;   /* plaintext to be encrypted: ZT_CHUNK */
    size_t out_used;
    uint64_t moved;  /* bytes of connections in this turn */
    int vain, pause; /* looks for events in vain, in a row; turns to sleep at once */
    struct zt_gather gathers[ZT_GATHERS];
    int ngathers;
};

/* Report the end of a connection to the control side, as a line if there is one: many at once, and
 * late by ZT_REPORT_US. */
void zt_worker_report(struct zt_worker *w, const struct zt_ended *e, const struct zt_line *line);

/* A connection has begun (1) or ended (-1). */
void zt_worker_count(struct zt_worker *w, int change);
/* What waits for applications has become more or less. */
void zt_worker_held(struct zt_worker *w);

int zt_worker_new(struct zt_worker **out, struct zt_core *core, int index);
int zt_worker_start(struct zt_worker *w);
void zt_worker_join(struct zt_worker *w);
void zt_worker_free(struct zt_worker *w);

/*
 * From any thread. The message is copied; what it refers to passes to the worker. Without memory
 * (-ENOMEM) an order is not lost but widened: the worker looks for whatever its objects say has
 * ended, and where they cannot say it, ends all that the order may have meant.
 */
int zt_worker_post(struct zt_worker *w, const struct zt_msg *msg);
/* The same for a message that is on the heap already, which passes to the worker too. */
void zt_worker_put(struct zt_worker *w, struct zt_msg *m);

void zt_timer_set(struct zt_worker *w, struct zt_timer *t, enum zt_deadline d);
/* As if set at `since`, for what moved while the timer ran: instead of setting it at each move. */
void zt_timer_set_since(struct zt_worker *w, struct zt_timer *t, enum zt_deadline d,
                        uint64_t since);
/* Whether a wait since then is over, by the deadline as it is set now. */
bool zt_timer_over(const struct zt_worker *w, enum zt_deadline d, uint64_t since);
void zt_timer_stop(struct zt_timer *t);
void zt_task_add(struct zt_worker *w, struct zt_task *t);
void zt_bury(struct zt_worker *w, struct zt_grave *g);
int zt_io_watch(struct zt_worker *w, struct zt_io *io, uint32_t events);
/* Before a descriptor that is watched is closed: while a program is being started (a successor of this
 * one) the child has a copy of it, and the kernel would go on to tell of what is freed here (epoll(7),
 * "Will closing a file descriptor cause it to be removed from all epoll interest lists?"). */
void zt_io_forget(const struct zt_worker *w, int fd);

/* Sums the workers' counters; last_loop_us has no sum and stays 0. */
void zt_stats_sum(const struct zt_core *core, struct zt_worker_stats *out);

/* The listener became readable: accept, and give away what another worker has more room for. */
void zt_worker_accept(struct zt_worker *w, struct zt_io *io, uint32_t events);

/* --- drain.c: handing over to a successor ------------------------------------------------------------ */

/* No epoll has the pod's listeners any more; the last worker to hear of it takes what they still
 * hold and closes them. */
void zt_drain_deaf(struct zt_worker *w, struct zt_pod *pod);
/* Says goodbye on every HBONE connection, and sets the deadline. */
void zt_drain_begin(struct zt_worker *w);
/* Takes over the socket of an HBONE connection that ended in good order: says that nothing more
 * comes, and reads on until the other side's end. A close with input unread would reset, and the
 * kernel would drop what it still has to send (tcp(7), RFC 9293 3.6.1). */
void zt_linger(struct zt_worker *w, struct zt_pod *pod, int fd);
/* Closes those of a pod; NULL: all. */
void zt_linger_end(struct zt_worker *w, const struct zt_pod *pod);

/* Ends every connection of the worker. */
void zt_worker_end_all(struct zt_worker *w, enum zt_reason reason);
/* Accepts all that the listener holds. */
void zt_worker_accept_last(struct zt_worker *w, struct zt_listener *l);

/* --- table.c --------------------------------------------------------------------------------------- */

int zt_table_init(struct zt_table *t);
void zt_table_clear(struct zt_worker *w);
/*
 * Decides for `conn` by its key: calls zt_conn_decided at once on a hit; on a miss asks, and calls
 * it when the answer is there. 0, or -errno (-EBUSY: the pod asks too much; -ENOMEM).
 */
int zt_table_decide(struct zt_worker *w, struct zt_conn *conn, const struct zt_key *key);
/* Lets go of what an advance of the epoch has made useless. */
void zt_table_expire(struct zt_worker *w);
void zt_table_answer(struct zt_worker *w, const struct zt_msg *msg);

#endif
