/*
 * serve PORT: answers every request with 1 KB, for as long as the client likes.
 * serve PORT echo: sends back every byte instead.
 *
 * A request ends at an empty line; whatever it asks, the answer is the same. One thread with epoll,
 * so that the server's own cost is small and alike for every subject.
 */
#include "common.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define EVENTS 256
#define READ_BYTES 16384
#define MAX_FILES 1048576

static char answer[ANSWER_BYTES];
static int echoes;
/* By descriptor: how many bytes of the empty line have been seen. */
static unsigned char seen[MAX_FILES];

static void accept_all(int poller, int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EAGAIN || errno == ECONNABORTED) return;
            fail_errno("accept");
        }
        if (fd >= MAX_FILES) fail("too many connections");
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        seen[fd] = 0;
        no_delay(fd);
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) fail_errno("epoll_ctl");
    }
}

/* Returns how many requests end within what was read. */
static int requests(int fd, const char *data, size_t length) {
    static const char end[] = "\r\n\r\n";
    int count = 0;
    unsigned char state = seen[fd];
    for (size_t i = 0; i < length; i++) {
        state = data[i] == end[state] ? state + 1 : (unsigned char)(data[i] == end[0]);
        if (state == sizeof(end) - 1) {
            count++;
            state = 0;
        }
    }
    seen[fd] = state;
    return count;
}

/* Returns 0 when the connection is to be closed. */
static int serve(int fd) {
    char data[READ_BYTES];
    ssize_t length = recv(fd, data, sizeof(data), 0);
    if (length <= 0) return length < 0 && errno == EAGAIN;
    if (echoes) return send(fd, data, (size_t)length, MSG_NOSIGNAL) == length;
    for (int left = requests(fd, data, (size_t)length); left; left--) {
        /* A client that asks and does not read for 1 MB is none of ours. */
        if (send(fd, answer, sizeof(answer), MSG_NOSIGNAL) != (ssize_t)sizeof(answer)) return 0;
    }
    return 1;
}

int main(int argc, char **argv) {
    echoes = argc == 3 && !strcmp(argv[2], "echo");
    if (argc != 2 && !echoes) fail("usage: serve PORT [echo]");
    memcpy(answer, HEAD, sizeof(HEAD) - 1);
    memset(answer + sizeof(HEAD) - 1, 'x', BODY_BYTES);
    raise_file_limit();
    int listener = listen_on(number(argv[1], 1, 65535));
    int poller = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
    if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event)) fail_errno("epoll");
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(poller, events, EVENTS, -1);
        if (count < 0 && errno != EINTR) fail_errno("epoll_wait");
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                accept_all(poller, listener);
            } else if (!serve(fd)) {
                close(fd);
            }
        }
    }
}
