/*
 * Plaintext on both sides: bytes go from socket to socket through a pipe, by splice(2), and never
 * enter this process. A pipe is held only while it has bytes in it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "conn.h"

/* The kernel's default limit for unprivileged users, so that it is granted everywhere. */
#define PIPE_BYTES (256 * 1024)
/* Read past urgent data at once: what the smallest pipe takes. */
#define URGENT_BYTES 4096

static int pipe_take(struct zt_worker *w, struct zt_pipe *p) {
    int fds[2];

    if (w->npipes) {
        *p = w->pipes[--w->npipes];
        return 0;
    }
    if (pipe2(fds, O_NONBLOCK | O_CLOEXEC) < 0) return -errno;
    fcntl(fds[1], F_SETPIPE_SZ, PIPE_BYTES); /* the default size serves as well */
    *p = (struct zt_pipe){fds[0], fds[1]};
    return 0;
}

static void pipe_close(struct zt_pipe *p) {
    if (p->r >= 0) {
        close(p->r);
        close(p->w);
    }
    *p = (struct zt_pipe){-1, -1};
}

/* Back to the pool, which must never hold a pipe with somebody's bytes. */
static void pipe_give(struct zt_worker *w, struct zt_half *half) {
    if (half->pipe.r < 0) return;
    if (half->in_pipe == 0 && w->npipes < ZT_PIPE_POOL) {
        w->pipes[w->npipes++] = half->pipe;
        half->pipe = (struct zt_pipe){-1, -1};
    } else {
        pipe_close(&half->pipe);
    }
    half->in_pipe = 0;
}

void zt_relay_release(struct zt_conn *c) {
    pipe_give(c->worker, &c->up);
    pipe_give(c->worker, &c->down);
}

void zt_relay_drop_pool(struct zt_worker *w) {
    while (w->npipes) pipe_close(&w->pipes[--w->npipes]);
}

enum outcome { DONE, AGAIN, MORE, FROM_FAILED, TO_FAILED, NO_PIPE };

/* What splice leaves when it says that nothing more comes: an end, or urgent data before which it
 * stops for ever (RFC 6093 wants it read inline; like every reader that has not asked for it, recv
 * drops the urgent byte and goes on). Fills the pipe, which is empty, as splice would have. */
static ssize_t beyond(struct zt_worker *w, const struct zt_leg *from, const struct zt_half *half) {
    ssize_t n = recv(from->io.fd, w->plain, URGENT_BYTES, 0);

    return n > 0 ? write(half->pipe.w, w->plain, (size_t)n) : n;
}

static enum outcome failed(struct zt_leg *leg, enum outcome how) {
    leg->error = errno;
    return how;
}

/* Moves bytes one way; MORE: the budget is used up. */
static enum outcome move(struct zt_worker *w, struct zt_leg *from, struct zt_leg *to,
                         struct zt_half *half, uint64_t *moved) {
    for (uint64_t budget = 0; budget < ZT_BUDGET;) {
        ssize_t n;

        if (half->in_pipe == 0 && !from->eof && from->readable) {
            if (half->pipe.r < 0 && pipe_take(w, &half->pipe) < 0) return NO_PIPE;
            n = splice(from->io.fd, NULL, half->pipe.w, NULL, PIPE_BYTES,
                       SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (n == 0) n = beyond(w, from, half);
            if (n < 0 && errno == EAGAIN)
                from->readable = false; /* the pipe is empty: it is the socket that is */
            else if (n < 0)
                return failed(from, FROM_FAILED);
            else if (n == 0)
                from->eof = true;
            else
                half->in_pipe = (size_t)n;
        }
        if (half->in_pipe == 0) {
            pipe_give(w, half);
            if (!from->eof) return AGAIN;
            if (!to->shut && shutdown(to->io.fd, SHUT_WR) < 0) return failed(to, TO_FAILED);
            to->shut = true;
            return DONE;
        }
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
        budget += (uint64_t)n;
    }
    return MORE;
}

void zt_relay_run(struct zt_conn *c) {
    struct zt_worker *w = c->worker;
    uint64_t received = 0, sent = 0;
    enum outcome up = move(w, &c->client, &c->server, &c->up, &received);
    enum outcome down = up < FROM_FAILED ? move(w, &c->server, &c->client, &c->down, &sent) : AGAIN;

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
