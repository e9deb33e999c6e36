#include "pool.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "limit.h"

#define H2_EVENTS (EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET)

static void on_event(struct zt_worker *w, struct zt_io *io, uint32_t events);
static void on_timer(struct zt_worker *w, struct zt_timer *t);
static void on_task(struct zt_worker *w, struct zt_task *t);
static void handshake(struct zt_h2 *h);
static void receive(struct zt_h2 *h);

/* --- birth, burial ------------------------------------------------------------------------------------ */

static void bury(struct zt_worker *w, struct zt_grave *g) {
    struct zt_h2 *h = ZT_CONTAINER(g, struct zt_h2, grave);

    (void)w;
    zt_pod_put(h->pod);
    zt_peer_put(h->peer);
    zt_credential_put(h->credential);
    free(h->early);
    free(h->complaint);
    free(h);
}

static struct zt_h2 *h2_new(struct zt_worker *w, struct zt_pod *pod, struct zt_credential *cred) {
    struct zt_h2 *h = calloc(1, sizeof(*h));

    if (!h) return NULL;
    h->worker = w;
    h->pod = zt_pod_get(pod);
    h->credential = cred;
    atomic_fetch_add(&cred->refs, 1);
    h->io = (struct zt_io){.on_event = on_event, .fd = -1};
    h->timer.fire = on_timer;
    h->task.run = on_task;
    h->grave.bury = bury;
    h->started = h->heard = w->now;
    zt_list_init(&h->pool_link);
    zt_list_init(&h->dirty);
    zt_list_init(&h->timer.link);
    zt_list_init(&h->task.link);
    zt_list_init(&h->streams);
    zt_list_append(&w->h2s, &h->link);
    zt_add(&w->stats.tls_connections, 1);
    zt_timer_set(w, &h->timer, ZT_D_CREDENTIAL);
    return h;
}

/* --- the end ---------------------------------------------------------------------------------------------- */

/* Ends that deserve a line of their own, for no stream may be there to tell of them. */
static bool worth_telling(enum zt_h2_state was, enum zt_reason reason) {
    if (was < ZT_H_OPEN) return true;
    switch (reason) {
    case ZT_R_CLOSED:
    case ZT_R_IDLE:
    case ZT_R_PEER_LOST:
    case ZT_R_TLS_TRUNCATED:
    case ZT_R_SHUTDOWN:
    case ZT_R_POD_REMOVED:
    case ZT_R_DRAIN_TIMEOUT:
        return false;
    default:
        return true;
    }
}

static void report_failure(struct zt_h2 *h, enum zt_reason reason, const char *detail) {
    struct zt_failed f = {.kind = h->server ? ZT_PEER_CERTIFICATE : ZT_SERVER_CERTIFICATE,
                          .pod = h->pod->node.number,
                          .peer = h->peer ? h->peer->node.number : 0,
                          .addr = h->address,
                          .reason = reason};

    if (!detail) detail = h->why ? h->why : h->complaint;
    snprintf(f.detail, sizeof(f.detail), "%s", detail ? detail : "");
    zt_add(&h->worker->stats.handshake_failures[reason], 1);
    zt_count_refusal(h->pod, reason);
    zt_failed_push(h->worker->core, &f);
}

static void say_goodbye(struct zt_h2 *h, enum zt_reason reason) {
    if (reason == ZT_R_PEER_LOST || reason == ZT_R_TLS_TRUNCATED) return;
    if (zt_tls_drain(h) != 1) return;
    if (h->session) {
        h->worker->out_used = 0;
        h->in_session = true;
        nghttp2_session_terminate_session(
            h->session, reason == ZT_R_H2_LIMIT ? NGHTTP2_ENHANCE_YOUR_CALM : NGHTTP2_NO_ERROR);
        nghttp2_session_send(h->session);
        h->in_session = false;
        if (zt_tls_write(h, h->worker->out, h->worker->out_used) < 0) return;
    }
    zt_tls_close_notify(h);
}

static void dialled(struct zt_h2 *h) {
    if (h->dials) atomic_fetch_sub_explicit(&h->pod->dials, 1, memory_order_relaxed);
    h->dials = false;
}

void zt_h2_end(struct zt_h2 *h, enum zt_reason reason, const char *detail) {
    struct zt_worker *w = h->worker;
    enum zt_h2_state was = h->state;

    if (was == ZT_H_ENDED) return;
    if (h->in_session) {
        if (!h->fate) h->fate = reason;
        zt_h2_mark_dirty(h); /* what the detail says, its reason says */
        return;
    }
    h->state = ZT_H_ENDED;
    while (!zt_list_empty(&h->streams)) {
        struct zt_conn *c = ZT_CONTAINER(h->streams.next, struct zt_conn, stream.link);

        zt_list_remove(&c->stream.link);
        nghttp2_session_set_stream_user_data(h->session, c->stream.id, NULL);
        c->stream.h2 = NULL;
        if (!zt_pool_worth_another(h, c, reason) || !zt_pool_again(c, h->peer))
            zt_conn_end(c, reason);
    }
    h->nstreams = 0;
    if (was == ZT_H_OPEN) say_goodbye(h, reason);
    zt_list_remove(&h->pool_link);
    zt_list_remove(&h->dirty);
    zt_list_remove(&h->task.link);
    zt_timer_stop(&h->timer);
    if (h->upcall) zt_upcall_cancel(w->core, h->upcall);
    if (worth_telling(was, reason)) report_failure(h, reason, detail);
    if (h->session) nghttp2_session_del(h->session);
    h->session = NULL;
    if (h->ssl) ossl.SSL_free(h->ssl);
    h->ssl = NULL;
    if (h->io.fd >= 0) zt_hold(w, h->pod, -1);
    if (h->io.fd >= 0 && was == ZT_H_OPEN && reason == ZT_R_IDLE) {
        zt_linger(w, h->pod, h->io.fd);
    } else if (h->io.fd >= 0) {
        zt_io_forget(w, h->io.fd);
        close(h->io.fd);
    }
    h->io.fd = -1;
    dialled(h);
    if (h->server) atomic_fetch_sub(&w->load_tls, 1);
    if (h->server && was < ZT_H_OPEN) atomic_fetch_sub(&h->pod->handshakes, 1);
    zt_add(&w->stats.tls_connections, (uint64_t)-1);
    zt_list_remove(&h->link);
    zt_bury(w, &h->grave);
    if (!h->server) zt_pool_lost(h, reason);
}

/* --- beginning ----------------------------------------------------------------------------------------------- */

static void begin_tls(struct zt_h2 *h) {
    int reason = zt_tls_start(h);

    dialled(h);
    if (reason) {
        zt_h2_end(h, (enum zt_reason)reason, "no TLS context");
        return;
    }
    h->state = ZT_H_HANDSHAKE;
    zt_timer_set(h->worker, &h->timer, h->server ? ZT_D_FIRST_BYTE : ZT_D_HANDSHAKE);
    handshake(h);
}

/* The pod's handshake that has waited longest in a queue of deadlines, or NULL. */
static struct zt_h2 *oldest(struct zt_h2 *h, enum zt_deadline d) {
    struct zt_list *queue = &h->worker->deadlines[d];

    for (struct zt_list *l = queue->next; l != queue; l = l->next) {
        struct zt_timer *t = ZT_CONTAINER(l, struct zt_timer, link);
        struct zt_h2 *old = ZT_CONTAINER(t, struct zt_h2, timer);

        if (old != h && old->server && old->pod == h->pod && old->state == ZT_H_HANDSHAKE)
            return old;
    }
    return NULL;
}

/* An honest handshake is short: who has waited longest is given up for the next. */
static void make_room(struct zt_h2 *h) {
    struct zt_h2 *silent = oldest(h, ZT_D_FIRST_BYTE), *begun = oldest(h, ZT_D_HANDSHAKE);
    struct zt_h2 *old = !silent || (begun && begun->started < silent->started) ? begun : silent;

    if (old)
        zt_h2_end(old, ZT_R_POD_HANDSHAKES, "the oldest gives way");
    else
        zt_h2_end(h, ZT_R_POD_HANDSHAKES, NULL);
}

void zt_h2_accepted(struct zt_worker *w, struct zt_pod *pod, int fd, const struct zt_addr *source,
                    const struct zt_addr *destination) {
    struct zt_h2 *h = h2_new(w, pod, pod->credential);
    uint64_t number = pod->node.number;
    bool ours = false;

    if (!h) zt_hold(w, pod, -1);
    zt_pod_put(pod); /* the connection has a reference of its own */
    if (!h) {
        struct zt_failed f = {
            .kind = ZT_PEER_CERTIFICATE, .pod = number, .addr = *source, .reason = ZT_R_NO_MEMORY};

        close(fd);
        atomic_fetch_sub(&w->load_tls, 1);
        zt_add(&w->stats.handshake_failures[f.reason], 1);
        zt_failed_push(w->core, &f);
        return;
    }
    h->server = true;
    h->io.fd = fd;
    h->address = *source;
    h->local = *destination;
    if (zt_beyond(w->core, ZT_L_HANDSHAKES, atomic_fetch_add(&pod->handshakes, 1) + 1))
        make_room(h);
    if (h->state == ZT_H_ENDED) return;
    for (int i = 0; i < pod->naddrs; i++) ours |= zt_addr_ip_equal(&pod->addrs[i], destination);
    zt_sock_share(fd); /* accepted: the kernel has the option, and nothing depends on it */
    if (atomic_load(&pod->removed))
        zt_h2_end(h, ZT_R_POD_REMOVED, NULL);
    else if (!ours)
        zt_h2_end(h, ZT_R_SELF_CALL,
                  "the HBONE port was called by an address that is not the pod's");
    else if (zt_io_watch(w, &h->io, H2_EVENTS) < 0)
        zt_h2_end(h, ZT_R_NO_MEMORY, NULL);
    else
        zt_h2_certified(h);
}

static void start_connect(struct zt_h2 *h) {
    enum zt_reason why = zt_admit(h->worker, h->pod, ZT_USE_HBONE_DIAL);
    int fd;

    if (why) {
        zt_h2_end(h, why, NULL);
        return;
    }
    fd = zt_sock_to_peer(h->worker, h->pod, &h->address);
    if (fd < 0) {
        zt_h2_end(h, zt_reason_of_connect(-fd), strerror(-fd));
        return;
    }
    h->io.fd = fd;
    h->state = ZT_H_CONNECTING;
    zt_hold(h->worker, h->pod, 1);
    h->dials = true;
    atomic_fetch_add_explicit(&h->pod->dials, 1, memory_order_relaxed);
    zt_timer_set(h->worker, &h->timer, ZT_D_CONNECT);
    if (zt_io_watch(h->worker, &h->io, H2_EVENTS) < 0) zt_h2_end(h, ZT_R_NO_MEMORY, NULL);
}

bool zt_h2_dial(struct zt_worker *w, struct zt_peer *peer) {
    struct zt_h2 *h = h2_new(w, peer->pod, peer->credential);

    if (!h) return false;
    h->peer = zt_peer_get(peer);
    h->address = peer->addr;
    zt_list_append(&peer->pools[w->index].connections, &h->pool_link);
    zt_h2_certified(h);
    return true;
}

void zt_h2_certified(struct zt_h2 *h) {
    if (!atomic_load(&h->credential->generation)) return;
    if (h->server)
        begin_tls(h);
    else
        start_connect(h);
}

/* --- leaving ------------------------------------------------------------------------------------------------------ */

/* Nothing keeps it any more but its own output, which flush sees out first. */
static bool leaving(const struct zt_h2 *h) {
    bool done =
        h->retiring || (!h->server && (h->worker->draining || atomic_load(&h->peer->draining)));

    return done && !h->nstreams;
}

void zt_h2_drain(struct zt_h2 *h) {
    if (h->state != ZT_H_OPEN) return; /* it is told when it is open */
    if (h->server && !h->noticed) {
        /* RFC 9113, 6.8: "2^31-1" first, and what was the last once the peer must have seen it. */
        h->noticed = h->worker->now;
        zt_session_check(h, nghttp2_submit_shutdown_notice(h->session));
        /* An interval from now, and not only when a PING of before has gone unanswered. */
        if (h->timer.deadline == ZT_D_PING) zt_timer_set(h->worker, &h->timer, ZT_D_PING);
    }
    zt_h2_mark_dirty(h);
}

void zt_h2_part(struct zt_h2 *h) {
    if (h->parted) return;
    h->parted = h->retiring = true;
    zt_session_check(h, nghttp2_submit_goaway(h->session, NGHTTP2_FLAG_NONE,
                                              nghttp2_session_get_last_proc_stream_id(h->session),
                                              NGHTTP2_NO_ERROR, NULL, 0));
    zt_h2_mark_dirty(h);
}

/* --- at rest ------------------------------------------------------------------------------------------------------ */

void zt_h2_settled(struct zt_h2 *h) {
    bool first = !h->settled;

    h->settled = true;
    if (first) zt_timer_set(h->worker, &h->timer, ZT_D_PING);
    if (!h->server) zt_pool_settled(h, first);
    if (first && h->retiring) zt_h2_idle_check(h);
}

static void ask_for_life(struct zt_h2 *h, enum zt_deadline d) {
    h->pinged = true;
    zt_session_check(h, nghttp2_submit_ping(h->session, NGHTTP2_FLAG_NONE, NULL));
    zt_h2_mark_dirty(h);
    zt_timer_set(h->worker, &h->timer, d);
}

void zt_h2_suspect(struct zt_h2 *h) {
    if (h->state == ZT_H_OPEN && h->settled)
        ask_for_life(h, ZT_D_SUSPECT);
    else
        zt_timer_set(h->worker, &h->timer, ZT_D_SUSPECT);
}

void zt_h2_idle_check(struct zt_h2 *h) {
    if (h->nstreams) return;
    h->idle_since = h->worker->now;
    if (leaving(h))
        zt_h2_mark_dirty(h);
    else if (h->timer.deadline == ZT_D_PING && zt_pool_surplus(h))
        zt_timer_set(h->worker, &h->timer, ZT_D_SURPLUS);
}

/* --- handshake and judgement ------------------------------------------------------------------------------------- */

static void ask(struct zt_h2 *h) {
    struct zt_upcall *u = calloc(1, sizeof(*u));
    int n;

    if (!u) {
        zt_h2_end(h, ZT_R_NO_MEMORY, NULL);
        return;
    }
    n = zt_tls_chain(h, u->chain);
    if (n < 0) {
        free(u);
        if (n == -E2BIG)
            zt_h2_end(h, ZT_R_CERT_INVALID, "certificate chain too long");
        else if (n == -ENOMEM)
            zt_h2_end(h, ZT_R_NO_MEMORY, NULL);
        else
            zt_h2_end(h, ZT_R_CERT_MISSING, "no certificate");
        return;
    }
    u->nchain = n;
    u->worker = h->worker;
    u->key.kind = h->server ? ZT_PEER_CERTIFICATE : ZT_SERVER_CERTIFICATE;
    u->key.pod = h->pod->node.number;
    u->epoch = atomic_load(&h->worker->core->epoch);
    u->peer = h->peer ? h->peer->node.number : 0;
    if (h->server) {
        u->source = h->address;
        u->destination = h->local;
    } else {
        u->destination = h->address;
    }
    h->upcall = zt_upcall_send(h->worker->core, u);
    zt_add(&h->worker->stats.upcalls, 1);
    zt_timer_set(h->worker, &h->timer, ZT_D_DECISION);
    if (h->upcall)
        h->state = ZT_H_JUDGED;
    else
        zt_h2_end(h, ZT_R_NO_MEMORY, NULL);
}

/* HTTP/2 may follow the handshake in the same segment; it waits for the judgement. Returns false
 * when the connection has ended. */
static bool keep_early(struct zt_h2 *h, char detail[ZT_DETAIL]) {
    int n = zt_tls_read(h, h->worker->plain, ZT_CHUNK, detail);
    uint8_t *kept;

    if (n < 0) {
        zt_h2_end(h, (enum zt_reason) - n, detail);
        return false;
    }
    if (n == 0) return true;
    kept =
        h->early_len + (size_t)n <= ZT_CHUNK ? realloc(h->early, h->early_len + (size_t)n) : NULL;
    if (!kept) {
        zt_h2_end(h, ZT_R_NO_MEMORY, "too much data before the certificate was judged");
        return false;
    }
    memcpy(kept + h->early_len, h->worker->plain, (size_t)n);
    h->early = kept;
    h->early_len += (size_t)n;
    return true;
}

/* The other side hung up while we judge it. In TLS 1.3 a server refuses our certificate after the
 * handshake is complete on our side: its alert is still to be read, and says why. */
static void last_words(struct zt_h2 *h) {
    char detail[ZT_DETAIL] = "";
    ssize_t n = recv(h->io.fd, h->worker->in, ZT_WIRE, 0);

    if (n > 0) {
        zt_tls_input(h, (size_t)n);
        if (!keep_early(h, detail)) return;
    }
    zt_h2_end(h, ZT_R_PEER_LOST, "the peer closed before its certificate was judged");
}

static void handshake(struct zt_h2 *h) {
    char detail[ZT_DETAIL] = "";
    size_t input = 0;

    while (h->state == ZT_H_HANDSHAKE) {
        int rv = zt_tls_handshake(h, input, detail);
        ssize_t n;

        if (rv == -1 && !keep_early(h, detail)) return;
        if (zt_tls_drain(h) < 0 && rv <= 0) {
            zt_h2_end(h, ZT_R_PEER_LOST, "the peer closed during the TLS handshake");
            return;
        }
        if (rv > 0) {
            zt_h2_end(h, (enum zt_reason)rv, detail);
            return;
        }
        if (rv == -1) {
            ask(h);
            return;
        }
        if (!h->readable) return;
        n = recv(h->io.fd, h->worker->in, ZT_WIRE, 0);
        if (n < 0 && errno == EAGAIN) {
            h->readable = false;
            return;
        }
        if (n <= 0) {
            zt_h2_end(h, ZT_R_PEER_LOST,
                      n < 0 ? strerror(errno) : "the peer closed during the TLS handshake");
            return;
        }
        input = (size_t)n;
        if (h->timer.deadline == ZT_D_FIRST_BYTE)
            zt_timer_set(h->worker, &h->timer, ZT_D_HANDSHAKE);
    }
}

void zt_h2_certificate(struct zt_worker *w, uint64_t upcall, uint64_t identity,
                       enum zt_reason reason) {
    struct zt_h2 *h = NULL;
    int rv;

    for (struct zt_list *l = w->h2s.next; l != &w->h2s && !h; l = l->next) {
        struct zt_h2 *at = ZT_CONTAINER(l, struct zt_h2, link);

        if (at->state == ZT_H_JUDGED && at->upcall == upcall) h = at;
    }
    if (!h) return;
    h->upcall = 0;
    if (!identity) {
        zt_h2_end(h, reason, "the certificate's identity was refused");
        return;
    }
    h->proven = identity;
    h->identity = h->server ? identity : 0;
    rv = zt_session_start(h);
    if (rv) {
        zt_h2_end(h, ZT_R_NO_MEMORY, NULL);
        return;
    }
    h->state = ZT_H_OPEN;
    if (h->server) atomic_fetch_sub(&h->pod->handshakes, 1);
    zt_observe(h->server ? &w->stats.handshakes_server : &w->stats.handshakes_client,
               w->now - h->started);
    zt_timer_set(w, &h->timer, ZT_D_SETTINGS);
    h->heard = h->idle_since = w->now;
    zt_h2_mark_dirty(h);
    if (!h->server) {
        /* Rotated meanwhile: who waits gets a connection with the new certificate. */
        h->retiring = h->generation != atomic_load(&h->credential->generation);
        zt_pool_serve(w, h->peer);
    }
    if (h->early) {
        rv = zt_session_input(h, h->early, h->early_len);
        free(h->early);
        h->early = NULL;
        if (rv) {
            zt_h2_end(h, (enum zt_reason)rv, NULL);
            return;
        }
    }
    if (w->draining) zt_h2_drain(h);
    receive(h);
}

/* --- receiving ------------------------------------------------------------------------------------------------------ */

/* Returns false when the connection has ended. */
static bool take_in(struct zt_h2 *h, size_t n) {
    struct zt_worker *w = h->worker;
    char detail[ZT_DETAIL] = "";
    int got, rv;

    h->heard = w->now;
    if (h->pinged) {
        h->pinged = false;
        zt_timer_set(w, &h->timer, ZT_D_PING);
    }
    zt_tls_input(h, n);
    do {
        got = zt_tls_read(h, w->plain, ZT_CHUNK, detail);
        if (got < 0) {
            zt_h2_end(h, (enum zt_reason) - got, detail);
            return false;
        }
        rv = got ? zt_session_input(h, w->plain, (size_t)got) : 0;
        if (rv) {
            zt_h2_end(h, (enum zt_reason)rv, NULL);
            return false;
        }
    } while (got == ZT_CHUNK);
    return true;
}

/* Reads on while its own output waits: two tunnels that each wait for the other to read would wait
 * for ever. What comes in is bounded by the windows, what it makes us say by ZT_MAX_QUEUED. */
static void receive(struct zt_h2 *h) {
    size_t budget = 0;

    while (h->state == ZT_H_OPEN && h->readable && !h->input_end) {
        ssize_t n = recv(h->io.fd, h->worker->in, ZT_WIRE, 0);

        if (n < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN) {
                zt_h2_end(h, ZT_R_PEER_LOST, strerror(errno));
                return;
            }
            h->readable = false;
            break;
        }
        if (n == 0) {
            /* RFC 8446, 6.1: an end without close_notify is a truncation. */
            zt_h2_end(h, ZT_R_TLS_TRUNCATED, NULL);
            return;
        }
        if (n < ZT_WIRE && !h->hangup) h->readable = false;
        if (!take_in(h, (size_t)n)) return;
        budget += (size_t)n;
        if (budget >= ZT_BUDGET) {
            zt_task_add(h->worker, &h->task);
            break;
        }
    }
    if (h->state != ZT_H_OPEN) return;
    if (h->input_end)
        zt_h2_end(h, h->nstreams ? ZT_R_PEER_LOST : ZT_R_IDLE, NULL);
    else
        zt_h2_mark_dirty(h);
}

/* --- sending ---------------------------------------------------------------------------------------------------------- */

void zt_h2_mark_dirty(struct zt_h2 *h) {
    if (zt_list_empty(&h->dirty)) zt_list_append(&h->worker->dirty, &h->dirty);
}

static void flush(struct zt_h2 *h) {
    struct zt_worker *w = h->worker;
    size_t total = 0;

    while (h->state == ZT_H_OPEN && !h->fate) {
        int rv = zt_tls_drain(h);

        if (rv < 0) {
            zt_h2_end(h, ZT_R_PEER_LOST, strerror(-rv));
            return;
        }
        if (rv == 0) return; /* epoll will tell when there is room */
        if (total >= ZT_BUDGET) {
            zt_task_add(w, &h->task);
            return;
        }
        w->out_used = 0;
        h->in_session = true;
        rv = nghttp2_session_send(h->session);
        h->in_session = false;
        if (rv) {
            h->fate = rv == NGHTTP2_ERR_NOMEM ? ZT_R_NO_MEMORY : ZT_R_H2_PROTOCOL;
            break;
        }
        if (w->out_used == 0) break;
        total += w->out_used;
        if (zt_tls_write(h, w->out, w->out_used) < 0) h->fate = ZT_R_TLS_FAILED;
    }
    if (h->state != ZT_H_OPEN) return;
    if (h->fate)
        zt_h2_end(h, h->fate, NULL);
    else if (leaving(h))
        zt_h2_end(h, ZT_R_IDLE, NULL);
    else if (!nghttp2_session_want_read(h->session) && !nghttp2_session_want_write(h->session))
        zt_h2_end(h, h->nstreams ? ZT_R_H2_PROTOCOL : ZT_R_IDLE, NULL);
    else if (h->readable)
        zt_task_add(w, &h->task);
}

void zt_h2_flush_dirty(struct zt_worker *w) {
    while (!zt_list_empty(&w->dirty)) {
        struct zt_h2 *h = ZT_CONTAINER(w->dirty.next, struct zt_h2, dirty);

        zt_list_remove(&h->dirty);
        flush(h);
    }
}

/* --- events ------------------------------------------------------------------------------------------------------------ */

static void on_task(struct zt_worker *w, struct zt_task *t) {
    struct zt_h2 *h = ZT_CONTAINER(t, struct zt_h2, task);

    (void)w;
    if (h->state == ZT_H_OPEN) {
        receive(h);
        if (h->state == ZT_H_OPEN) zt_h2_mark_dirty(h);
    }
}

static void on_event(struct zt_worker *w, struct zt_io *io, uint32_t events) {
    struct zt_h2 *h = ZT_CONTAINER(io, struct zt_h2, io);

    (void)w;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) h->readable = true;
    if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) h->writable = true;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) h->hangup = true;
    switch (h->state) {
    case ZT_H_CONNECTING: {
        int error = zt_sock_error(io->fd);

        if (error)
            zt_h2_end(h, zt_reason_of_connect(error), strerror(error));
        else if (events & EPOLLOUT)
            begin_tls(h);
        break;
    }
    case ZT_H_HANDSHAKE:
        handshake(h);
        break;
    case ZT_H_JUDGED:
        if (events & (EPOLLERR | EPOLLHUP)) last_words(h);
        break;
    case ZT_H_CREDENTIAL:
        if (events & (EPOLLERR | EPOLLHUP)) zt_h2_end(h, ZT_R_PEER_LOST, "the peer has gone");
        break;
    case ZT_H_OPEN:
        receive(h);
        break;
    case ZT_H_ENDED:
        break;
    }
}

/* What a deadline says when it ends the connection. */
static const struct {
    enum zt_reason reason;
    const char *detail;
} expiry[ZT_DEADLINES] = {
    [ZT_D_CREDENTIAL] = {ZT_R_NO_CREDENTIAL, "no certificate for this pod yet"},
    [ZT_D_CONNECT] = {ZT_R_CONNECT_TIMEOUT,
                      "no answer from the HBONE port: maybe a NetworkPolicy blocks 15008"},
    [ZT_D_FIRST_BYTE] = {ZT_R_FIRST_BYTE_TIMEOUT, "connected to the HBONE port and said nothing"},
    [ZT_D_HANDSHAKE] = {ZT_R_TLS_TIMEOUT, "the TLS handshake did not end"},
    [ZT_D_DECISION] = {ZT_R_DECISION_TIMEOUT, "the certificate was not judged in time"},
    [ZT_D_SETTINGS] = {ZT_R_H2_TIMEOUT, "no HTTP/2 SETTINGS after the TLS handshake"},
    [ZT_D_PONG] = {ZT_R_KEEPALIVE_TIMEOUT, "a PING was not answered"},
    [ZT_D_SUSPECT] = {ZT_R_KEEPALIVE_TIMEOUT, "its workload has left the mesh, and it is silent"},
    [ZT_D_IDLE] = {ZT_R_IDLE, NULL},
    [ZT_D_SURPLUS] = {ZT_R_IDLE, NULL},
};

static void expire(struct zt_h2 *h, enum zt_deadline d) {
    zt_add(&h->worker->stats.expired[d], 1);
    zt_h2_end(h, expiry[d].reason, expiry[d].detail);
}

static void on_timer(struct zt_worker *w, struct zt_timer *t) {
    struct zt_h2 *h = ZT_CONTAINER(t, struct zt_h2, timer);

    if (t->deadline != ZT_D_PING && t->deadline != ZT_D_SURPLUS) {
        expire(h, t->deadline);
        return;
    }
    zt_tls_shrink(h);
    if (!h->nstreams && zt_timer_over(w, ZT_D_SURPLUS, h->idle_since) && zt_pool_surplus(h)) {
        expire(h, ZT_D_SURPLUS);
        return;
    }
    /* It answers no PING of ours: it has had the time. */
    if (h->noticed && zt_timer_over(w, ZT_D_PING, h->noticed)) zt_h2_part(h);
    /* Who waits for room may be worth a dial again. */
    if (!h->server) zt_pool_serve(w, h->peer);
    if (!h->nstreams && zt_timer_over(w, ZT_D_IDLE, h->idle_since)) {
        expire(h, ZT_D_IDLE);
    } else if (zt_timer_over(w, ZT_D_PING, h->heard)) {
        ask_for_life(h, ZT_D_PONG);
    } else {
        /* Asked again when it has been silent for a whole interval. */
        zt_timer_set_since(w, t, ZT_D_PING, h->heard);
    }
}
