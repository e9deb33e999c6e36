/*
 * What the load programs share: sockets, time, and percentiles of everything that was measured.
 *
 * They stand in for an application: one thread, epoll, no library. Each ends with a message on
 * standard error and code 1 when something is not as it should be, so that no figure ever comes
 * from a broken run.
 */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

/* The request and the answer of every scenario: HTTP/1.1 on a kept-alive connection, 1 KB of body. */
#define BODY_BYTES 1024
#define REQUEST "GET / HTTP/1.1\r\nHost: bench\r\nUser-Agent: load\r\nAccept: */*\r\n\r\n"
#define HEAD "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 1024\r\n\r\n"
#define REQUEST_BYTES (sizeof(REQUEST) - 1)
#define ANSWER_BYTES (sizeof(HEAD) - 1 + BODY_BYTES)

/* No subject takes a thousandth of it for one answer: after that, something is broken. */
#define PATIENCE_SECONDS 10

struct address {
    struct sockaddr_storage to;
    socklen_t length;
};

/* Times in nanoseconds, kept one by one: percentiles are exact. Beyond `limit` it ends the program. */
struct samples {
    uint32_t *at;
    size_t count;
    size_t limit;
};

_Noreturn void fail(const char *what);
_Noreturn void fail_errno(const char *what);

uint64_t now_ns(void);
long number(const char *text, long least, long most);
struct address address_of(const char *host, const char *port);

/* As many descriptors as the hard limit allows. */
void raise_file_limit(void);

/* A socket without Nagle's delay on which no call blocks for ever; `listen_on` takes IPv4 and IPv6. */
int open_socket(const struct address *address, int flags);
int listen_on(long port);
void no_delay(int fd);

void samples_add(struct samples *samples, uint64_t ns);
/* Sorts, and prints `"count": …, "p50_ns": …` and so on, without braces. */
void samples_print(struct samples *samples);

#endif
