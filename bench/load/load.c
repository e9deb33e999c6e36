/*
 * load: a client that measures. Prints one JSON object.
 *
 *   load latency HOST PORT SECONDS            one connection, one request at a time
 *   load connect HOST PORT SECONDS PARALLEL   a new connection for every request; how long until its
 *                                             first byte of answer, from before connect()
 *   load idle HOST PORT COUNT                 COUNT connections, one request each, then held open:
 *                                             prints "ready", and closes them at end of input
 */
#include "common.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define EVENTS 256
#define MAX_PARALLEL 1024
#define MAX_IDLE 60000
/* Beyond this a new connection counts as stalled: many times what the slowest subject takes. */
#define STALL_NS 5000000u

struct slot {
    int fd;
    size_t received;
    uint64_t started;
};

static int start(const struct address *to, struct slot *slot, int poller) {
    slot->started = now_ns();
    slot->received = 0;
    slot->fd = open_socket(to, SOCK_NONBLOCK);
    struct epoll_event event = {.events = EPOLLOUT | EPOLLONESHOT, .data.ptr = slot};
    if (connect(slot->fd, (const struct sockaddr *)&to->to, to->length) && errno != EINPROGRESS) {
        return -1;
    }
    return epoll_ctl(poller, EPOLL_CTL_ADD, slot->fd, &event);
}

/* The connection stands: asks, and waits for the answer. */
static int ask(struct slot *slot, int poller) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = slot};
    if (send(slot->fd, REQUEST, REQUEST_BYTES, MSG_NOSIGNAL) != (ssize_t)REQUEST_BYTES) return -1;
    return epoll_ctl(poller, EPOLL_CTL_MOD, slot->fd, &event);
}

/* Returns 1 when the answer is whole, 0 when more is to come, -1 when there is none. */
static int hear(struct slot *slot, struct samples *firsts) {
    char data[ANSWER_BYTES];
    ssize_t length = recv(slot->fd, data, sizeof(data), 0);
    if (length <= 0) return length < 0 && errno == EAGAIN ? 0 : -1;
    if (!slot->received) samples_add(firsts, now_ns() - slot->started);
    slot->received += (size_t)length;
    return slot->received >= ANSWER_BYTES;
}

static void latency(const struct address *to, long seconds) {
    struct samples samples = {0};
    char data[ANSWER_BYTES];
    int fd = open_socket(to, 0);
    if (connect(fd, (const struct sockaddr *)&to->to, to->length)) fail_errno("connect");
    uint64_t began = now_ns(), before = began;
    uint64_t until = began + (uint64_t)seconds * 1000000000u;
    while (before < until) {
        if (send(fd, REQUEST, REQUEST_BYTES, MSG_NOSIGNAL) != (ssize_t)REQUEST_BYTES) {
            fail_errno("send");
        }
        if (recv(fd, data, sizeof(data), MSG_WAITALL) != (ssize_t)sizeof(data)) fail_errno("recv");
        uint64_t after = now_ns();
        samples_add(&samples, after - before);
        before = after;
    }
    printf("{\"seconds\": %.6f, ", (double)(before - began) / 1e9);
    samples_print(&samples);
    printf("}\n");
}

/* Ends a connection and, while there is time, begins the slot's next one. */
static void next(const struct address *to, struct slot *slot, int poller, int more, long *errors) {
    if (slot->fd >= 0) close(slot->fd);
    slot->fd = -1;
    while (more && start(to, slot, poller)) {
        if (++*errors > 100) fail_errno("connect, a hundred times");
        close(slot->fd);
        slot->fd = -1;
    }
}

static void connections(const struct address *to, long seconds, long parallel) {
    static struct slot slots[MAX_PARALLEL];
    struct samples firsts = {0};
    long errors = 0, done = 0, stalled = 0, living = parallel;
    int poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0) fail_errno("epoll_create1");
    uint64_t began = now_ns(), now = began;
    uint64_t until = began + (uint64_t)seconds * 1000000000u;
    for (long i = 0; i < parallel; i++) {
        slots[i].fd = -1;
        next(to, &slots[i], poller, 1, &errors);
    }
    while (living) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poller, events, EVENTS, PATIENCE_SECONDS * 1000);
        if (count == 0) fail("no answer on any connection for a long time");
        for (int i = 0; i < count; i++) {
            struct slot *slot = events[i].data.ptr;
            int result = events[i].events & EPOLLOUT ? ask(slot, poller) : hear(slot, &firsts);
            if (result == 0) continue;
            now = now_ns();
            if (result > 0) done++;
            if (result < 0 && ++errors > 100) fail("more than a hundred connections failed");
            next(to, slot, poller, now < until, &errors);
            if (slot->fd < 0) living--;
        }
    }
    for (size_t i = 0; i < firsts.count; i++) stalled += firsts.at[i] > STALL_NS;
    printf("{\"seconds\": %.6f, \"connections\": %ld, \"errors\": %ld, \"stalled\": %ld, ",
           (double)(now - began) / 1e9, done, errors, stalled);
    samples_print(&firsts);
    printf("}\n");
}

static void idle(const struct address *to, long count) {
    int *held = calloc((size_t)count, sizeof(*held));
    char data[ANSWER_BYTES];
    if (!held) fail("no memory");
    for (long i = 0; i < count; i++) {
        held[i] = open_socket(to, 0);
        if (connect(held[i], (const struct sockaddr *)&to->to, to->length)) fail_errno("connect");
        if (send(held[i], REQUEST, REQUEST_BYTES, MSG_NOSIGNAL) != (ssize_t)REQUEST_BYTES) {
            fail_errno("send");
        }
        if (recv(held[i], data, sizeof(data), MSG_WAITALL) != (ssize_t)sizeof(data)) {
            fail_errno("recv");
        }
    }
    printf("ready\n");
    fflush(stdout);
    while (read(STDIN_FILENO, data, sizeof(data)) > 0) {
    }
    for (long i = 0; i < count; i++) {
        if (recv(held[i], data, sizeof(data), MSG_DONTWAIT) >= 0 || errno != EAGAIN) {
            fail("a connection that was idle has ended");
        }
    }
    free(held);
    printf("{\"held\": %ld}\n", count);
}

int main(int argc, char **argv) {
    if (argc < 5) fail("usage: load latency|connect|idle HOST PORT SECONDS|COUNT [PARALLEL]");
    struct address to = address_of(argv[2], argv[3]);
    raise_file_limit();
    if (!strcmp(argv[1], "latency") && argc == 5) {
        latency(&to, number(argv[4], 1, 3600));
    } else if (!strcmp(argv[1], "connect") && argc == 6) {
        connections(&to, number(argv[4], 1, 3600), number(argv[5], 1, MAX_PARALLEL));
    } else if (!strcmp(argv[1], "idle") && argc == 5) {
        idle(&to, number(argv[4], 1, MAX_IDLE));
    } else {
        fail("usage: load latency|connect|idle HOST PORT SECONDS|COUNT [PARALLEL]");
    }
    return 0;
}
