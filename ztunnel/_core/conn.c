#include "conn.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <unistd.h>

#include "h2.h"
#include "limit.h"
#include "pool.h"

/* Registered once, for the socket's whole life. */
#define LEG_EVENTS (EPOLLIN | EPOLLPRI | EPOLLOUT | EPOLLRDHUP | EPOLLET)

static void on_client(struct zt_worker *w, struct zt_io *io, uint32_t events);
static void on_server(struct zt_worker *w, struct zt_io *io, uint32_t events);
static void on_deadline(struct zt_worker *w, struct zt_timer *t);
static void on_task(struct zt_worker *w, struct zt_task *t);

/* --- birth and burial --------------------------------------------------------------------------------- */

static void bury(struct zt_worker *w, struct zt_grave *g) {
    struct zt_conn *c = ZT_CONTAINER(g, struct zt_conn, grave);

    (void)w;
    zt_stream_free_pending(c);
    free(c->trace);
    zt_decision_put(c->decision);
    zt_pod_put(c->pod);
    free(c);
}

static struct zt_conn *conn_new(struct zt_worker *w, struct zt_pod *pod, enum zt_kind kind) {
    struct zt_conn *c = calloc(1, sizeof(*c));

    if (!c) return NULL;
    c->worker = w;
    c->pod = pod;
    c->kind = kind;
    c->started = w->now;
    c->number = ++w->born;
    c->listed = w->listing; /* a listing under way is of what was there before */
    c->client.io = (struct zt_io){.on_event = on_client, .fd = -1};
    c->server.io = (struct zt_io){.on_event = on_server, .fd = -1};
    c->timer.fire = on_deadline;
    c->task.run = on_task;
    c->grave.bury = bury;
    c->up.pipe = c->down.pipe = (struct zt_pipe){-1, -1};
    zt_list_init(&c->wait);
    zt_list_init(&c->timer.link);
    zt_list_init(&c->task.link);
    zt_list_init(&c->stream.link);
    c->stream.window = ZT_STREAM_WINDOW;
    c->stream.taken_at = w->now;
    zt_list_append(&w->conns, &c->link);
    zt_worker_count(w, 1);
    atomic_fetch_add_explicit(&pod->connections, 1, memory_order_relaxed);
    return c;
}

static bool pod_has(const struct zt_pod *pod, const struct zt_addr *a) {
    for (int i = 0; i < pod->naddrs; i++) {
        if (zt_addr_ip_equal(&pod->addrs[i], a)) return true;
    }
    return false;
}

/* Asks the table; the reason of a failure is the connection's end. */
static void decide(struct zt_conn *c) {
    struct zt_key key;
    int rv;

    memset(&key, 0, sizeof(key));
    key.pod = c->pod->node.number;
    key.kind = (uint8_t)c->kind;
    key.identity = c->identity;
    if (c->kind != ZT_OUTBOUND) memcpy(key.source, c->source.ip, sizeof(key.source));
    memcpy(key.destination, c->destination.ip, sizeof(key.destination));
    key.port = c->destination.port;
    rv = zt_table_decide(c->worker, c, &key);
    if (rv) zt_conn_end(c, rv == -EBUSY ? ZT_R_POD_QUESTIONS : ZT_R_NO_MEMORY);
}

void zt_conn_accepted(struct zt_worker *w, struct zt_pod *pod, enum zt_kind kind, int fd,
                      const struct zt_addr *source, const struct zt_addr *destination) {
    struct zt_conn *c = conn_new(w, pod, kind);

    if (!c) {
        struct zt_ended e = {.kind = kind,
                             .pod = pod->node.number,
                             .source = *source,
                             .destination = *destination,
                             .started_us = w->now,
                             .reason = ZT_R_NO_MEMORY};

        zt_sock_abort(fd);
        zt_worker_report(w, &e, NULL);
        zt_hold(w, pod, -1);
        zt_pod_put(pod);
        atomic_fetch_sub(&w->load_connections, 1);
        return;
    }
    c->client.io.fd = fd;
    c->source = *source;
    c->destination = *destination;
    c->trace = zt_trace_begin(w);
    if (atomic_load(&pod->removed)) {
        zt_conn_end(c, ZT_R_POD_REMOVED);
    } else if (zt_io_watch(w, &c->client.io, LEG_EVENTS) < 0) {
        zt_conn_end(c, ZT_R_NO_MEMORY);
    } else if (pod_has(pod, destination) != (kind != ZT_OUTBOUND)) {
        /* Captured traffic has a foreign destination on its way out and the pod's own on its way
         * in; anything else called our listener by its own address or by loopback. */
        zt_conn_end(c, ZT_R_SELF_CALL);
    } else if (kind == ZT_OUTBOUND && !pod_has(pod, source)) {
        zt_conn_end(c, ZT_R_FOREIGN_SOURCE);
    } else {
        decide(c);
    }
}

struct zt_conn *zt_conn_requested(struct zt_worker *w, struct zt_h2 *h, int32_t stream_id) {
    struct zt_conn *c = conn_new(w, zt_pod_get(h->pod), ZT_INBOUND_HBONE);

    if (!c) {
        zt_pod_put(h->pod);
        return NULL;
    }
    atomic_fetch_add(&w->load_connections, 1);
    c->identity = h->identity;
    c->source = h->address;
    c->destination = h->local;
    c->stream.h2 = h;
    c->stream.id = stream_id;
    zt_list_append(&h->streams, &c->stream.link);
    h->nstreams++;
    zt_timer_set(w, &c->timer, ZT_D_REQUEST);
    return c;
}

void zt_conn_judge(struct zt_conn *c) {
    const struct zt_h2 *h = c->stream.h2;

    zt_timer_stop(&c->timer);
    if (c->stream.traced == ZT_TRACED_UNSAID) c->trace = zt_trace_begin(c->worker);
    if (!c->stream.is_connect || !c->stream.has_authority)
        zt_conn_end(c, ZT_R_BAD_REQUEST);
    else if (!zt_addr_ip_equal(&c->destination, &h->local))
        zt_conn_end(c, ZT_R_AUTHORITY_MISMATCH);
    else if (zt_beyond(c->worker->core, ZT_L_CONNECTIONS, atomic_load(&c->pod->connections)))
        zt_conn_end(c, ZT_R_POD_CONNECTIONS);
    else
        decide(c);
}

/* --- carrying out a decision ------------------------------------------------------------------------------ */

static struct zt_decision *choose(struct zt_decision *d) {
    uint64_t at;

    if (d->action != ZT_BALANCE) return d;
    if (getrandom(&at, sizeof(at), 0) != (ssize_t)sizeof(at)) at = zt_now_us();
    at %= d->total_weight;
    for (size_t i = 0; i < d->nchoices; i++) {
        if (at < d->choices[i].weight) return d->choices[i].decision;
        at -= d->choices[i].weight;
    }
    return d->choices[0].decision;
}

enum zt_reason zt_reason_of_connect(int error) {
    switch (error) {
    case ECONNREFUSED:
    case ECONNRESET:
        return ZT_R_CONNECT_REFUSED;
    case ETIMEDOUT:
        return ZT_R_CONNECT_TIMEOUT;
    case EADDRNOTAVAIL:
    case EADDRINUSE:
        return ZT_R_NO_PORTS;
    case EMFILE:
    case ENFILE:
        return ZT_R_NO_DESCRIPTORS;
    case ENOMEM:
    case ENOBUFS:
        return ZT_R_NO_MEMORY;
    default:
        return ZT_R_CONNECT_UNREACHABLE;
    }
}

enum zt_reason zt_reason_of_leg(const struct zt_conn *c, const struct zt_leg *leg, int error) {
    bool reset = error == 0 || error == ECONNRESET || error == EPIPE || error == ENOTCONN;

    if (leg == &c->client) return reset ? ZT_R_CLIENT_RESET : ZT_R_CLIENT_LOST;
    return reset ? ZT_R_SERVER_RESET : ZT_R_SERVER_LOST;
}

/* The client's address towards `to`: where a service's family is not its endpoint's, the client
 * is known there by its address of the other family. */
static const struct zt_addr *client_towards(const struct zt_conn *c, const struct zt_addr *to) {
    if (zt_addr_is_v4(&c->source) == zt_addr_is_v4(to)) return &c->source;
    for (int i = 0; i < c->pod->naddrs; i++) {
        if (zt_addr_is_v4(&c->pod->addrs[i]) == zt_addr_is_v4(to)) return &c->pod->addrs[i];
    }
    return &c->source;
}

static int dial_socket(struct zt_conn *c) {
    const struct zt_decision *d = c->decision;

    c->upstream = d->addr.port ? d->addr : c->destination;
    switch (d->action) {
    case ZT_FORWARD:
        return zt_sock_forward(c->worker, c->pod, &c->source, &c->upstream);
    case ZT_HAND_OVER:
        return zt_sock_deliver(c->worker, d->pod, client_towards(c, &c->upstream), &c->upstream);
    default:
        return zt_sock_deliver(c->worker, c->pod, &c->source, &c->upstream);
    }
}

static void dial(struct zt_conn *c) {
    struct zt_worker *w = c->worker;
    enum zt_reason why = zt_admit(w, c->pod, ZT_USE_DIAL);
    int fd;

    if (why) {
        zt_conn_end(c, why);
        return;
    }
    /* Who is removed after this is seen here: the word of it comes to this thread. */
    if (c->decision->pod && atomic_load(&c->decision->pod->removed)) {
        zt_conn_end(c, ZT_R_POD_REMOVED);
        return;
    }
    fd = dial_socket(c);
    if (fd < 0) {
        zt_conn_end(c, zt_reason_of_connect(-fd));
        return;
    }
    c->server.io.fd = fd;
    c->state = ZT_C_CONNECTING;
    zt_hold(w, c->pod, 1);
    c->dials = true;
    atomic_fetch_add_explicit(&c->pod->dials, 1, memory_order_relaxed);
    zt_timer_set(w, &c->timer, ZT_D_CONNECT);
    if (zt_io_watch(w, &c->server.io, LEG_EVENTS) < 0) zt_conn_end(c, ZT_R_NO_MEMORY);
}

void zt_conn_decided(struct zt_conn *c, struct zt_decision *d) {
    int killed;

    if (c->state != ZT_C_DECIDING) return;
    d = choose(d);
    c->decision = zt_decision_get(d);
    killed = atomic_load(&d->killed);
    if (killed) {
        zt_conn_end(c, (enum zt_reason)(killed - 1));
        return;
    }
    switch (d->action) {
    case ZT_REFUSE:
        zt_conn_end(c, d->reason);
        break;
    case ZT_FORWARD:
    case ZT_DELIVER:
    case ZT_HAND_OVER:
        dial(c);
        break;
    case ZT_TUNNEL:
        /* A peer is reached from its pod's namespace, by its pod's identity: nobody else's. */
        if (d->peer->pod == c->pod)
            zt_pool_want(c, d->peer);
        else
            zt_conn_end(c, ZT_R_INTERNAL);
        break;
    case ZT_BALANCE:
        zt_conn_end(c, ZT_R_INTERNAL);
        break;
    }
}

static void dialled(struct zt_conn *c) {
    if (c->dials) atomic_fetch_sub_explicit(&c->pod->dials, 1, memory_order_relaxed);
    c->dials = false;
}

void zt_conn_open(struct zt_conn *c) {
    c->state = ZT_C_OPEN;
    dialled(c);
    zt_timer_stop(&c->timer);
    if (c->trace) c->trace->opened_us = c->worker->now;
    zt_add(&c->decision->series->by_worker[c->worker->index].opened, 1);
    if (c->decision->mirror) zt_add(&c->decision->mirror->by_worker[c->worker->index].opened, 1);
    if (c->kind == ZT_INBOUND_HBONE) zt_stream_answer(c, 200);
    if (c->state != ZT_C_OPEN) return;
    if (c->client.ended || c->server.ended) zt_conn_half_closed(c);
    if (c->stream.h2) {
        zt_stream_resume(c);
        zt_stream_deliver(c);
    } else {
        zt_relay_run(c);
    }
}

/* --- events ----------------------------------------------------------------------------------------------- */

void zt_leg_events(struct zt_leg *leg, uint32_t events) {
    if (events & (EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) leg->readable = true;
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) leg->writable = true;
    if (events & (EPOLLRDHUP | EPOLLHUP)) leg->ended = true;
    /* A read ends short in front of urgent data, whatever is behind it (tcp(7)). */
    if (events & (EPOLLPRI | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) leg->drain = true;
}

struct zt_leg *zt_conn_leg(struct zt_conn *c) {
    return c->kind == ZT_OUTBOUND ? &c->client : &c->server;
}

static void flow(struct zt_conn *c, struct zt_leg *leg) {
    /* An end behind data that nobody takes is not read, and counts all the same. */
    if (leg->ended) zt_conn_half_closed(c);
    if (c->client.io.fd >= 0 && c->server.io.fd >= 0) {
        zt_relay_run(c);
        return;
    }
    if (leg->writable) zt_stream_deliver(c);
    if (c->state == ZT_C_OPEN && leg->readable) zt_stream_resume(c);
}

static void on_client(struct zt_worker *w, struct zt_io *io, uint32_t events) {
    struct zt_conn *c = ZT_CONTAINER(io, struct zt_conn, client.io);

    (void)w;
    if (c->state == ZT_C_ENDED) return;
    zt_leg_events(&c->client, events);
    if (events & EPOLLERR)
        zt_conn_end(c, zt_reason_of_leg(c, &c->client, zt_sock_error(io->fd)));
    else if (c->state == ZT_C_OPEN)
        flow(c, &c->client);
    else if (events & EPOLLHUP)
        zt_conn_end(c, ZT_R_CLIENT_RESET);
}

static void on_server(struct zt_worker *w, struct zt_io *io, uint32_t events) {
    struct zt_conn *c = ZT_CONTAINER(io, struct zt_conn, server.io);

    (void)w;
    if (c->state == ZT_C_ENDED) return;
    zt_leg_events(&c->server, events);
    if (c->state == ZT_C_CONNECTING) {
        int error = zt_sock_error(io->fd);

        if (error)
            zt_conn_end(c, zt_reason_of_connect(error));
        else if (events & EPOLLOUT)
            zt_conn_open(c);
    } else if (events & EPOLLERR) {
        zt_conn_end(c, zt_reason_of_leg(c, &c->server, zt_sock_error(io->fd)));
    } else if (c->state == ZT_C_OPEN) {
        flow(c, &c->server);
    }
}

static void on_deadline(struct zt_worker *w, struct zt_timer *t) {
    struct zt_conn *c = ZT_CONTAINER(t, struct zt_conn, timer);

    if (t->deadline == ZT_D_HALF_CLOSED && !zt_timer_over(w, t->deadline, c->moved)) {
        zt_timer_set_since(w, t, t->deadline, c->moved);
        return;
    }
    zt_add(&w->stats.expired[t->deadline], 1);
    switch (t->deadline) {
    case ZT_D_REQUEST:
        /* RFC 9113, 6.10: in the middle of a header block, nothing else may follow. */
        zt_h2_end(c->stream.h2, ZT_R_REQUEST_TIMEOUT, "CONNECT did not become complete");
        break;
    case ZT_D_STREAM:
        zt_conn_end(c, ZT_R_STREAM_TIMEOUT);
        break;
    case ZT_D_ANSWER:
        zt_conn_end(c, ZT_R_ANSWER_TIMEOUT);
        break;
    case ZT_D_HALF_CLOSED:
        zt_conn_end(c, ZT_R_HALF_CLOSED_TIMEOUT);
        break;
    default:
        zt_conn_end(c, ZT_R_CONNECT_TIMEOUT);
    }
}

void zt_conn_half_closed(struct zt_conn *c) {
    if (c->state != ZT_C_OPEN || c->timer.since) return;
    c->moved = c->worker->now;
    zt_timer_set(c->worker, &c->timer, ZT_D_HALF_CLOSED);
}

static void on_task(struct zt_worker *w, struct zt_task *t) {
    struct zt_conn *c = ZT_CONTAINER(t, struct zt_conn, task);

    (void)w;
    if (c->state == ZT_C_OPEN) zt_relay_run(c);
}

/* --- the end ----------------------------------------------------------------------------------------------- */

static void count(struct zt_series *series, int worker, uint64_t received, uint64_t sent) {
    zt_add(&series->by_worker[worker].received, received);
    zt_add(&series->by_worker[worker].sent, sent);
}

void zt_conn_count(struct zt_conn *c, uint64_t received, uint64_t sent) {
    const struct zt_decision *d = c->decision;

    c->moved = c->worker->now;
    c->worker->moved += received + sent;
    c->received += received;
    c->sent += sent;
    count(d->series, c->worker->index, received, sent);
    if (d->mirror) count(d->mirror, c->worker->index, received, sent);
}

bool zt_conn_uses(const struct zt_conn *c, const struct zt_pod *pod) {
    return c->pod == pod || (c->decision && c->decision->pod == pod);
}

static void count_end(struct zt_series *series, int worker, bool opened, enum zt_reason reason) {
    struct zt_series_counters *s;

    if (!series) return;
    s = &series->by_worker[worker];
    zt_add(opened ? &s->closed : &s->failed[reason], 1);
}

/* RFC 9110, 15 and what the field's node proxy answers (docs/architecture.md, HBONE). */
static int status_of(enum zt_reason reason) {
    switch (reason) {
    case ZT_R_BAD_REQUEST:
    case ZT_R_AUTHORITY_MISMATCH:
        return 400;
    case ZT_R_STRICT_PLAINTEXT:
    case ZT_R_POLICY_DENIED:
    case ZT_R_POLICY_MISSING:
    case ZT_R_POLICY_CHANGED:
    case ZT_R_TRUST_WITHDRAWN:
        return 401;
    default:
        return 503;
    }
}

/* RFC 9113, 8.5: an error of the TCP connection is CONNECT_ERROR. */
static uint32_t error_code_of(enum zt_reason reason) {
    if (reason == ZT_R_CLOSED) return NGHTTP2_NO_ERROR;
    switch (reason) {
    case ZT_R_CLIENT_RESET:
    case ZT_R_SERVER_RESET:
    case ZT_R_CLIENT_LOST:
    case ZT_R_SERVER_LOST:
        return NGHTTP2_CONNECT_ERROR;
    default:
        return NGHTTP2_CANCEL;
    }
}

static void close_leg(struct zt_conn *c, struct zt_leg *leg, bool clean) {
    if (leg->io.fd < 0) return;
    zt_hold(c->worker, c->pod, -1);
    zt_io_forget(c->worker, leg->io.fd);
    if (clean)
        zt_sock_close(leg->io.fd);
    else
        zt_sock_abort(leg->io.fd);
    leg->io.fd = -1;
}

void zt_conn_end(struct zt_conn *c, enum zt_reason reason) {
    struct zt_worker *w = c->worker;
    bool opened = c->state == ZT_C_OPEN;
    struct zt_ended e = {.kind = c->kind,
                         .pod = c->pod->node.number,
                         .decision = c->decision ? c->decision->node.number : 0,
                         .identity = c->identity,
                         .source = c->source,
                         .destination = c->destination,
                         .upstream = c->upstream,
                         .started_us = c->started,
                         .duration_us = w->now - c->started,
                         .received = c->received,
                         .sent = c->sent,
                         .reason = reason};

    const struct zt_line *line = NULL;

    if (c->state == ZT_C_ENDED) return;
    c->state = ZT_C_ENDED;
    /* What is traced is told by itself: its line has an id that no form has a place for. */
    if (c->trace) {
        e.traced = true;
        e.trace = *c->trace;
    } else if (reason == ZT_R_CLOSED && c->decision) {
        line = c->decision->line;
    }
    zt_list_remove(&c->wait);
    zt_list_remove(&c->task.link);
    zt_timer_stop(&c->timer);
    if (c->stream.h2) {
        if (c->kind == ZT_INBOUND_HBONE && !c->stream.answered)
            zt_stream_answer(c, status_of(reason));
        else
            zt_stream_drop(c, error_code_of(reason));
    }
    close_leg(c, &c->client, reason == ZT_R_CLOSED);
    close_leg(c, &c->server, reason == ZT_R_CLOSED);
    zt_relay_release(c);
    if (c->decision) {
        count_end(c->decision->series, w->index, opened, reason);
        count_end(c->decision->mirror, w->index, opened, reason);
    }
    zt_worker_report(w, &e, line);
    zt_count_refusal(c->pod, reason);
    dialled(c);
    atomic_fetch_sub_explicit(&c->pod->connections, 1, memory_order_relaxed);
    atomic_fetch_sub(&w->load_connections, 1);
    zt_worker_count(w, -1);
    zt_list_remove(&c->link);
    zt_bury(w, &c->grave);
}
