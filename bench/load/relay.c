/*
 * relay LISTEN_PORT HOST PORT WORKERS: carries bytes both ways between each client and HOST:PORT.
 *
 * Nothing but that: no capture, no TLS, no HTTP/2, no policy. What two of these in a row reach is
 * what any pair of tunnels could reach at best. Each worker has its own epoll and copies up to
 * 256 KiB with each pair of system calls; half-close is passed on.
 */
#include "common.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define COPY_BYTES (256 * 1024)
#define EVENTS 64
#define MAX_WORKERS 64

/* One of the two sockets of a connection. What `pending` holds was read from the other one and
 * waits until this one takes it; meanwhile the other one is not read. */
struct side {
    int fd;
    struct side *other;
    char *pending;
    size_t from, to;
    int read_ended;
    int connecting;
    int closed;
    uint32_t interest;
};

static struct address target;
static int listener;

static void watch(int poller, struct side *side, int operation) {
    uint32_t wanted = 0;
    if (side->connecting || side->pending) wanted |= EPOLLOUT;
    if (!side->read_ended && !side->other->pending && !side->other->connecting) wanted |= EPOLLIN;
    if (operation == EPOLL_CTL_MOD && wanted == side->interest) return;
    struct epoll_event event = {.events = wanted, .data.ptr = side};
    if (epoll_ctl(poller, operation, side->fd, &event)) fail_errno("epoll_ctl");
    side->interest = wanted;
}

static void take_in(int poller, int fd) {
    struct side *client = calloc(2, sizeof(*client));
    if (!client) fail("no memory");
    struct side *server = client + 1;
    client->fd = fd;
    client->other = server;
    server->other = client;
    server->fd = open_socket(&target, SOCK_NONBLOCK);
    server->connecting = 1;
    no_delay(fd);
    if (connect(server->fd, (struct sockaddr *)&target.to, target.length) && errno != EINPROGRESS) {
        fail_errno("connect");
    }
    watch(poller, client, EPOLL_CTL_ADD);
    watch(poller, server, EPOLL_CTL_ADD);
}

/* Writes what waits for this side. -1 when the connection is lost. */
static int push(struct side *side) {
    ssize_t sent = send(side->fd, side->pending + side->from, side->to - side->from, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN ? 0 : -1;
    side->from += (size_t)sent;
    if (side->from == side->to) {
        free(side->pending);
        side->pending = NULL;
        if (side->other->read_ended) shutdown(side->fd, SHUT_WR);
    }
    return 0;
}

/* Reads from this side and writes to the other. -1 when the connection is lost. */
static int pull(struct side *side, char *copy) {
    struct side *other = side->other;
    ssize_t length = recv(side->fd, copy, COPY_BYTES, 0);
    if (length < 0) return errno == EAGAIN ? 0 : -1;
    if (length == 0) {
        side->read_ended = 1;
        shutdown(other->fd, SHUT_WR);
        return 0;
    }
    ssize_t sent = send(other->fd, copy, (size_t)length, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return -1;
    if (sent < 0) sent = 0;
    if (sent < length) {
        other->pending = malloc((size_t)(length - sent));
        if (!other->pending) fail("no memory");
        memcpy(other->pending, copy + sent, (size_t)(length - sent));
        other->from = 0;
        other->to = (size_t)(length - sent);
    }
    return 0;
}

static int handle(int poller, struct side *side, uint32_t events, char *copy) {
    if (side->connecting && events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
        if (events & EPOLLERR) return -1;
        side->connecting = 0;
    }
    if (side->pending && events & EPOLLOUT && push(side)) return -1;
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR) && side->interest & EPOLLIN) {
        if (pull(side, copy)) return -1;
    }
    struct side *other = side->other;
    if (side->read_ended && other->read_ended && !side->pending && !other->pending) return -1;
    watch(poller, side, EPOLL_CTL_MOD);
    watch(poller, other, EPOLL_CTL_MOD);
    return 0;
}

static void shut(struct side *side) {
    struct side *both[] = {side, side->other};
    for (int i = 0; i < 2; i++) {
        close(both[i]->fd);
        free(both[i]->pending);
        both[i]->closed = 1;
    }
}

/* The pair is one allocation: its lower half is what was allocated. */
static void release(struct side *side) {
    free(side < side->other ? side : side->other);
}

static void *work(void *unused) {
    char *copy = malloc(COPY_BYTES);
    int poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.ptr = NULL};
    (void)unused;
    if (!copy || poller < 0) fail("no memory");
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event)) fail_errno("epoll_ctl");
    for (;;) {
        struct epoll_event events[EVENTS];
        struct side *ended[EVENTS];
        int endings = 0;
        int count = epoll_wait(poller, events, EVENTS, -1);
        if (count < 0 && errno != EINTR) fail_errno("epoll_wait");
        for (int i = 0; i < count; i++) {
            struct side *side = events[i].data.ptr;
            if (!side) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (fd >= 0) take_in(poller, fd);
            } else if (!side->closed && handle(poller, side, events[i].events, copy)) {
                shut(side);
                ended[endings++] = side;
            }
        }
        /* Only now: both sides of a connection may be among the events of one round. */
        while (endings) release(ended[--endings]);
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 5) fail("usage: relay LISTEN_PORT HOST PORT WORKERS");
    long workers = number(argv[4], 1, MAX_WORKERS);
    raise_file_limit();
    target = address_of(argv[2], argv[3]);
    listener = listen_on(number(argv[1], 1, 65535));
    for (long i = 1; i < workers; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL)) fail("pthread_create");
    }
    work(NULL);
}
