/* The queues that lead from the workers to the control side. */
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "listing.h"

int zt_queues_init(struct zt_core *core) {
    int rv = zt_map_init(&core->asked);

    if (rv) return rv;
    core->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (core->event_fd < 0) return -errno;
    core->ended = calloc(ZT_EVENTS_MAX, sizeof(*core->ended));
    core->failed = calloc(ZT_FAILURES_MAX, sizeof(*core->failed));
    return core->ended && core->failed ? 0 : -ENOMEM;
}

void zt_queues_free(struct zt_core *core) {
    struct zt_upcall *u = core->upcalls_head;
    struct zt_decision *d = core->freed_head;
    struct zt_map_node *n;

    while (u) {
        struct zt_upcall *next = u->next;

        if (u->cancelled) zt_upcall_free(u); /* the others are in `asked` */
        u = next;
    }
    if (core->asked.buckets) {
        while ((n = zt_map_pop(&core->asked)))
            zt_upcall_free(ZT_CONTAINER(n, struct zt_upcall, node));
    }
    zt_map_destroy(&core->asked);
    while (d) {
        struct zt_decision *next = d->next_freed;

        free(d);
        d = next;
    }
    zt_listing_free(core);
    free(core->ended);
    free(core->failed);
    free(core->lines.text);
    free(core->lines_taken.text);
    if (core->event_fd >= 0) close(core->event_fd);
}

void zt_core_wake(struct zt_core *core) {
    uint64_t one = 1;

    /* A full counter is a wake-up that has not been collected yet: nothing is lost. */
    if (write(core->event_fd, &one, sizeof(one)) < 0) return;
}

void zt_upcall_free(struct zt_upcall *u) {
    for (int i = 0; i < u->nchain; i++) free(u->chain[i].data);
    free(u->reply);
    free(u);
}

/* Sends the answer by the upcall's own message, and forgets the upcall. */
static void reply(struct zt_upcall *u, const struct zt_msg *msg) {
    *u->reply = *msg;
    zt_worker_put(u->worker, u->reply);
    u->reply = NULL;
    zt_upcall_free(u);
}

uint64_t zt_upcall_send(struct zt_core *core, struct zt_upcall *u) {
    uint64_t id;

    u->reply = malloc(sizeof(*u->reply));
    if (!u->reply) {
        zt_upcall_free(u);
        return 0;
    }
    pthread_mutex_lock(&core->queue_lock);
    id = core->next_upcall++;
    if (zt_map_add(&core->asked, &u->node, id) < 0) {
        id = 0;
    } else {
        u->queued = true;
        u->next = NULL;
        *core->upcalls_tail = u;
        core->upcalls_tail = &u->next;
    }
    pthread_mutex_unlock(&core->queue_lock);
    if (id)
        zt_core_wake(core);
    else
        zt_upcall_free(u);
    return id;
}

static struct zt_upcall *take_asked(struct zt_core *core, uint64_t id) {
    struct zt_map_node *n = zt_map_take(&core->asked, id);

    return n ? ZT_CONTAINER(n, struct zt_upcall, node) : NULL;
}

void zt_upcall_cancel(struct zt_core *core, uint64_t id) {
    struct zt_upcall *u;

    pthread_mutex_lock(&core->queue_lock);
    u = take_asked(core, id);
    if (u && u->queued) {
        u->cancelled = true; /* zt_upcall_collect frees it */
        u = NULL;
    }
    pthread_mutex_unlock(&core->queue_lock);
    if (u) zt_upcall_free(u);
}

bool zt_upcall_collect(struct zt_core *core, struct zt_upcall *out) {
    bool found = false;

    pthread_mutex_lock(&core->queue_lock);
    while (core->upcalls_head && !found) {
        struct zt_upcall *u = core->upcalls_head;

        core->upcalls_head = u->next;
        if (!core->upcalls_head) core->upcalls_tail = &core->upcalls_head;
        u->queued = false;
        if (u->cancelled) {
            zt_upcall_free(u);
            continue;
        }
        *out = *u;
        u->nchain = 0; /* the chain has passed on */
        found = true;
    }
    pthread_mutex_unlock(&core->queue_lock);
    return found;
}

int zt_upcall_answer(struct zt_core *core, uint64_t id, uint64_t epoch, uint64_t decision) {
    struct zt_msg msg = {.type = ZT_MSG_ANSWER, .epoch = epoch, .id = id};
    bool current = epoch == atomic_load(&core->epoch);
    struct zt_upcall *u;

    if (current) {
        int rv = zt_decision_find(core, decision, &msg.decision);

        if (rv) return rv;
    }
    pthread_mutex_lock(&core->queue_lock);
    u = take_asked(core, id);
    pthread_mutex_unlock(&core->queue_lock);
    if (!u) {
        zt_decision_put(msg.decision);
        return 1;
    }
    msg.key = u->key;
    reply(u, &msg);
    return current;
}

void zt_upcall_answer_certificate(struct zt_core *core, uint64_t id, uint64_t identity,
                                  enum zt_reason reason) {
    struct zt_msg msg = {
        .type = ZT_MSG_CERTIFICATE, .id = id, .identity = identity, .reason = reason};
    struct zt_upcall *u;

    pthread_mutex_lock(&core->queue_lock);
    u = take_asked(core, id);
    pthread_mutex_unlock(&core->queue_lock);
    if (u) reply(u, &msg);
}

/* The slot to fill, or `size` when the ring is full. */
static size_t ring_put(struct zt_ring *r, size_t size) {
    if (r->head == r->tail) r->first = r->tail;
    return r->tail - r->head == size ? size : (size_t)((r->tail++ - r->first) % size);
}

/* The slot to empty, or `size` when there is none. */
static size_t ring_take(struct zt_ring *r, size_t size) {
    return r->head == r->tail ? size : (size_t)((r->head++ - r->first) % size);
}

static bool add_line(struct zt_core *core, const struct zt_ended *e, const struct zt_line *line) {
    const struct zt_line_values values = {.source = &e->source,
                                          .duration_us = e->duration_us,
                                          .received = e->received,
                                          .sent = e->sent};

    if (!zt_lines_add(&core->lines, line, &values)) core->events_lost++;
    return core->lines.len >= ZT_LINES_BATCH;
}

static bool add_ended(struct zt_core *core, const struct zt_ended *e) {
    struct zt_ring *r = &core->ended_at;
    size_t at = ring_put(r, ZT_EVENTS_MAX);

    if (at == ZT_EVENTS_MAX)
        core->events_lost++;
    else
        core->ended[at] = *e;
    return r->tail - r->head >= ZT_EVENTS_BATCH;
}

bool zt_ended_push(struct zt_core *core, const struct zt_ended *e, const struct zt_line *line) {
    bool full;

    pthread_mutex_lock(&core->queue_lock);
    full = line ? add_line(core, e, line) : add_ended(core, e);
    pthread_mutex_unlock(&core->queue_lock);
    return full;
}

void zt_failed_push(struct zt_core *core, const struct zt_failed *f) {
    size_t at;

    pthread_mutex_lock(&core->queue_lock);
    at = ring_put(&core->failed_at, ZT_FAILURES_MAX);
    if (at == ZT_FAILURES_MAX)
        core->events_lost++;
    else
        core->failed[at] = *f;
    pthread_mutex_unlock(&core->queue_lock);
    zt_core_wake(core);
}

size_t zt_ended_take(struct zt_core *core, struct zt_ended *out, size_t most) {
    size_t n = 0, at;

    pthread_mutex_lock(&core->queue_lock);
    while (n < most && (at = ring_take(&core->ended_at, ZT_EVENTS_MAX)) != ZT_EVENTS_MAX)
        out[n++] = core->ended[at];
    pthread_mutex_unlock(&core->queue_lock);
    return n;
}

size_t zt_failed_take(struct zt_core *core, struct zt_failed *out, size_t most) {
    size_t n = 0, at;

    pthread_mutex_lock(&core->queue_lock);
    while (n < most && (at = ring_take(&core->failed_at, ZT_FAILURES_MAX)) != ZT_FAILURES_MAX)
        out[n++] = core->failed[at];
    pthread_mutex_unlock(&core->queue_lock);
    return n;
}

const struct zt_lines *zt_lines_take(struct zt_core *core) {
    struct zt_lines taken;

    zt_lines_clear(&core->lines_taken);
    pthread_mutex_lock(&core->queue_lock);
    taken = core->lines;
    core->lines = core->lines_taken;
    core->lines_taken = taken;
    pthread_mutex_unlock(&core->queue_lock);
    return &core->lines_taken;
}

size_t zt_freed_take(struct zt_core *core, uint64_t *out, size_t most) {
    size_t n = 0;

    pthread_mutex_lock(&core->queue_lock);
    while (n < most && core->freed_head && core->freed_head->freed_at <= core->ended_at.head) {
        struct zt_decision *d = core->freed_head;

        core->freed_head = d->next_freed;
        if (!core->freed_head) core->freed_tail = &core->freed_head;
        out[n++] = d->node.number;
        free(d);
    }
    pthread_mutex_unlock(&core->queue_lock);
    return n;
}
