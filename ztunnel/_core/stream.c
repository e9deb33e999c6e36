/*
 * HTTP/2 of an HBONE connection: CONNECT and its answer, data both ways, ends and resets.
 *
 * nghttp2's callbacks may end connections and submit frames, but never tear the session down: that
 * is what zt_h2.in_session and zt_h2.fate are for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "limit.h"
#include "pool.h"

/* Less room than this in the worker's buffer is not worth a frame: encrypt what is there first. */
#define WORTHWHILE (16 * 1024)
/* Of a chunk: small pieces share one, and no piece is so large that it is mapped, page by page. */
#define CHUNK_ROOM 16000
/* "for=\"[v6]:port\";host=name": RFC 7239; a host name is at most 253 bytes. */
#define FORWARDED_TEXT 400

static struct zt_h2 *self(void *user_data) {
    return user_data;
}

static struct zt_conn *conn_of(nghttp2_session *session, int32_t id) {
    return nghttp2_session_get_stream_user_data(session, id);
}

void zt_session_check(struct zt_h2 *h, int rv) {
    if (!nghttp2_is_fatal(rv)) return; /* such as a stream that has just gone */
    if (!h->fate) h->fate = ZT_R_NO_MEMORY;
    zt_h2_mark_dirty(h);
}

/* --- towards the application ------------------------------------------------------------------------------ */

static void detach(struct zt_conn *c) {
    struct zt_h2 *h = c->stream.h2;

    if (!h) return;
    nghttp2_session_set_stream_user_data(h->session, c->stream.id, NULL);
    zt_list_remove(&c->stream.link);
    c->stream.h2 = NULL;
    h->nstreams--;
    h->grown -= c->stream.window - ZT_STREAM_WINDOW;
    c->stream.window = ZT_STREAM_WINDOW;
    zt_h2_idle_check(h);
    if (!h->server && h->state == ZT_H_OPEN) zt_pool_serve(h->worker, h->peer);
}

static void hold(struct zt_conn *c, const struct zt_chunk *k, int sign) {
    int64_t n = sign * (int64_t)(sizeof(*k) + k->room);

    atomic_fetch_add_explicit(&c->pod->held, n, memory_order_relaxed);
    zt_add(&c->worker->stats.held, (uint64_t)n);
    zt_worker_held(c->worker);
}

static void free_first(struct zt_conn *c) {
    struct zt_chunk *k = c->stream.pending;

    hold(c, k, -1);
    c->stream.pending = k->next;
    if (!k->next) c->stream.pending_last = NULL;
    free(k);
}

void zt_stream_free_pending(struct zt_conn *c) {
    while (c->stream.pending) free_first(c);
}

static struct zt_chunk *new_chunk(struct zt_conn *c) {
    struct zt_chunk *k = malloc(sizeof(*k) + CHUNK_ROOM);

    if (!k) return NULL;
    *k = (struct zt_chunk){.room = CHUNK_ROOM};
    hold(c, k, 1);
    if (c->stream.pending)
        c->stream.pending_last->next = k;
    else
        c->stream.pending = k;
    c->stream.pending_last = k;
    return k;
}

/* The stream's window bounds what may wait here: the peer may not send more until it is written.
 * Small pieces share a chunk, or a byte would cost fifty. Returns 0 or why not. */
static int keep_pending(struct zt_conn *c, const uint8_t *data, size_t len) {
    while (len) {
        struct zt_chunk *k = c->stream.pending_last;
        size_t fits;

        if (!k || k->len == k->room) {
            if (zt_beyond(c->worker->core, ZT_L_HELD,
                          atomic_load_explicit(&c->pod->held, memory_order_relaxed)))
                return ZT_R_POD_HELD;
            k = new_chunk(c);
            if (!k) return ZT_R_NO_MEMORY;
        }
        fits = k->room - k->len < len ? k->room - k->len : len;
        memcpy(k->data + k->len, data, fits);
        k->len += fits;
        data += fits;
        len -= fits;
    }
    return 0;
}

/* The reader has taken `n` bytes: a quick one gets a wider window, as far as its connection's
 * streams may grow. */
static void widen(struct zt_conn *c, size_t n) {
    struct zt_stream *s = &c->stream;
    bool quick;
    int rv;

    s->taken += (uint32_t)n;
    if (s->taken < s->window / 2) return;
    quick = c->worker->now - s->taken_at < ZT_WINDOW_QUICK_US;
    s->taken = 0;
    s->taken_at = c->worker->now;
    if (!quick || s->remote_end || s->window >= ZT_STREAM_WINDOW_MOST ||
        s->h2->grown + s->window > ZT_CONN_GROWTH)
        return;
    rv = nghttp2_session_set_local_window_size(s->h2->session, NGHTTP2_FLAG_NONE, s->id,
                                               (int32_t)s->window * 2);
    zt_session_check(s->h2, rv);
    if (rv) return;
    s->h2->grown += s->window;
    s->window *= 2;
}

/* The application has taken `n` bytes: count them and let the peer send as many more. */
static void delivered(struct zt_conn *c, size_t n) {
    if (c->kind == ZT_OUTBOUND)
        zt_conn_count(c, 0, n);
    else
        zt_conn_count(c, n, 0);
    if (c->stream.h2) {
        zt_session_check(c->stream.h2,
                         nghttp2_session_consume_stream(c->stream.h2->session, c->stream.id, n));
        widen(c, n);
        zt_h2_mark_dirty(c->stream.h2);
    }
}

/* By errno, right behind the call that failed. */
static enum zt_reason leg_failed(struct zt_conn *c) {
    return zt_reason_of_leg(c, zt_conn_leg(c), errno);
}

/* What the socket takes of the vector; -1 when the application has gone. */
static ssize_t write_leg(struct zt_leg *leg, struct iovec *iov, int n, size_t len) {
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = (size_t)n};
    ssize_t sent;

    if (!leg->writable) return 0;
    do {
        /* A request is one chunk: send() spares the kernel 0.2 us of copying and checking msg. */
        sent = n == 1 ? send(leg->io.fd, iov->iov_base, len, MSG_NOSIGNAL)
                      : sendmsg(leg->io.fd, &msg, MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno == EAGAIN) sent = 0;
    if (sent >= 0 && (size_t)sent < len) leg->writable = false;
    return sent;
}

static int write_pending(struct zt_conn *c) {
    struct zt_leg *leg = zt_conn_leg(c);

    while (c->stream.pending && leg->writable) {
        struct iovec iov[ZT_GATHER_IOVS];
        size_t len = 0;
        ssize_t sent;
        int n = 0;

        for (struct zt_chunk *k = c->stream.pending; k && n < ZT_GATHER_IOVS; k = k->next) {
            iov[n++] = (struct iovec){k->data + k->pos, k->len - k->pos};
            len += k->len - k->pos;
        }
        sent = write_leg(leg, iov, n, len);
        if (sent < 0) return -1;
        if (sent) delivered(c, (size_t)sent);
        while (sent > 0) {
            struct zt_chunk *k = c->stream.pending;
            size_t left = k->len - k->pos;

            if ((size_t)sent < left) {
                k->pos += (size_t)sent;
                break;
            }
            sent -= (ssize_t)left;
            free_first(c);
        }
    }
    return 0;
}

void zt_stream_deliver(struct zt_conn *c) {
    struct zt_leg *leg = zt_conn_leg(c);

    if (c->state != ZT_C_OPEN) return;
    if (c->stream.remote_end) zt_conn_half_closed(c);
    if (write_pending(c) < 0) {
        zt_conn_end(c, leg_failed(c));
        return;
    }
    if (c->stream.pending || !c->stream.remote_end) return;
    if (!leg->shut) {
        leg->shut = true;
        /* ENOTCONN: the application closed first; nothing is lost by it. */
        if (shutdown(leg->io.fd, SHUT_WR) < 0 && errno != ENOTCONN) {
            zt_conn_end(c, leg_failed(c));
            return;
        }
    }
    if (!c->stream.h2) zt_conn_end(c, ZT_R_CLOSED);
}

/* --- chunks of one read, gathered for one write -------------------------------------------------------------- */

static void flush_gather(struct zt_gather *g) {
    struct zt_conn *c = g->conn;
    struct zt_leg *leg = zt_conn_leg(c);
    struct iovec *iov = g->iov;
    size_t len = 0;
    ssize_t sent = 0;

    if (c->state == ZT_C_ENDED) return;
    for (int i = 0; i < g->n; i++) len += iov[i].iov_len;
    if (len && c->state == ZT_C_OPEN && !c->stream.pending) {
        sent = write_leg(leg, iov, g->n, len);
        if (sent < 0) {
            zt_conn_end(c, leg_failed(c));
            return;
        }
        if (sent) delivered(c, (size_t)sent);
    }
    for (int i = 0; i < g->n; i++) {
        size_t skip = (size_t)sent < iov[i].iov_len ? (size_t)sent : iov[i].iov_len;
        int rv = 0;

        sent -= (ssize_t)skip;
        if (skip < iov[i].iov_len)
            rv = keep_pending(c, (uint8_t *)iov[i].iov_base + skip, iov[i].iov_len - skip);
        if (rv) {
            zt_conn_end(c, (enum zt_reason)rv);
            return;
        }
    }
    zt_stream_deliver(c);
}

static void flush_gathers(struct zt_worker *w) {
    for (int i = 0; i < w->ngathers; i++) flush_gather(&w->gathers[i]);
    w->ngathers = 0;
}

static struct zt_gather *gather_of(struct zt_conn *c) {
    struct zt_worker *w = c->worker;

    for (int i = 0; i < w->ngathers; i++) {
        if (w->gathers[i].conn == c) return &w->gathers[i];
    }
    if (w->ngathers == ZT_GATHERS) flush_gathers(w);
    w->gathers[w->ngathers] = (struct zt_gather){.conn = c};
    return &w->gathers[w->ngathers++];
}

static int on_data_chunk(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data,
                         size_t len, void *user_data) {
    struct zt_conn *c = conn_of(session, id);
    struct zt_gather *g;

    (void)flags;
    (void)user_data;
    /* One stream's slow reader must not close the window of its neighbours. */
    zt_session_check(self(user_data), nghttp2_session_consume_connection(session, len));
    if (!c || c->state == ZT_C_ENDED) return 0;
    g = gather_of(c);
    if (g->n == ZT_GATHER_IOVS) {
        flush_gathers(c->worker);
        if (c->state == ZT_C_ENDED) return 0;
        g = gather_of(c);
    }
    g->iov[g->n++] = (struct iovec){(void *)(uintptr_t)data, len};
    return 0;
}

/* --- from the application ---------------------------------------------------------------------------------------- */

static ssize_t read_leg(nghttp2_session *session, int32_t id, uint8_t *buf, size_t length,
                        uint32_t *flags, nghttp2_data_source *source, void *user_data) {
    struct zt_worker *w = self(user_data)->worker;
    struct zt_conn *c = conn_of(session, id);
    struct zt_leg *leg;
    size_t room = ZT_CHUNK - w->out_used;
    ssize_t n;

    (void)buf;
    (void)source;
    if (!c) return NGHTTP2_ERR_DEFERRED;
    if (c->state != ZT_C_OPEN) {
        c->stream.deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    if (room < ZT_FRAME_HEADER + WORTHWHILE) return NGHTTP2_ERR_PAUSE;
    leg = zt_conn_leg(c);
    if (!leg->readable && !leg->eof) {
        c->stream.deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    room -= ZT_FRAME_HEADER;
    if (room > length) room = length;
    do {
        n = recv(leg->io.fd, w->out + w->out_used + ZT_FRAME_HEADER, room, 0);
    } while (n < 0 && errno == EINTR);
    if (n < 0 && errno == EAGAIN) {
        leg->readable = false;
        c->stream.deferred = true;
        return NGHTTP2_ERR_DEFERRED;
    }
    if (n < 0) {
        zt_conn_end(c, leg_failed(c));
        return NGHTTP2_ERR_DEFERRED;
    }
    if ((size_t)n < room && !leg->drain) leg->readable = false;
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (n == 0) {
        leg->eof = true;
        c->stream.local_end = true;
        zt_conn_half_closed(c);
        *flags |= NGHTTP2_DATA_FLAG_EOF;
    } else if (c->kind == ZT_OUTBOUND) {
        zt_conn_count(c, (uint64_t)n, 0);
    } else {
        zt_conn_count(c, 0, (uint64_t)n);
    }
    return n;
}

/* The payload has been read behind room for its header: put the header before it. */
static int send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *header,
                     size_t length, nghttp2_data_source *source, void *user_data) {
    struct zt_worker *w = self(user_data)->worker;

    (void)session;
    (void)frame;
    (void)source;
    zt_glitch_sent(&self(user_data)->glitch, length);
    memcpy(w->out + w->out_used, header, ZT_FRAME_HEADER);
    w->out_used += ZT_FRAME_HEADER + length;
    return 0;
}

static ssize_t send_frame(nghttp2_session *session, const uint8_t *data, size_t length, int flags,
                          void *user_data) {
    struct zt_worker *w = self(user_data)->worker;

    (void)session;
    (void)flags;
    if (ZT_CHUNK - w->out_used < length) return NGHTTP2_ERR_WOULDBLOCK;
    memcpy(w->out + w->out_used, data, length);
    w->out_used += length;
    return (ssize_t)length;
}

static ssize_t frame_length(nghttp2_session *session, uint8_t type, int32_t id, int32_t conn_window,
                            int32_t stream_window, uint32_t max_frame, void *user_data) {
    size_t room = ZT_CHUNK - self(user_data)->worker->out_used;

    (void)session;
    (void)type;
    (void)id;
    (void)conn_window; /* nghttp2 holds us to both windows itself */
    (void)stream_window;
    if (room < ZT_FRAME_HEADER + WORTHWHILE) return WORTHWHILE; /* read_leg pauses */
    room -= ZT_FRAME_HEADER;
    return (ssize_t)(room < max_frame ? room : max_frame);
}

void zt_stream_resume(struct zt_conn *c) {
    struct zt_h2 *h = c->stream.h2;

    if (!h || !c->stream.answered || c->stream.local_end) return;
    if (c->stream.deferred) {
        c->stream.deferred = false;
        zt_session_check(h, nghttp2_session_resume_data(h->session, c->stream.id));
    }
    zt_h2_mark_dirty(h);
}

/* --- CONNECT ------------------------------------------------------------------------------------------------------ */

static nghttp2_nv pair(const char *name, const char *value, size_t len) {
    return (nghttp2_nv){(uint8_t *)(uintptr_t)name, (uint8_t *)(uintptr_t)value, strlen(name), len,
                        NGHTTP2_NV_FLAG_NONE};
}

int zt_stream_request(struct zt_h2 *h, struct zt_conn *c) {
    const struct zt_decision *d = c->decision;
    nghttp2_data_provider provider = {.read_callback = read_leg};
    char forwarded[FORWARDED_TEXT], source[ZT_ADDR_TEXT], traceparent[ZT_TRACEPARENT];
    nghttp2_nv nva[5];
    size_t n = 0;
    int32_t id;
    int len;

    nva[n++] = pair(":method", "CONNECT", 7);
    nva[n++] = pair(":authority", d->authority, strlen(d->authority));
    if (*d->baggage) nva[n++] = pair("baggage", d->baggage, strlen(d->baggage));
    zt_addr_text(&c->source, source);
    len = snprintf(forwarded, sizeof(forwarded), "for=\"%s\"%s%s", source, *d->host ? ";host=" : "",
                   d->host);
    if (len > 0 && (size_t)len < sizeof(forwarded))
        nva[n++] = pair("forwarded", forwarded, (size_t)len);
    if (zt_trace_on(c->worker->core)) {
        zt_trace_write(c->worker, c->trace, traceparent);
        nva[n++] = pair("traceparent", traceparent, ZT_TRACEPARENT - 1);
    }
    id = nghttp2_submit_request(h->session, NULL, nva, n, &provider, c);
    if (id < 0) return -ENOMEM;
    c->stream.h2 = h;
    c->stream.id = id;
    zt_list_append(&h->streams, &c->stream.link);
    h->nstreams++;
    h->used = true;
    c->state = ZT_C_CONNECTING;
    zt_glitch_earn(&h->glitch, 1); /* the peer may refuse it */
    zt_timer_set(c->worker, &c->timer, ZT_D_ANSWER);
    zt_h2_mark_dirty(h);
    return 0;
}

void zt_stream_answer(struct zt_conn *c, int status) {
    struct zt_h2 *h = c->stream.h2;
    nghttp2_data_provider provider = {.read_callback = read_leg};
    char text[16];
    nghttp2_nv nv;

    snprintf(text, sizeof(text), "%d", status);
    nv = pair(":status", text, strlen(text));
    c->stream.answered = true;
    zt_h2_mark_dirty(h);
    if (status == 200) {
        zt_glitch_earn(&h->glitch, 1); /* the peer may reset it */
        if (nghttp2_submit_response(h->session, c->stream.id, &nv, 1, &provider) < 0)
            zt_conn_end(c, ZT_R_NO_MEMORY);
        return;
    }
    if (nghttp2_submit_response(h->session, c->stream.id, &nv, 1, NULL) < 0)
        zt_session_check(h, nghttp2_submit_rst_stream(h->session, NGHTTP2_FLAG_NONE, c->stream.id,
                                                      NGHTTP2_INTERNAL_ERROR));
    detach(c);
}

void zt_stream_drop(struct zt_conn *c, uint32_t error_code) {
    struct zt_h2 *h = c->stream.h2;

    if (!h) return;
    zt_session_check(
        h, nghttp2_submit_rst_stream(h->session, NGHTTP2_FLAG_NONE, c->stream.id, error_code));
    zt_h2_mark_dirty(h);
    detach(c);
}

/* What cost us something and did no work, and is no frame of its own kind. */
static void useless(struct zt_h2 *h, const char *why) {
    if (h->fate || zt_glitch_one(&h->glitch, h->worker->now)) return;
    h->fate = ZT_R_H2_LIMIT;
    h->why = why;
    zt_h2_mark_dirty(h);
}

static enum zt_reason reason_of_status(int status) {
    switch (status) {
    case 400:
        return ZT_R_PEER_BAD_REQUEST;
    case 401:
    case 403:
        return ZT_R_PEER_DENIED;
    case 503:
        return ZT_R_PEER_UNAVAILABLE;
    default:
        return ZT_R_PEER_STATUS;
    }
}

static void on_answer(struct zt_conn *c) {
    int status = c->stream.status;

    if (c->state != ZT_C_CONNECTING) return;
    c->stream.status = 0;
    if (status >= 100 && status < 200) { /* the final answer follows */
        useless(c->stream.h2, "too many interim answers");
        return;
    }
    if (status != 200) {
        zt_conn_end(c, reason_of_status(status));
        return;
    }
    c->stream.answered = true;
    zt_conn_open(c);
}

/* --- what nghttp2 reports ------------------------------------------------------------------------------------------ */

static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *user_data) {
    struct zt_h2 *h = self(user_data);
    struct zt_conn *c;

    h->header_bytes = 0;
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    c = zt_conn_requested(h->worker, h, frame->hd.stream_id);
    if (!c) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, c);
    return 0;
}

static bool is(const uint8_t *text, size_t len, const char *word) {
    return len == strlen(word) && memcmp(text, word, len) == 0;
}

/* Decoded bytes, not those on the wire: RFC 7541, 7.3. 32 is RFC 9113's overhead of a field. */
static bool too_long(struct zt_h2 *h, size_t len) {
    h->header_bytes += len + 32;
    if (h->header_bytes <= ZT_MAX_HEADER_BYTES) return false;
    h->fate = ZT_R_H2_LIMIT;
    h->why = "header fields that decode to too many bytes";
    return true;
}

/* A field that breaks RFC 9113, 8.2 is dropped; it was decoded all the same. */
static int on_bad_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                         size_t namelen, const uint8_t *value, size_t valuelen, uint8_t flags,
                         void *user_data) {
    (void)session;
    (void)frame;
    (void)name;
    (void)value;
    (void)flags;
    return too_long(self(user_data), namelen + valuelen) ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

/* Of two that are there neither counts (W3C Trace Context, 3.2). */
static void on_traceparent(struct zt_conn *c, const char *text, size_t len) {
    struct zt_trace_ids ids;

    free(c->trace);
    c->trace = NULL;
    c->stream.traced = ZT_TRACED_UNSAID;
    if (c->stream.traceparent || !zt_trace_on(c->worker->core)) return;
    c->stream.traceparent = true;
    c->stream.traced = zt_traceparent_parse(text, len, &ids);
    if (c->stream.traced == ZT_TRACED_YES) c->trace = zt_trace_join(c->worker, &ids);
}

static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name,
                     size_t namelen, const uint8_t *value, size_t valuelen, uint8_t flags,
                     void *user_data) {
    struct zt_h2 *h = self(user_data);
    struct zt_conn *c = conn_of(session, frame->hd.stream_id);

    (void)flags;
    if (too_long(h, namelen + valuelen)) return NGHTTP2_ERR_CALLBACK_FAILURE;
    if (!c) return 0;
    if (h->server) {
        if (is(name, namelen, ":method"))
            c->stream.is_connect = is(value, valuelen, "CONNECT");
        else if (is(name, namelen, ":authority"))
            c->stream.has_authority =
                zt_authority_parse((const char *)value, valuelen, &c->destination) == 0;
        else if (frame->headers.cat == NGHTTP2_HCAT_REQUEST && is(name, namelen, "traceparent"))
            on_traceparent(c, (const char *)value, valuelen);
    } else if (is(name, namelen, ":status") && valuelen == 3) {
        /* nghttp2 has checked that these are digits. */
        c->stream.status =
            (int16_t)((value[0] - '0') * 100 + (value[1] - '0') * 10 + (value[2] - '0'));
    }
    return 0;
}

/* The PING behind the first GOAWAY: its answer says that the peer has seen that one. */
static const uint8_t farewell[8] = {'f', 'a', 'r', 'e', 'w', 'e', 'l', 'l'};

static int on_frame(nghttp2_session *session, const nghttp2_frame *frame, void *user_data) {
    struct zt_h2 *h = self(user_data);
    struct zt_conn *c = conn_of(session, frame->hd.stream_id);

    if (frame->hd.type == NGHTTP2_SETTINGS && !(frame->hd.flags & NGHTTP2_FLAG_ACK))
        zt_h2_settled(h);
    if (frame->hd.type == NGHTTP2_PING && (frame->hd.flags & NGHTTP2_FLAG_ACK) && h->noticed &&
        memcmp(frame->ping.opaque_data, farewell, sizeof(farewell)) == 0)
        zt_h2_part(h);
    if (frame->hd.type == NGHTTP2_GOAWAY) {
        h->retiring = true;
        zt_h2_idle_check(h);
    }
    if (!c || (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA)) return 0;
    if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) {
        c->stream.remote_end = true;
        gather_of(c); /* so that the end is passed on behind the data */
    }
    if (frame->hd.type == NGHTTP2_HEADERS) {
        if (!h->server)
            on_answer(c);
        else if (frame->headers.cat == NGHTTP2_HCAT_REQUEST)
            zt_conn_judge(c);
    }
    return 0;
}

/* RFC 9113, 7: codes that libnghttp2 chooses, and we never do. */
static bool broke_the_rules(uint32_t code) {
    return code == NGHTTP2_PROTOCOL_ERROR || code == NGHTTP2_FLOW_CONTROL_ERROR ||
           code == NGHTTP2_STREAM_CLOSED || code == NGHTTP2_FRAME_SIZE_ERROR ||
           code == NGHTTP2_REFUSED_STREAM;
}

/* When libnghttp2 ends a connection by itself, its GOAWAY says why. */
static void complain(struct zt_h2 *h, const nghttp2_goaway *g) {
    size_t len = g->opaque_data_len < ZT_DETAIL ? g->opaque_data_len : ZT_DETAIL;

    /* Without memory the log says less. */
    if (len && !h->complaint) h->complaint = strndup((const char *)g->opaque_data, len);
}

/* RFC 9113, 8.1: once a refusal is out, we have no interest in the rest of the request. nghttp2
 * drops what a stream still has to send when it is told earlier. */
static int on_frame_sent(nghttp2_session *session, const nghttp2_frame *frame, void *user_data) {
    struct zt_h2 *h = self(user_data);
    int32_t id = frame->hd.stream_id;
    struct zt_conn *c = conn_of(session, id);

    /* The peer made us reset a stream, by breaking HTTP/2 on it (CVE-2025-8671). */
    if (frame->hd.type == NGHTTP2_RST_STREAM && broke_the_rules(frame->rst_stream.error_code)) {
        if (c) c->stream.broken = true; /* on_stream_close follows */
        useless(h, "too many streams on which it broke HTTP/2");
    }
    if (frame->hd.type == NGHTTP2_GOAWAY) complain(h, &frame->goaway);
    if (frame->hd.type == NGHTTP2_GOAWAY && h->noticed && !h->parted)
        zt_session_check(h, nghttp2_submit_ping(session, NGHTTP2_FLAG_NONE, farewell));
    if (h->server && frame->hd.type == NGHTTP2_HEADERS &&
        (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) &&
        nghttp2_session_get_stream_remote_close(session, id) == 0)
        zt_session_check(self(user_data), nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, id,
                                                                    NGHTTP2_NO_ERROR));
    return 0;
}

static int on_stream_close(nghttp2_session *session, int32_t id, uint32_t error_code,
                           void *user_data) {
    struct zt_h2 *h = self(user_data);
    struct zt_conn *c = conn_of(session, id);

    if (!c) return 0;
    detach(c);
    /* RFC 9113, 8.7: the peer has not looked at it. GOAWAY leaves streams behind the same way. */
    if (error_code == NGHTTP2_REFUSED_STREAM && !h->server && c->state == ZT_C_CONNECTING &&
        zt_pool_again(c, h->peer))
        return 0;
    if (c->state != ZT_C_OPEN || !c->stream.remote_end ||
        (error_code != NGHTTP2_NO_ERROR && !c->stream.local_end)) {
        zt_conn_end(c, c->stream.broken ? ZT_R_H2_PROTOCOL : ZT_R_PEER_RESET);
    } else if (!h->receiving) {
        zt_stream_deliver(c);
    } else {
        gather_of(c);
    }
    return 0;
}

/* --- the session ---------------------------------------------------------------------------------------------------- */

int zt_session_start(struct zt_h2 *h) {
    /* The last one is the side's own: a client forbids pushes, a server limits streams. */
    nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, ZT_STREAM_WINDOW},
        {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, ZT_MAX_FRAME},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, ZT_MAX_HEADER_BYTES},
        {h->server ? NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS : NGHTTP2_SETTINGS_ENABLE_PUSH,
         h->server ? ZT_SERVER_STREAMS : 0},
    };
    nghttp2_session_callbacks *cb = NULL;
    nghttp2_option *option = NULL;
    int rv = nghttp2_session_callbacks_new(&cb);

    zt_glitch_init(&h->glitch, h->server, h->worker->now);
    if (!rv) rv = nghttp2_option_new(&option);
    if (!rv) {
        nghttp2_session_callbacks_set_send_callback(cb, send_frame);
        nghttp2_session_callbacks_set_send_data_callback(cb, send_data);
        nghttp2_session_callbacks_set_data_source_read_length_callback(cb, frame_length);
        nghttp2_session_callbacks_set_on_begin_headers_callback(cb, on_begin_headers);
        nghttp2_session_callbacks_set_on_header_callback(cb, on_header);
        nghttp2_session_callbacks_set_on_invalid_header_callback(cb, on_bad_header);
        nghttp2_session_callbacks_set_on_frame_recv_callback(cb, on_frame);
        nghttp2_session_callbacks_set_on_frame_send_callback(cb, on_frame_sent);
        nghttp2_session_callbacks_set_on_data_chunk_recv_callback(cb, on_data_chunk);
        nghttp2_session_callbacks_set_on_stream_close_callback(cb, on_stream_close);
        nghttp2_option_set_no_auto_window_update(option, 1);
        nghttp2_option_set_no_closed_streams(option, 1);
        /* Its own would count streams that were answered, too: applications that reset. */
        nghttp2_option_set_stream_reset_rate_limit(option, UINT64_MAX, UINT64_MAX);
        if (h->server)
            rv = nghttp2_session_server_new2(&h->session, cb, h, option);
        else
            rv = nghttp2_session_client_new2(&h->session, cb, h, option);
    }
    if (!rv)
        rv = nghttp2_submit_settings(h->session, NGHTTP2_FLAG_NONE, settings,
                                     sizeof(settings) / sizeof(settings[0]));
    if (!rv)
        rv =
            nghttp2_session_set_local_window_size(h->session, NGHTTP2_FLAG_NONE, 0, ZT_CONN_WINDOW);
    nghttp2_option_del(option);
    nghttp2_session_callbacks_del(cb);
    return rv;
}

int zt_session_input(struct zt_h2 *h, const uint8_t *data, size_t len) {
    ssize_t rv;

    h->why = zt_glitch_seen(&h->glitch, data, len, h->worker->now);
    if (h->why) return ZT_R_H2_LIMIT;
    h->in_session = h->receiving = true;
    rv = nghttp2_session_mem_recv(h->session, data, len);
    flush_gathers(h->worker);
    h->in_session = h->receiving = false;
    if (h->fate) return (int)h->fate;
    if (rv == NGHTTP2_ERR_NOMEM) return ZT_R_NO_MEMORY;
    if (rv == NGHTTP2_ERR_FLOODED ||
        nghttp2_session_get_outbound_queue_size(h->session) > ZT_MAX_QUEUED) {
        h->why = "it makes us answer and does not read the answers";
        return ZT_R_H2_LIMIT;
    }
    if (rv < 0) {
        h->why = nghttp2_strerror((int)rv);
        return ZT_R_H2_PROTOCOL;
    }
    return 0;
}

int zt_session_limit(const struct zt_h2 *h) {
    uint32_t theirs =
        nghttp2_session_get_remote_settings(h->session, NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS);

    return theirs < ZT_CLIENT_STREAMS ? (int)theirs : ZT_CLIENT_STREAMS;
}

int zt_session_room(struct zt_h2 *h) {
    if (h->retiring || !nghttp2_session_check_request_allowed(h->session)) return 0;
    return zt_session_limit(h) - h->nstreams;
}
