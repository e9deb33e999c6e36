#define _GNU_SOURCE
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "conn.h"
#include "h2.h"
#include "limit.h"
#include "listing.h"
#include "pool.h"

#define EVENTS_PER_TURN 256
/* A worker turns at least this often, so that a watchdog can tell idle from stuck. */
#define HEARTBEAT_MS 500

/* --- timers, tasks, graves ------------------------------------------------------------------------- */

void zt_timer_set(struct zt_worker *w, struct zt_timer *t, enum zt_deadline d) {
    zt_timer_stop(t);
    t->since = w->now;
    t->deadline = d;
    zt_list_append(&w->deadlines[d], &t->link);
}

void zt_timer_set_since(struct zt_worker *w, struct zt_timer *t, enum zt_deadline d,
                        uint64_t since) {
    struct zt_list *before = w->deadlines[d].prev;

    zt_timer_stop(t);
    t->since = since;
    t->deadline = d;
    /* The queue is ordered by when the waits began. */
    while (before != &w->deadlines[d] && ZT_CONTAINER(before, struct zt_timer, link)->since > since)
        before = before->prev;
    zt_list_append(before->next, &t->link);
}

void zt_timer_stop(struct zt_timer *t) {
    if (!t->since) return;
    zt_list_remove(&t->link);
    t->since = 0;
}

static uint64_t length_of(const struct zt_worker *w, enum zt_deadline d) {
    return atomic_load_explicit(&w->core->deadline_us[d], memory_order_relaxed);
}

bool zt_timer_over(const struct zt_worker *w, enum zt_deadline d, uint64_t since) {
    return w->now - since >= length_of(w, d);
}

static void fire_timers(struct zt_worker *w) {
    for (int d = 0; d < ZT_DEADLINES; d++) {
        while (!zt_list_empty(&w->deadlines[d])) {
            struct zt_timer *t = ZT_CONTAINER(w->deadlines[d].next, struct zt_timer, link);

            if (!zt_timer_over(w, (enum zt_deadline)d, t->since)) break;
            zt_timer_stop(t);
            t->fire(w, t);
        }
    }
}

void zt_worker_report(struct zt_worker *w, const struct zt_ended *e, const struct zt_line *line) {
    if (zt_ended_push(w->core, e, line))
        w->report_at = w->now;
    else if (!w->report_at)
        w->report_at = w->now + ZT_REPORT_US;
}

void zt_worker_count(struct zt_worker *w, int change) {
    uint64_t open;

    zt_add(&w->stats.connections, (uint64_t)change);
    open = zt_get(&w->stats.connections);
    if (open > w->peak) w->peak = open;
    if (w->peak >= ZT_TRIM_CONNECTIONS && open < w->peak / 2) {
        w->trim_at = w->now + ZT_TRIM_US;
        w->peak = open;
    }
}

void zt_worker_held(struct zt_worker *w) {
    uint64_t held = zt_get(&w->stats.held);

    if (held > w->held_peak) w->held_peak = held;
    if (w->held_peak >= ZT_TRIM_BYTES && held < w->held_peak / 2) {
        w->trim_at = w->now + ZT_TRIM_US;
        w->held_peak = held;
    }
}

/* The C library keeps what is freed between pieces that are in use, for ever. */
static void give_back(struct zt_worker *w) {
    if (!w->trim_at || w->trim_at > w->now) return;
    w->trim_at = 0;
    malloc_trim(0);
}

static void send_reports(struct zt_worker *w) {
    if (!w->report_at || w->report_at > w->now) return;
    w->report_at = 0;
    zt_core_wake(w->core);
}

static int next_timeout_ms(const struct zt_worker *w) {
    uint64_t soonest = w->now + HEARTBEAT_MS * 1000u;

    if (!zt_list_empty(&w->tasks)) return 0;
    if (w->report_at && w->report_at < soonest) soonest = w->report_at;
    if (w->listen_at && w->listen_at < soonest) soonest = w->listen_at;
    for (int d = 0; d < ZT_DEADLINES; d++) {
        if (!zt_list_empty(&w->deadlines[d])) {
            const struct zt_timer *t = ZT_CONTAINER(w->deadlines[d].next, struct zt_timer, link);
            uint64_t at = t->since + length_of(w, (enum zt_deadline)d);

            if (at < soonest) soonest = at;
        }
    }
    return soonest <= w->now ? 0 : (int)((soonest - w->now + 999) / 1000);
}

void zt_task_add(struct zt_worker *w, struct zt_task *t) {
    if (zt_list_empty(&t->link)) zt_list_append(&w->tasks, &t->link);
}

static void run_tasks(struct zt_worker *w) {
    struct zt_list batch;

    /* What is postponed again meanwhile waits for the next turn. */
    zt_list_take_all(&w->tasks, &batch);
    while (!zt_list_empty(&batch)) {
        struct zt_task *t = ZT_CONTAINER(batch.next, struct zt_task, link);

        zt_list_remove(&t->link);
        t->run(w, t);
    }
}

void zt_bury(struct zt_worker *w, struct zt_grave *g) {
    g->next = w->graves;
    w->graves = g;
}

static void bury_all(struct zt_worker *w) {
    while (w->graves) {
        struct zt_grave *g = w->graves;

        w->graves = g->next;
        g->bury(w, g);
    }
}

int zt_io_watch(struct zt_worker *w, struct zt_io *io, uint32_t events) {
    struct epoll_event ev = {.events = events, .data.ptr = io};

    return epoll_ctl(w->epfd, EPOLL_CTL_ADD, io->fd, &ev) < 0 ? -errno : 0;
}

void zt_io_forget(const struct zt_worker *w, int fd) {
    /* ENOENT: it was closed before it could be watched. */
    if (epoll_ctl(w->epfd, EPOLL_CTL_DEL, fd, NULL) < 0) return;
}

/* --- mailbox ------------------------------------------------------------------------------------------ */

static void drop_message(struct zt_msg *m) {
    zt_decision_put(m->decision);
    zt_peer_put(m->peer);
    zt_pod_put(m->pod);
    if (m->type == ZT_MSG_ACCEPTED && m->fd >= 0) close(m->fd);
    free(m);
}

static void wake(struct zt_worker *w) {
    uint64_t one = 1;

    /* A full counter is a wake-up that has not been served yet. */
    if (write(w->wake_fd, &one, sizeof(one)) < 0) return;
}

void zt_worker_put(struct zt_worker *w, struct zt_msg *m) {
    bool first;

    m->next = NULL;
    pthread_mutex_lock(&w->mail_lock);
    first = !w->mail_head;
    *w->mail_tail = m;
    w->mail_tail = &m->next;
    pthread_mutex_unlock(&w->mail_lock);
    if (first) wake(w);
}

int zt_worker_post(struct zt_worker *w, const struct zt_msg *msg) {
    struct zt_msg *m = malloc(sizeof(*m));

    if (!m) {
        atomic_fetch_or(&w->lost, 1u << msg->type);
        wake(w);
        zt_decision_put(msg->decision);
        zt_peer_put(msg->peer);
        zt_pod_put(msg->pod);
        return -ENOMEM;
    }
    *m = *msg;
    zt_worker_put(w, m);
    return 0;
}

static void on_wake(struct zt_worker *w, struct zt_io *io, uint32_t events) {
    uint64_t count;

    (void)events;
    if (read(io->fd, &count, sizeof(count)) > 0) w->woken = true;
}

static void end_where(struct zt_worker *w, const struct zt_msg *m) {
    struct zt_list all;

    zt_list_take_all(&w->conns, &all);
    while (!zt_list_empty(&all)) {
        struct zt_conn *c = ZT_CONTAINER(zt_list_move_first(&all, &w->conns), struct zt_conn, link);

        if ((m->decision && c->decision == m->decision) || (m->pod && zt_conn_uses(c, m->pod)))
            zt_conn_end(c, m->reason);
    }
    zt_list_take_all(&w->h2s, &all);
    while (!zt_list_empty(&all)) {
        struct zt_h2 *h = ZT_CONTAINER(zt_list_move_first(&all, &w->h2s), struct zt_h2, link);

        if ((m->pod && h->pod == m->pod) || (m->peer && h->peer == m->peer) ||
            (m->identity && h->identity == m->identity))
            zt_h2_end(h, m->reason, NULL);
    }
}

/* Orders for which there was no memory. Better one connection too many ended than one too few. */
static void make_up(struct zt_worker *w) {
    unsigned lost = atomic_exchange(&w->lost, 0);
    bool inbound = lost & 1u << ZT_MSG_KILL_IDENTITY, outbound = lost & 1u << ZT_MSG_CLOSE_PEER;
    struct zt_list all;

    if (!lost) return;
    zt_list_take_all(&w->conns, &all);
    while (!zt_list_empty(&all)) {
        struct zt_conn *c = ZT_CONTAINER(zt_list_move_first(&all, &w->conns), struct zt_conn, link);
        int killed = c->decision ? atomic_load(&c->decision->killed) : 0;

        if (killed) zt_conn_end(c, (enum zt_reason)(killed - 1));
    }
    zt_list_take_all(&w->h2s, &all);
    while (!zt_list_empty(&all)) {
        struct zt_h2 *h = ZT_CONTAINER(zt_list_move_first(&all, &w->h2s), struct zt_h2, link);

        if (h->server ? inbound : outbound)
            zt_h2_end(h, ZT_R_NO_MEMORY, "no memory for the order that may have meant it");
    }
    if (lost & 1u << ZT_MSG_RETIRE) zt_pool_retire(w);
    if (lost & 1u << ZT_MSG_STOP) w->stopping = true;
}

static void handle_message(struct zt_worker *w, struct zt_msg *m) {
    switch (m->type) {
    case ZT_MSG_ANSWER:
        zt_table_answer(w, m);
        m->decision = NULL; /* the table has taken it */
        break;
    case ZT_MSG_CERTIFICATE:
        zt_h2_certificate(w, m->id, m->identity, m->reason);
        break;
    case ZT_MSG_KILL_DECISION:
    case ZT_MSG_KILL_IDENTITY:
    case ZT_MSG_CLOSE_PEER:
        end_where(w, m);
        break;
    case ZT_MSG_SUSPECT_PEER:
        zt_pool_suspect(w, m->peer);
        break;
    case ZT_MSG_RETIRE:
        zt_pool_retire(w);
        break;
    case ZT_MSG_LIST:
        zt_listing_ordered(w);
        break;
    case ZT_MSG_POD_GONE:
        m->reason = ZT_R_POD_REMOVED;
        end_where(w, m);
        zt_linger_end(w, m->pod);
        if (w->netns == m->pod) w->netns = NULL;
        break;
    case ZT_MSG_ACCEPTED: {
        struct zt_pod *pod = m->pod;
        int fd = m->fd;

        m->pod = NULL;
        m->fd = -1;
        if (m->kind == ZT_INBOUND_HBONE)
            zt_h2_accepted(w, pod, fd, &m->source, &m->destination);
        else
            zt_conn_accepted(w, pod, m->kind, fd, &m->source, &m->destination);
        break;
    }
    case ZT_MSG_DEAF:
        zt_drain_deaf(w, m->pod);
        break;
    case ZT_MSG_DRAIN:
        zt_drain_begin(w);
        break;
    case ZT_MSG_STOP:
        w->stopping = true;
        break;
    }
}

static void serve_mail(struct zt_worker *w) {
    struct zt_msg *m;

    if (!w->woken) return;
    w->woken = false;
    pthread_mutex_lock(&w->mail_lock);
    m = w->mail_head;
    w->mail_head = NULL;
    w->mail_tail = &w->mail_head;
    pthread_mutex_unlock(&w->mail_lock);
    while (m) {
        struct zt_msg *next = m->next;

        handle_message(w, m);
        drop_message(m);
        m = next;
    }
    make_up(w);
}

/* --- accepting ----------------------------------------------------------------------------------------- */

/* The worker with the fewest connections of this kind, ourselves on a tie. */
static struct zt_worker *least_loaded(struct zt_worker *w, bool tls) {
    struct zt_worker *best = w;
    int least =
        atomic_load_explicit(tls ? &w->load_tls : &w->load_connections, memory_order_relaxed);

    for (int i = 0; i < w->core->nworkers; i++) {
        struct zt_worker *o = w->core->workers[i];
        int load =
            atomic_load_explicit(tls ? &o->load_tls : &o->load_connections, memory_order_relaxed);

        if (load < least) {
            least = load;
            best = o;
        }
    }
    return best;
}

/* A caller whom we cannot serve is told at once, by a reset, and so is the log. */
static void turn_away(struct zt_worker *w, struct zt_listener *l, const struct zt_msg *m,
                      enum zt_reason reason) {
    zt_sock_abort(m->fd);
    zt_count_refusal(l->pod, reason);
    if (l->kind == ZT_INBOUND_HBONE) {
        struct zt_failed f = {.kind = ZT_PEER_CERTIFICATE,
                              .pod = l->pod->node.number,
                              .addr = m->source,
                              .reason = reason};

        zt_add(&w->stats.handshake_failures[reason], 1);
        zt_failed_push(w->core, &f);
    } else {
        struct zt_ended e = {.kind = l->kind,
                             .pod = l->pod->node.number,
                             .source = m->source,
                             .destination = m->destination,
                             .started_us = w->now,
                             .reason = reason};

        zt_worker_report(w, &e, NULL);
    }
}

/* Takes the next caller in; -EAGAIN when there is none. */
static int take(const struct zt_listener *l, struct zt_msg *m) {
    struct sockaddr_storage ss;
    socklen_t len = sizeof(ss);

    m->fd = accept4(l->io.fd, (void *)&ss, &len, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (m->fd < 0) return -errno;
    zt_addr_from_sockaddr(&m->source, &ss);
    len = sizeof(ss);
    if (getsockname(m->fd, (void *)&ss, &len) == 0) zt_addr_from_sockaddr(&m->destination, &ss);
    return 0;
}

/*
 * The kernel gives no socket, and the listener would stay readable for ever. The spare descriptor
 * lets us take the caller in and send it away. Where that fails too (another thread was quicker, the
 * whole machine has none, or no memory) callers wait in the kernel, for a moment.
 */
static void shed(struct zt_worker *w, struct zt_listener *l, int error) {
    struct zt_msg m = {.fd = -1};
    bool memory = error == -ENOMEM || error == -ENOBUFS;

    if (w->spare_fd >= 0) close(w->spare_fd);
    if (take(l, &m) == 0) {
        turn_away(w, l, &m, memory ? ZT_R_NO_MEMORY : ZT_R_NO_DESCRIPTORS);
    } else if (!w->listen_at) {
        w->listen_at = w->now + ZT_ACCEPT_PAUSE_US;
        zt_pods_listen(w->core, w, false);
    }
    w->spare_fd = fcntl(w->wake_fd, F_DUPFD_CLOEXEC, 3);
}

static void listen_again(struct zt_worker *w) {
    if (!w->listen_at || w->listen_at > w->now) return;
    w->listen_at = 0;
    zt_pods_listen(w->core, w, true);
}

static void accept_some(struct zt_worker *w, struct zt_listener *l, int most) {
    for (int i = 0; i < most; i++) {
        struct zt_msg m = {.type = ZT_MSG_ACCEPTED, .kind = l->kind, .pod = l->pod};
        enum zt_reason why;
        _Atomic int *load;
        struct zt_worker *to;
        int rv;

        if (atomic_load(&l->pod->removed)) return;
        rv = take(l, &m);
        if (rv == -EMFILE || rv == -ENFILE || rv == -ENOMEM || rv == -ENOBUFS) shed(w, l, rv);
        if (rv) return;
        zt_add(&w->stats.accepted, 1);
        why = zt_admit(w, l->pod, l->kind == ZT_INBOUND_HBONE ? ZT_USE_HBONE : ZT_USE_CONNECTION);
        if (why) {
            turn_away(w, l, &m, why);
            continue;
        }
        zt_hold(w, m.pod, 1);
        zt_pod_get(m.pod);
        to = least_loaded(w, l->kind == ZT_INBOUND_HBONE);
        load = l->kind == ZT_INBOUND_HBONE ? &to->load_tls : &to->load_connections;
        atomic_fetch_add(load, 1);
        if (to != w) {
            if (zt_worker_post(to, &m) == 0) continue;
            /* No memory for the message: we keep it, and the reference anew. */
            atomic_fetch_sub(load, 1);
            load = l->kind == ZT_INBOUND_HBONE ? &w->load_tls : &w->load_connections;
            atomic_fetch_add(load, 1);
            zt_pod_get(m.pod);
        }
        if (l->kind == ZT_INBOUND_HBONE) {
            zt_h2_accepted(w, m.pod, m.fd, &m.source, &m.destination);
        } else {
            zt_conn_accepted(w, m.pod, l->kind, m.fd, &m.source, &m.destination);
        }
    }
}

void zt_worker_accept(struct zt_worker *w, struct zt_io *io, uint32_t events) {
    (void)events;
    accept_some(w, ZT_CONTAINER(io, struct zt_listener, io), ZT_ACCEPT_BATCH);
}

void zt_worker_accept_last(struct zt_worker *w, struct zt_listener *l) {
    accept_some(w, l, ZT_ACCEPT_LAST);
}

/* --- counters ---------------------------------------------------------------------------------- */

static void add_counts(zt_count *to, const zt_count *from, size_t n) {
    for (size_t i = 0; i < n; i++) zt_add(&to[i], zt_get(&from[i]));
}

static void add_histogram(struct zt_histogram *to, const struct zt_histogram *from) {
    add_counts(to->bucket, from->bucket, ZT_BUCKETS + 1);
    zt_add(&to->sum_us, zt_get(&from->sum_us));
}

void zt_stats_sum(const struct zt_core *core, struct zt_worker_stats *out) {
    memset(out, 0, sizeof(*out));
    for (int i = 0; i < core->nworkers; i++) {
        const struct zt_worker_stats *w = &core->workers[i]->stats;

        add_counts(&out->connections, &w->connections, 1);
        add_counts(&out->tls_connections, &w->tls_connections, 1);
        add_counts(&out->descriptors, &w->descriptors, 1);
        add_counts(&out->held, &w->held, 1);
        add_counts(&out->upcalls, &w->upcalls, 1);
        add_counts(&out->table_hits, &w->table_hits, 1);
        add_counts(&out->traces_left_out, &w->traces_left_out, 1);
        add_counts(out->handshake_failures, w->handshake_failures, ZT_REASON_COUNT);
        add_counts(out->expired, w->expired, ZT_DEADLINES);
        add_histogram(&out->handshakes_client, &w->handshakes_client);
        add_histogram(&out->handshakes_server, &w->handshakes_server);
        add_histogram(&out->upcall_latency, &w->upcall_latency);
    }
}

/* --- the loop -------------------------------------------------------------------------------------------- */

void zt_worker_end_all(struct zt_worker *w, enum zt_reason reason) {
    while (!zt_list_empty(&w->conns))
        zt_conn_end(ZT_CONTAINER(w->conns.next, struct zt_conn, link), reason);
    while (!zt_list_empty(&w->h2s))
        zt_h2_end(ZT_CONTAINER(w->h2s.next, struct zt_h2, link), reason, NULL);
    zt_linger_end(w, NULL);
}

static void end_everything(struct zt_worker *w) {
    zt_worker_end_all(w, ZT_R_SHUTDOWN);
    zt_table_clear(w);
    zt_relay_drop_pool(w);
    bury_all(w);
}

/*
 * Looks for events for a moment instead of sleeping: the next message of a conversation is near. The
 * processor is offered to others in every round. What moves in masses, or comes from many at once,
 * is as well taken a little later and in larger pieces, and then a sleeping worker costs nothing.
 */
static int look(struct zt_worker *w, struct epoll_event *events) {
    uint64_t until = zt_now_us() + ZT_SPIN_US;
    int n;

    do {
        sched_yield();
        n = epoll_wait(w->epfd, events, EVENTS_PER_TURN, 0);
    } while (n == 0 && zt_now_us() < until);
    w->vain = n ? 0 : w->vain + 1;
    if (w->vain >= ZT_SPIN_VAIN) w->pause = ZT_SPIN_PAUSE;
    return n;
}

static int next_events(struct zt_worker *w, struct epoll_event *events, bool conversing) {
    int timeout = next_timeout_ms(w), n = 0;

    if (w->moved >= ZT_SPIN_BULK) w->pause = ZT_SPIN_PAUSE;
    if (w->pause)
        w->pause--;
    else if (conversing && timeout)
        n = look(w, events);
    return n ? n : epoll_wait(w->epfd, events, EVENTS_PER_TURN, timeout);
}

static void *loop(void *arg) {
    struct zt_worker *w = arg;
    struct epoll_event events[EVENTS_PER_TURN];
    int n = 0;

    while (!w->stopping) {
        n = next_events(w, events, n == 1 && w->moved <= ZT_SPIN_BYTES);
        w->moved = 0;
        w->now = zt_now_us();
        atomic_store_explicit(&w->stats.last_loop_us, w->now, memory_order_relaxed);
        for (int i = 0; i < n; i++) {
            struct zt_io *io = events[i].data.ptr;

            io->on_event(w, io, events[i].events);
        }
        serve_mail(w);
        run_tasks(w);
        fire_timers(w);
        zt_table_expire(w);
        zt_h2_flush_dirty(w);
        bury_all(w);
        listen_again(w);
        send_reports(w);
        give_back(w);
    }
    end_everything(w);
    zt_core_wake(w->core);
    return NULL;
}

int zt_worker_new(struct zt_worker **out, struct zt_core *core, int index) {
    struct zt_worker *w = calloc(1, sizeof(*w));
    struct epoll_event ev = {.events = EPOLLIN};
    int rv;

    if (!w) return -ENOMEM;
    w->core = core;
    w->index = index;
    w->epfd = w->wake_fd = w->spare_fd = -1;
    w->mail_tail = &w->mail_head;
    w->now = zt_now_us();
    pthread_mutex_init(&w->mail_lock, NULL);
    zt_list_init(&w->conns);
    zt_list_init(&w->h2s);
    zt_list_init(&w->dirty);
    zt_list_init(&w->tasks);
    zt_list_init(&w->listing_task.link);
    w->listing_task.run = zt_listing_task;
    zt_list_init(&w->lingers);
    zt_list_init(&w->drain_timer.link);
    for (int d = 0; d < ZT_DEADLINES; d++) zt_list_init(&w->deadlines[d]);
    *out = w; /* from here on zt_worker_free undoes it */
    core->workers[index] = w;
    w->in = malloc(ZT_WIRE);
    w->plain = malloc(ZT_CHUNK);
    w->out = malloc(ZT_CHUNK);
    rv = w->in && w->plain && w->out ? zt_table_init(&w->table) : -ENOMEM;
    if (!rv) {
        w->epfd = epoll_create1(EPOLL_CLOEXEC);
        w->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        w->spare_fd = fcntl(w->wake_fd, F_DUPFD_CLOEXEC, 3);
        if (w->epfd < 0 || w->wake_fd < 0 || w->spare_fd < 0) rv = -errno;
    }
    if (!rv) {
        w->wake = (struct zt_io){.on_event = on_wake, .fd = w->wake_fd};
        ev.data.ptr = &w->wake;
        if (epoll_ctl(w->epfd, EPOLL_CTL_ADD, w->wake_fd, &ev) < 0) rv = -errno;
    }
    if (rv) {
        core->workers[index] = NULL;
        zt_worker_free(w);
    }
    return rv;
}

int zt_worker_start(struct zt_worker *w) {
    sigset_t all, old;
    char name[16];
    int rv;

    /* Signals belong to Python's main thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    rv = pthread_create(&w->thread, NULL, loop, w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (rv) return -rv;
    snprintf(name, sizeof(name), "worker-%d", w->index);
    pthread_setname_np(w->thread, name);
    return 0;
}

void zt_worker_join(struct zt_worker *w) {
    pthread_join(w->thread, NULL);
}

void zt_worker_free(struct zt_worker *w) {
    if (!w) return;
    while (w->mail_head) {
        struct zt_msg *m = w->mail_head;

        w->mail_head = m->next;
        drop_message(m);
    }
    if (w->table.buckets) {
        zt_table_clear(w);
        free(w->table.buckets);
    }
    free(w->in);
    free(w->plain);
    free(w->out);
    if (w->epfd >= 0) close(w->epfd);
    if (w->wake_fd >= 0) close(w->wake_fd);
    if (w->spare_fd >= 0) close(w->spare_fd);
    pthread_mutex_destroy(&w->mail_lock);
    free(w);
}
