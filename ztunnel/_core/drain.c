/*
 * Handing over to a successor: a draining worker accepts nothing, asks its peers to take new
 * streams elsewhere, and serves what it has to the end or to a deadline. And the last of an HBONE
 * connection's life, when only the other side's end is awaited.
 *
 * The successor has the same listening sockets, and both watch them for a while with
 * EPOLLEXCLUSIVE. A connection for which the kernel has woken us alone is nobody else's, even when
 * we stop watching before we look: so the last worker to stop takes what is in the queue.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "conn.h"
#include "h2.h"
#include "limit.h"
#include "worker.h"

/* --- listeners --------------------------------------------------------------------------------------- */

void zt_drain_deaf(struct zt_worker *w, struct zt_pod *pod) {
    if (atomic_fetch_sub_explicit(&pod->hearing, 1, memory_order_acq_rel) == 1) {
        for (int k = 0; k < 3; k++) {
            struct zt_listener *l = &pod->listeners[k];

            zt_worker_accept_last(w, l);
            close(l->io.fd);
            l->io.fd = -1;
        }
    }
    atomic_fetch_sub(&w->core->parting, 1);
}

/* --- what is carried --------------------------------------------------------------------------------- */

static void on_deadline(struct zt_worker *w, struct zt_timer *t) {
    zt_add(&w->stats.expired[t->deadline], zt_get(&w->stats.connections));
    zt_worker_end_all(w, ZT_R_DRAIN_TIMEOUT);
}

void zt_drain_begin(struct zt_worker *w) {
    struct zt_list all;

    w->draining = true;
    w->drain_timer.fire = on_deadline;
    zt_timer_set(w, &w->drain_timer, ZT_D_DRAIN);
    zt_list_take_all(&w->h2s, &all);
    while (!zt_list_empty(&all))
        zt_h2_drain(ZT_CONTAINER(zt_list_move_first(&all, &w->h2s), struct zt_h2, link));
    atomic_fetch_sub(&w->core->parting, 1);
}

/* --- the other side's end ---------------------------------------------------------------------------- */

struct zt_linger {
    struct zt_io io;
    struct zt_list link;
    struct zt_timer timer;
    struct zt_grave grave;
    struct zt_pod *pod;
};

static void bury(struct zt_worker *w, struct zt_grave *g) {
    struct zt_linger *l = ZT_CONTAINER(g, struct zt_linger, grave);

    (void)w;
    zt_pod_put(l->pod);
    free(l);
}

static void end(struct zt_worker *w, struct zt_linger *l) {
    if (l->io.fd < 0) return;
    zt_io_forget(w, l->io.fd);
    close(l->io.fd);
    l->io.fd = -1;
    zt_timer_stop(&l->timer);
    zt_list_remove(&l->link);
    zt_hold(w, l->pod, -1);
    atomic_fetch_sub(&w->lingering, 1);
    zt_bury(w, &l->grave);
}

static void on_event(struct zt_worker *w, struct zt_io *io, uint32_t events) {
    struct zt_linger *l = ZT_CONTAINER(io, struct zt_linger, io);
    size_t budget = 0;
    ssize_t n;

    (void)events;
    if (io->fd < 0) return;
    /* What still comes is of no interest; level-triggered, so that the rest is told again. */
    do {
        n = recv(io->fd, w->in, ZT_CHUNK, 0);
        if (n > 0) budget += (size_t)n;
    } while ((n > 0 && budget < ZT_BUDGET) || (n < 0 && errno == EINTR));
    if (n == 0 || (n < 0 && errno != EAGAIN)) end(w, l);
}

static void on_late(struct zt_worker *w, struct zt_timer *t) {
    end(w, ZT_CONTAINER(t, struct zt_linger, timer));
}

void zt_linger(struct zt_worker *w, struct zt_pod *pod, int fd) {
    struct zt_linger *l = calloc(1, sizeof(*l));
    struct epoll_event ev = {.events = EPOLLIN | EPOLLRDHUP};

    if (!l || shutdown(fd, SHUT_WR) < 0) {
        free(l);
        zt_io_forget(w, fd);
        close(fd);
        return;
    }
    l->io = (struct zt_io){.on_event = on_event, .fd = fd};
    l->timer.fire = on_late;
    l->grave.bury = bury;
    l->pod = zt_pod_get(pod);
    zt_list_init(&l->timer.link);
    zt_list_append(&w->lingers, &l->link);
    atomic_fetch_add(&w->lingering, 1);
    zt_hold(w, pod, 1);
    zt_timer_set(w, &l->timer, ZT_D_GOODBYE);
    /* It is watched already, as the HBONE connection that has just ended. */
    ev.data.ptr = &l->io;
    if (epoll_ctl(w->epfd, EPOLL_CTL_MOD, fd, &ev) < 0) end(w, l);
}

void zt_linger_end(struct zt_worker *w, const struct zt_pod *pod) {
    struct zt_list all;

    zt_list_take_all(&w->lingers, &all);
    while (!zt_list_empty(&all)) {
        struct zt_linger *l =
            ZT_CONTAINER(zt_list_move_first(&all, &w->lingers), struct zt_linger, link);

        if (!pod || l->pod == pod) end(w, l);
    }
}
