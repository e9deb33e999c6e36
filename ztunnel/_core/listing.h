/*
 * What is carried now: a snapshot of all application connections, for the control side.
 *
 * Each worker copies its own connections when it is ordered to, ZT_LISTING_SLICE of them a turn and
 * everything else in between. So no lock stands on anybody's way, no connection waits longer than a
 * slice takes, and the snapshot holds every connection that was there from the order to the end,
 * each once. Nothing is kept for it, and nothing counted, while nobody asks.
 *
 * One snapshot at a time: begun by zt_listing_begin, and over once zt_listing_take has said so.
 */
#ifndef ZT_LISTING_H
#define ZT_LISTING_H

#include "conn.h"

struct zt_listed {
    uint64_t number; /* of the connection, never used again in this process */
    enum zt_kind kind;
    enum zt_conn_state state;
    uint64_t pod, decision; /* decision 0: none yet */
    uint64_t identity;      /* whom the other side of HBONE has proved to be; 0: nobody */
    struct zt_addr source, destination, upstream;
    uint64_t started_us, moved_us, received, sent;
    struct zt_tls_about tls; /* of the HBONE connection that carries it; empty without */
};

/* How many of a worker's connections are copied in one turn: some 0.1 ms. */
#define ZT_LISTING_SLICE 256
/* Connections of one snapshot, some 250 bytes each: more than a node's ports and descriptors allow
 * in practice. Those beyond it are counted. */
#define ZT_LISTING_MAX 131072

/* Gives the order. 0; -EALREADY: the one before has not been taken to its end; -EINVAL: the core does
 * not run; -ENOMEM. The control side is woken for what is ready. */
int zt_listing_begin(struct zt_core *core);
/* Takes up to `most` of what is ready; `over` says that nothing is left, and nothing comes. */
size_t zt_listing_take(struct zt_core *core, struct zt_listed *out, size_t most, bool *over,
                       uint64_t *missed);
void zt_listing_free(struct zt_core *core);

/* The worker's part: the order has come. */
void zt_listing_ordered(struct zt_worker *w);
void zt_listing_task(struct zt_worker *w, struct zt_task *t);

#endif
