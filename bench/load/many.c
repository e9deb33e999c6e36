/*
 * many HOST PORT COUNT BUSY SECONDS: COUNT connections at once, BUSY of them at work, every byte of
 * every answer checked. The server is `serve PORT echo`.
 *
 * Every message is 1 KB of a pattern that no other message of the run has, so that a byte of
 * another connection or of another time shows. Steps, each begun by a line on standard input:
 *   opens all and sends one message on each, then prints "open";
 *   sends message after message on the busy ones for SECONDS, then prints "worked";
 *   sends one more on each, closes all, and prints one JSON object.
 * An error is a connection that was refused, ended, fell silent or answered wrongly; it is counted,
 * and that connection left alone.
 */
#include "common.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define EVENTS 256
#define MAX_COUNT 60000
#define MESSAGE_BYTES 1024
/* How many are opened or asked at a time: what an accept queue of a small limit takes. */
#define AT_ONCE 64

struct link {
    int fd;
    int waiting;
    uint32_t turn;
    size_t received;
};

static struct link *links;
static long count, alive, errors, messages;
static int poller;

/* Fills or compares: word i of message `turn` on link `index`, by a mixer without fixed points. */
static void pattern(long index, uint32_t turn, uint64_t *words) {
    uint64_t seed = ((uint64_t)index << 32) + turn + 1;
    for (size_t i = 0; i < MESSAGE_BYTES / sizeof(*words); i++) {
        uint64_t mixed = seed + i * 0x9e3779b97f4a7c15u;
        mixed = (mixed ^ (mixed >> 30)) * 0xbf58476d1ce4e5b9u;
        words[i] = mixed ^ (mixed >> 27);
    }
}

static void lose(struct link *link, const char *why) {
    if (errors++ < 5) fprintf(stderr, "connection %ld: %s\n", (long)(link - links), why);
    close(link->fd);
    link->fd = -1;
    link->waiting = 0;
    alive--;
}

static void ask(struct link *link) {
    uint64_t words[MESSAGE_BYTES / sizeof(uint64_t)];
    pattern(link - links, ++link->turn, words);
    link->received = 0;
    link->waiting = 1;
    if (send(link->fd, words, sizeof(words), MSG_NOSIGNAL) != (ssize_t)sizeof(words)) {
        lose(link, strerror(errno));
    }
}

static void dial(const struct address *to, struct link *link) {
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = link};
    link->fd = open_socket(to, SOCK_NONBLOCK);
    link->waiting = 1;
    alive++;
    if (connect(link->fd, (const struct sockaddr *)&to->to, to->length) && errno != EINPROGRESS) {
        lose(link, strerror(errno));
    } else if (epoll_ctl(poller, EPOLL_CTL_ADD, link->fd, &event)) {
        fail_errno("epoll_ctl");
    }
}

/* Returns 1 when an answer is whole and right. */
static int hear(struct link *link) {
    uint64_t words[MESSAGE_BYTES / sizeof(uint64_t)];
    char data[MESSAGE_BYTES];
    ssize_t length = recv(link->fd, data, sizeof(data), 0);
    if (length < 0 && errno == EAGAIN) return 0;
    if (length <= 0) {
        lose(link, length ? strerror(errno) : "ended");
        return 0;
    }
    if (!link->waiting || link->received + (size_t)length > MESSAGE_BYTES) {
        lose(link, "more than was asked for");
        return 0;
    }
    pattern(link - links, link->turn, words);
    if (memcmp((char *)words + link->received, data, (size_t)length)) {
        lose(link, "wrong bytes");
        return 0;
    }
    link->received += (size_t)length;
    if (link->received < MESSAGE_BYTES) return 0;
    link->waiting = 0;
    messages++;
    return 1;
}

/* Returns 1 when the link's exchange is over, in whatever way. */
static int advance(struct link *link, uint32_t events) {
    if (link->fd < 0) return 0;
    if (events & EPOLLOUT) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = link};
        int error = 0;
        socklen_t length = sizeof(error);
        if (getsockopt(link->fd, SOL_SOCKET, SO_ERROR, &error, &length)) fail_errno("SO_ERROR");
        if (error) {
            lose(link, strerror(error));
            return 1;
        }
        if (epoll_ctl(poller, EPOLL_CTL_MOD, link->fd, &event)) fail_errno("epoll_ctl");
        ask(link);
        return link->fd < 0;
    }
    return hear(link) || link->fd < 0;
}

static void give_up(void) {
    for (long i = 0; i < count; i++) {
        if (links[i].fd >= 0 && links[i].waiting) lose(&links[i], "no answer");
    }
}

/* One exchange on each link, AT_ONCE at a time; `to` opens them first. */
static void each(const struct address *to) {
    long begun = 0, running = 0;
    while (begun < count || running) {
        struct epoll_event events[EVENTS];
        for (; running < AT_ONCE && begun < count; begun++) {
            struct link *link = &links[begun];
            if (to)
                dial(to, link);
            else if (link->fd >= 0)
                ask(link);
            running += link->fd >= 0;
        }
        if (!running) continue;
        int ready = epoll_wait(poller, events, EVENTS, PATIENCE_SECONDS * 1000);
        if (!ready) {
            give_up();
            running = 0;
        }
        for (int i = 0; i < ready; i++) {
            struct link *link = events[i].data.ptr;
            int waited = link->waiting;
            running -= advance(link, events[i].events) && waited;
        }
    }
}

/* Returns how long it took, in seconds. */
static double work(long busy, long seconds) {
    long running = 0, step = count / busy;
    uint64_t began = now_ns(), until = began + (uint64_t)seconds * 1000000000u;
    for (long i = 0; i < busy; i++) {
        struct link *link = &links[i * step];
        if (link->fd < 0) continue;
        ask(link);
        running += link->fd >= 0;
    }
    while (running) {
        struct epoll_event events[EVENTS];
        int ready = epoll_wait(poller, events, EVENTS, PATIENCE_SECONDS * 1000);
        if (!ready) {
            give_up();
            break;
        }
        int more = now_ns() < until;
        for (int i = 0; i < ready; i++) {
            struct link *link = events[i].data.ptr;
            int waited = link->waiting;
            if (!advance(link, events[i].events) || !waited) continue;
            if (more && link->fd >= 0) ask(link);
            if (link->fd < 0 || !link->waiting) running--;
        }
    }
    return (double)(now_ns() - began) / 1e9;
}

/* The next step begins with a line from whoever watches. */
static void wait_for_word(const char *said) {
    char line[16];
    printf("%s\n", said);
    fflush(stdout);
    if (!fgets(line, sizeof(line), stdin)) fail("standard input ended early");
}

int main(int argc, char **argv) {
    if (argc != 6) fail("usage: many HOST PORT COUNT BUSY SECONDS");
    struct address to = address_of(argv[1], argv[2]);
    count = number(argv[3], 1, MAX_COUNT);
    long busy = number(argv[4], 1, count);
    long seconds = number(argv[5], 1, 3600);
    raise_file_limit();
    links = calloc((size_t)count, sizeof(*links));
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (!links || poller < 0) fail_errno("no memory or descriptor");
    each(&to);
    wait_for_word("open");
    long before = messages;
    double took = work(busy, seconds);
    long exchanged = messages - before;
    wait_for_word("worked");
    each(NULL);
    long held = alive;
    for (long i = 0; i < count; i++) {
        if (links[i].fd >= 0) close(links[i].fd);
    }
    printf("{\"connections\": %ld, \"held\": %ld, \"errors\": %ld, \"messages\": %ld, "
           "\"exchanged\": %ld, \"seconds\": %.6f}\n",
           count, held, errors, messages, exchanged, took);
    return 0;
}
