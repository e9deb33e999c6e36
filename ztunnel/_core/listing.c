#include "listing.h"

#include <errno.h>
#include <stdlib.h>

#include "h2.h"

struct zt_slice {
    struct zt_slice *next;
    size_t n, taken; /* taken <= n */
    struct zt_listed at[ZT_LISTING_SLICE];
};

/* --- the control side's part ------------------------------------------------------------------------ */

int zt_listing_begin(struct zt_core *core) {
    struct zt_listing *listing = &core->listing;
    struct zt_msg *orders[ZT_MAX_WORKERS];
    bool busy;

    if (!core->running) return -EINVAL;
    for (int i = 0; i < core->nworkers; i++) {
        orders[i] = malloc(sizeof(*orders[i]));
        if (orders[i]) continue;
        while (i--) free(orders[i]);
        return -ENOMEM;
    }
    pthread_mutex_lock(&core->queue_lock);
    busy = listing->begun;
    if (!busy) {
        listing->begun = true;
        listing->working = core->nworkers;
        listing->room = ZT_LISTING_MAX;
        listing->missed = 0;
    }
    pthread_mutex_unlock(&core->queue_lock);
    for (int i = 0; i < core->nworkers; i++) {
        if (busy) {
            free(orders[i]);
            continue;
        }
        *orders[i] = (struct zt_msg){.type = ZT_MSG_LIST};
        zt_worker_put(core->workers[i], orders[i]);
    }
    return busy ? -EALREADY : 0;
}

size_t zt_listing_take(struct zt_core *core, struct zt_listed *out, size_t most, bool *over,
                       uint64_t *missed) {
    struct zt_listing *listing = &core->listing;
    struct zt_slice *emptied = NULL;
    size_t n = 0;

    pthread_mutex_lock(&core->queue_lock);
    while (n < most && listing->head) {
        struct zt_slice *s = listing->head;

        while (n < most && s->taken < s->n) out[n++] = s->at[s->taken++];
        if (s->taken < s->n) break;
        listing->head = s->next;
        if (!listing->head) listing->tail = &listing->head;
        s->next = emptied;
        emptied = s;
    }
    *over = !listing->head && !listing->working;
    *missed = listing->missed;
    if (*over) listing->begun = false;
    pthread_mutex_unlock(&core->queue_lock);
    while (emptied) {
        struct zt_slice *s = emptied;

        emptied = s->next;
        free(s);
    }
    return n;
}

void zt_listing_free(struct zt_core *core) {
    while (core->listing.head) {
        struct zt_slice *s = core->listing.head;

        core->listing.head = s->next;
        free(s);
    }
}

/* --- the workers' part -------------------------------------------------------------------------------- */

static void copy(const struct zt_conn *c, struct zt_listed *to) {
    const struct zt_h2 *h = c->stream.h2;

    *to = (struct zt_listed){.number = c->number * ZT_MAX_WORKERS + (uint64_t)c->worker->index,
                             .kind = c->kind,
                             .state = c->state,
                             .pod = c->pod->node.number,
                             .decision = c->decision ? c->decision->node.number : 0,
                             .identity = h ? h->proven : 0,
                             .source = c->source,
                             .destination = c->destination,
                             .upstream = c->upstream,
                             .started_us = c->started,
                             .moved_us = c->moved,
                             .received = c->received,
                             .sent = c->sent};
    if (h) zt_tls_about(h, &to->tls);
}

/* The next connection that is not in this listing yet, marked as one that is; or NULL. What is
 * listed goes to the end of the list, where what is new is too: so the first is the one to look at,
 * whatever ended or was moved since the last turn. */
static struct zt_conn *next_unlisted(struct zt_worker *w) {
    struct zt_conn *c;

    if (zt_list_empty(&w->conns)) return NULL;
    c = ZT_CONTAINER(w->conns.next, struct zt_conn, link);
    if (c->listed == w->listing) return NULL;
    c->listed = w->listing;
    zt_list_move_first(&w->conns, &w->conns);
    return c;
}

/* Without memory for a slice its connections are counted as missed. */
void zt_listing_task(struct zt_worker *w, struct zt_task *t) {
    struct zt_listing *listing = &w->core->listing;
    struct zt_slice *s = malloc(sizeof(*s));
    const struct zt_conn *c = NULL;
    size_t n = 0;

    while (n < ZT_LISTING_SLICE && (c = next_unlisted(w))) {
        if (s) copy(c, &s->at[n]);
        n++;
    }
    pthread_mutex_lock(&w->core->queue_lock);
    if (s) {
        s->next = NULL;
        s->taken = 0;
        s->n = n < listing->room ? n : listing->room;
        listing->room -= s->n;
        listing->missed += n - s->n;
        *listing->tail = s;
        listing->tail = &s->next;
    } else {
        listing->missed += n;
    }
    if (!c) listing->working--;
    pthread_mutex_unlock(&w->core->queue_lock);
    if (c) zt_task_add(w, t);
    zt_core_wake(w->core);
}

void zt_listing_ordered(struct zt_worker *w) {
    w->listing++;
    zt_task_add(w, &w->listing_task);
}
