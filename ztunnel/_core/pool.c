#include "pool.h"

#include <sys/random.h>

static struct zt_pool *pool_of(struct zt_worker *w, struct zt_peer *peer) {
    return &peer->pools[w->index];
}

static struct zt_h2 *at(struct zt_list *l) {
    return ZT_CONTAINER(l, struct zt_h2, pool_link);
}

/* --- who waits ------------------------------------------------------------------------------------ */

static void fail_waiting(struct zt_pool *pool, enum zt_reason reason) {
    while (!zt_list_empty(&pool->waiting)) {
        struct zt_conn *c = ZT_CONTAINER(pool->waiting.next, struct zt_conn, wait);

        zt_list_remove(&c->wait);
        zt_conn_end(c, reason);
    }
}

/* --- how much room there is ------------------------------------------------------------------------- */

/* Before the order to retire has come, too: no stream begins after a change and uses what was before
 * it. */
static bool outdated(const struct zt_h2 *h) {
    return !h->server && (atomic_load(&h->peer->draining) ||
                          h->generation != atomic_load(&h->credential->generation));
}

static int room(const struct zt_pool *pool, struct zt_h2 *h) {
    if (h->state != ZT_H_OPEN || h->fate || outdated(h)) return 0;
    if (h->settled) return zt_session_room(h);
    return h->retiring ? 0 : (pool->known ? pool->limit : 1) - h->nstreams;
}

static struct zt_h2 *with_room(struct zt_pool *pool) {
    for (struct zt_list *l = pool->connections.next; l != &pool->connections; l = l->next) {
        if (room(pool, at(l)) > 0) return at(l);
    }
    return NULL;
}

/* Whether an open connection may serve those that wait, sooner or later. */
static bool promising(const struct zt_pool *pool) {
    for (struct zt_list *l = pool->connections.next; l != &pool->connections; l = l->next) {
        const struct zt_h2 *h = at(l);

        if (h->state == ZT_H_OPEN && h->settled && !h->retiring && !h->fate && !outdated(h))
            return true;
    }
    return false;
}

/* --- dialling ------------------------------------------------------------------------------------------ */

/* How many dials those that wait are worth now. */
static int worth(const struct zt_pool *pool) {
    int each = pool->known ? pool->limit : ZT_CLIENT_STREAMS, dials = 0, waiting = 0;

    /* A peer that allows no stream is asked once: it says by SETTINGS when that changes. */
    if (each == 0) return promising(pool) ? 0 : 1;
    for (struct zt_list *l = pool->waiting.next; l != &pool->waiting; l = l->next) {
        if (waiting++ % each == 0 && ++dials == ZT_POOL_DIALS) break;
    }
    return dials;
}

static bool backing_off(const struct zt_worker *w, const struct zt_peer *peer,
                        const struct zt_pool *pool) {
    /* Another certificate may fare better. */
    return w->now < pool->retry_at &&
           pool->failed_generation == atomic_load(&peer->credential->generation);
}

static void back_off(struct zt_worker *w, const struct zt_peer *peer, struct zt_pool *pool,
                     enum zt_reason reason) {
    uint64_t wait = ZT_BACKOFF_FIRST_US << pool->failures;
    uint16_t jitter;

    if (getrandom(&jitter, sizeof(jitter), 0) != (ssize_t)sizeof(jitter)) jitter = 0;
    if (wait < ZT_BACKOFF_MAX_US)
        pool->failures++;
    else
        wait = ZT_BACKOFF_MAX_US;
    /* From three to five quarters of it: many pools must not knock in step. */
    wait = wait * 3 / 4 + wait / 2 * jitter / UINT16_MAX;
    pool->retry_at = w->now + wait;
    pool->failure = reason;
    pool->failed_generation = atomic_load(&peer->credential->generation);
}

/* Ends by our own will, which say nothing of the peer. */
static bool our_own(enum zt_reason reason) {
    switch (reason) {
    case ZT_R_POD_REMOVED:
    case ZT_R_SHUTDOWN:
    case ZT_R_TRUST_WITHDRAWN:
    case ZT_R_POLICY_CHANGED:
        return true;
    default:
        return false;
    }
}

void zt_pool_serve(struct zt_worker *w, struct zt_peer *peer) {
    struct zt_pool *pool = pool_of(w, peer);
    struct zt_h2 *h;

    while (!zt_list_empty(&pool->waiting) && (h = with_room(pool))) {
        struct zt_conn *c = ZT_CONTAINER(pool->waiting.next, struct zt_conn, wait);

        zt_list_remove(&c->wait);
        if (zt_stream_request(h, c) < 0) zt_conn_end(c, ZT_R_NO_MEMORY);
    }
    if (zt_list_empty(&pool->waiting)) return;
    if (backing_off(w, peer, pool)) {
        if (!pool->dialling && !promising(pool)) fail_waiting(pool, pool->failure);
        return;
    }
    while (pool->dialling < worth(pool) && pool->total < ZT_POOL_CONNECTIONS) {
        pool->dialling++;
        pool->total++;
        if (!zt_h2_dial(w, peer)) {
            pool->dialling--;
            pool->total--;
            if (!pool->dialling && !promising(pool)) fail_waiting(pool, ZT_R_NO_MEMORY);
            return;
        }
        /* A dial may fail at once, and has told those that waited. */
        if (backing_off(w, peer, pool)) return;
    }
}

void zt_pool_want(struct zt_conn *c, struct zt_peer *peer) {
    c->state = ZT_C_POOL;
    c->upstream = peer->addr;
    zt_timer_set(c->worker, &c->timer, ZT_D_STREAM);
    zt_list_append(&pool_of(c->worker, peer)->waiting, &c->wait);
    zt_pool_serve(c->worker, peer);
}

bool zt_pool_again(struct zt_conn *c, struct zt_peer *peer) {
    if (c->stream.retries >= ZT_STREAM_RETRIES) return false;
    c->stream.retries++;
    zt_pool_want(c, peer);
    return true;
}

/* --- what becomes of a connection -------------------------------------------------------------------------- */

void zt_pool_settled(struct zt_h2 *h, bool first) {
    struct zt_pool *pool = pool_of(h->worker, h->peer);

    pool->limit = zt_session_limit(h);
    pool->known = true;
    if (pool->limit) pool->failures = 0;
    if (first) {
        pool->dialling--;
        pool->retry_at = 0;
    }
    zt_pool_serve(h->worker, h->peer);
}

bool zt_pool_worth_another(const struct zt_h2 *h, const struct zt_conn *c, enum zt_reason reason) {
    if (h->server || !h->settled || c->state != ZT_C_CONNECTING) return false;
    return reason == ZT_R_PEER_LOST || reason == ZT_R_TLS_TRUNCATED ||
           reason == ZT_R_KEEPALIVE_TIMEOUT;
}

void zt_pool_lost(struct zt_h2 *h, enum zt_reason reason) {
    struct zt_pool *pool = pool_of(h->worker, h->peer);

    pool->total--;
    if (!h->settled) pool->dialling--;
    /* Retired before it was settled: the certificate was rotated while it was dialled. */
    if (h->settled ? h->used || pool->limit || outdated(h) : h->retiring) {
        zt_pool_serve(h->worker, h->peer);
        return;
    }
    /* Who never allowed a stream and left has failed those that wait, politely or not. */
    if (reason == ZT_R_IDLE) reason = h->retiring ? ZT_R_H2_GOAWAY : ZT_R_PEER_LOST;
    if (!our_own(reason)) back_off(h->worker, h->peer, pool, reason);
    if (!promising(pool)) fail_waiting(pool, reason);
}

bool zt_pool_surplus(const struct zt_h2 *h) {
    if (h->server || h->nstreams) return false;
    for (struct zt_list *l = h->pool_link.next; l != &h->pool_link; l = l->next) {
        if (l != &pool_of(h->worker, h->peer)->connections && at(l)->settled &&
            room(pool_of(h->worker, h->peer), at(l)) > 0)
            return true;
    }
    return false;
}

void zt_pool_retire(struct zt_worker *w) {
    struct zt_list all;

    zt_list_take_all(&w->h2s, &all);
    while (!zt_list_empty(&all)) {
        struct zt_h2 *h = ZT_CONTAINER(zt_list_move_first(&all, &w->h2s), struct zt_h2, link);

        if (h->state == ZT_H_CREDENTIAL) {
            zt_h2_certified(h);
        } else if (h->state == ZT_H_OPEN && outdated(h)) {
            h->retiring = true;
            zt_h2_mark_dirty(h);
        }
    }
}

void zt_pool_suspect(struct zt_worker *w, const struct zt_peer *peer) {
    for (struct zt_list *l = w->h2s.next; l != &w->h2s; l = l->next) {
        struct zt_h2 *h = ZT_CONTAINER(l, struct zt_h2, link);

        if (h->peer == peer && h->state < ZT_H_ENDED) zt_h2_suspect(h);
    }
}
