/*
 * The pool of HBONE connections from one pod to one peer, one for each worker: who waits for a
 * stream, who dials, and what happens when that fails.
 *
 *   - A stream is taken from the first connection with room: the peer's SETTINGS and our own limit
 *     say how much. Until the first SETTINGS have come, a peer gets one stream, or as many as its
 *     last connection allowed.
 *   - While nobody has room, more is dialled: as much as those that wait need, ZT_POOL_DIALS at
 *     once, ZT_POOL_CONNECTIONS in all. A stream that ends serves the next one that waits.
 *   - A dial counts until the peer's SETTINGS have come. One that fails is told to all that wait,
 *     unless an open connection may still serve them; then nobody dials for a while, and who comes
 *     meanwhile is told the same at once. One whose peer allows no stream and goes away has failed.
 *   - A connection without streams is closed after a while; soon, while another one has room.
 *   - A CONNECT that a peer cannot have answered is sent anew, ZT_STREAM_RETRIES times: it was
 *     refused unseen (RFC 9113, 8.7), or its connection broke before the answer. No byte of the
 *     application goes out before the answer, so nothing can arrive twice.
 */
#ifndef ZT_POOL_H
#define ZT_POOL_H

#include "h2.h"

/* Give `c` a stream of the peer's pool, now or when there is one. */
void zt_pool_want(struct zt_conn *c, struct zt_peer *peer);
/* The peer has refused the stream of `c`, which has been let go of; false: no more attempts. */
bool zt_pool_again(struct zt_conn *c, struct zt_peer *peer);
/* Serves those that wait, as far as there is room; dials if there is none. */
void zt_pool_serve(struct zt_worker *w, struct zt_peer *peer);
/* SETTINGS of the peer have come: the first ones, or others. */
void zt_pool_settled(struct zt_h2 *h, bool first);
/* Whether a stream whose connection ended for this reason may be tried again. */
bool zt_pool_worth_another(const struct zt_h2 *h, const struct zt_conn *c, enum zt_reason reason);
/* A client's connection has ended; it is out of the pool already. */
void zt_pool_lost(struct zt_h2 *h, enum zt_reason reason);
/* Whether the connection has no streams, and another one of its pool has room for more. */
bool zt_pool_surplus(const struct zt_h2 *h);
/* Credentials have come or were rotated, peers are draining: move what can move. */
void zt_pool_retire(struct zt_worker *w);
/* Ask the peer's connections at once whether it is there: its workload has left the mesh. */
void zt_pool_suspect(struct zt_worker *w, const struct zt_peer *peer);

#endif
