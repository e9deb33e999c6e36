/*
 * Plaintext on both sides. Small messages are copied through the worker's buffer: one recv and one
 * send. Where reads come back full, bytes go from socket to socket through a pipe, by splice(2),
 * and never enter this process. A pipe is held only while it has bytes in it; all that a connection
 * holds is in its pipes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "conn.h"
#include "limit.h"

/* The kernel's default limit for unprivileged users, so that it is granted everywhere. */
#define PIPE_BYTES (256 * 1024)
/* Asked for with one splice: a pipe's slot holds up to 32 KiB of a socket's, not a page. */
#define SPLICE_BYTES (1024 * 1024)

/* Read at once where messages are small. At most what an empty pipe of the smallest size takes
 * (pipe(7): 16 pages), for that is where the rest goes when the receiver is full. */
#define COPY_BYTES (16 * 1024)

/* The pod's share counts the pipes that it holds, the process' count those in the pool too. */
static int pipe_take(struct zt_worker *w, struct zt_pod *pod, struct zt_pipe *p) {
    int fds[2];

    if (w->npipes) {
        *p = w->pipes[--w->npipes];
        atomic_fetch_add_explicit(&pod->descriptors, 2, memory_order_relaxed);
        return 0;
    }
    if (pipe2(fds, O_NONBLOCK | O_CLOEXEC) < 0) return -errno;
    zt_hold(w, pod, 2);
    fcntl(fds[1], F_SETPIPE_SZ, PIPE_BYTES); /* the default size serves as well */
    *p = (struct zt_pipe){fds[0], fds[1]};
    return 0;
}

static void pipe_close(struct zt_worker *w, struct zt_pipe *p) {
    if (p->r >= 0) {
        zt_hold(w, NULL, -2);
        close(p->r);
        close(p->w);
    }
    *p = (struct zt_pipe){-1, -1};
}

/* Back to the pool, which must never hold a pipe with somebody's bytes. */
static void pipe_give(struct zt_worker *w, struct zt_pod *pod, struct zt_half *half) {
    if (half->pipe.r < 0) return;
    atomic_fetch_sub_explicit(&pod->descriptors, 2, memory_order_relaxed);
    if (half->in_pipe == 0 && w->npipes < ZT_PIPE_POOL) {
        w->pipes[w->npipes++] = half->pipe;
        half->pipe = (struct zt_pipe){-1, -1};
    } else {
        pipe_close(w, &half->pipe);
    }
    half->in_pipe = 0;
}

void zt_relay_release(struct zt_conn *c) {
    pipe_give(c->worker, c->pod, &c->up);
    pipe_give(c->worker, c->pod, &c->down);
}

void zt_relay_drop_pool(struct zt_worker *w) {
    while (w->npipes) pipe_close(w, &w->pipes[--w->npipes]);
}

enum outcome { DONE, AGAIN, MORE, FROM_FAILED, TO_FAILED, NO_PIPE };

static enum outcome failed(struct zt_leg *leg, enum outcome how) {
    leg->error = errno;
    return how;
}

/* What the receiver did not take. */
static enum outcome keep(struct zt_conn *c, struct zt_half *half, const uint8_t *rest, size_t n) {
    if (half->pipe.r < 0 && pipe_take(c->worker, c->pod, &half->pipe) < 0) return NO_PIPE;
    half->in_pipe = n;
    if (write(half->pipe.w, rest, n) == (ssize_t)n) return MORE;
    pipe_give(c->worker, c->pod, half); /* closed, for there is something in it */
    return NO_PIPE;
}

/* From socket to socket through the worker's buffer. */
static enum outcome copy(struct zt_conn *c, struct zt_leg *from, struct zt_leg *to,
                         struct zt_half *half, uint64_t *moved) {
    struct zt_worker *w = c->worker;
    ssize_t n, sent;

    if (!to->writable) return AGAIN;
    n = recv(from->io.fd, w->plain, COPY_BYTES, 0);
    if (n < 0 && errno == EAGAIN) {
        from->readable = false;
        return MORE;
    }
    if (n < 0) return failed(from, FROM_FAILED);
    if (n == 0) {
        from->eof = true;
        return MORE;
    }
    if (n == COPY_BYTES)
        half->bulk = true;
    else if (!from->drain)
        from->readable = false;
    sent = send(to->io.fd, w->plain, (size_t)n, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return failed(to, TO_FAILED);
    if (sent < 0) {
        to->writable = false;
        sent = 0;
    }
    *moved += (uint64_t)sent;
    return sent < n ? keep(c, half, w->plain + sent, (size_t)(n - sent)) : MORE;
}

/* From a socket into the pipe. Nothing more by this way may be the end, or urgent data, before which
 * splice stops for ever: recv finds out, and like every reader that has not asked for it drops the
 * urgent byte and goes on (RFC 6093). */
static enum outcome fill(struct zt_conn *c, struct zt_leg *from, struct zt_half *half) {
    ssize_t n;

    if (half->pipe.r < 0 && pipe_take(c->worker, c->pod, &half->pipe) < 0) return NO_PIPE;
    n = splice(from->io.fd, NULL, half->pipe.w, NULL, SPLICE_BYTES,
               SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (n < 0 && errno != EAGAIN) return failed(from, FROM_FAILED);
    if (n > 0)
        half->in_pipe = (size_t)n;
    else if (n < 0 && !from->drain)
        from->readable = false; /* the pipe is empty: it is the socket that is */
    if (n < COPY_BYTES) half->bulk = false;
    return MORE;
}

/* From the pipe to a socket. */
static enum outcome drain(struct zt_leg *to, struct zt_half *half, uint64_t *moved) {
    ssize_t n;

    if (!to->writable) return AGAIN;
    n = splice(half->pipe.r, NULL, to->io.fd, NULL, half->in_pipe,
               SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (n < 0 && errno == EAGAIN) {
        to->writable = false;
        return AGAIN;
    }
    if (n <= 0) return failed(to, TO_FAILED);
    half->in_pipe -= (size_t)n;
    *moved += (uint64_t)n;
    return MORE;
}

/* All that the sender sent has been taken. */
static enum outcome finish(struct zt_leg *from, struct zt_leg *to) {
    if (!from->eof) return AGAIN;
    if (!to->shut && shutdown(to->io.fd, SHUT_WR) < 0) return failed(to, TO_FAILED);
    to->shut = true;
    return DONE;
}

/* Moves bytes one way; MORE: the budget is used up. */
static enum outcome move(struct zt_conn *c, struct zt_leg *from, struct zt_leg *to,
                         struct zt_half *half, uint64_t *moved) {
    enum outcome rv = MORE;

    while (rv == MORE && *moved < ZT_BUDGET) {
        if (half->in_pipe)
            rv = drain(to, half, moved);
        else if (from->readable && !from->eof)
            rv = half->bulk ? fill(c, from, half) : copy(c, from, to, half, moved);
        else
            rv = finish(from, to);
    }
    if (!half->in_pipe) pipe_give(c->worker, c->pod, half);
    return rv;
}

void zt_relay_run(struct zt_conn *c) {
    struct zt_worker *w = c->worker;
    uint64_t received = 0, sent = 0;
    enum outcome up = move(c, &c->client, &c->server, &c->up, &received);
    enum outcome down = up < FROM_FAILED ? move(c, &c->server, &c->client, &c->down, &sent) : AGAIN;

    if (received || sent) zt_conn_count(c, received, sent);
    if (c->client.eof || c->server.eof) zt_conn_half_closed(c);
    if (up == NO_PIPE || down == NO_PIPE)
        zt_conn_end(c, ZT_R_NO_DESCRIPTORS);
    else if (up == FROM_FAILED || down == TO_FAILED)
        zt_conn_end(c, zt_reason_of_leg(c, &c->client, c->client.error));
    else if (up == TO_FAILED || down == FROM_FAILED)
        zt_conn_end(c, zt_reason_of_leg(c, &c->server, c->server.error));
    else if (up == DONE && down == DONE)
        zt_conn_end(c, ZT_R_CLOSED);
    else if (up == MORE || down == MORE)
        zt_task_add(w, &c->task);
}
