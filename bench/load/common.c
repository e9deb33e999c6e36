#include "common.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* An hour of 10 µs each: far beyond any scenario, and 1.4 GB at most. */
#define MAX_SAMPLES 360000000
#define FIRST_SAMPLES 65536

void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

void fail_errno(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

long number(const char *text, long least, long most) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || *end || end == text || value < least || value > most) {
        fprintf(stderr, "%s: a number from %ld to %ld is expected\n", text, least, most);
        exit(2);
    }
    return value;
}

struct address address_of(const char *host, const char *port) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST};
    struct addrinfo *found;
    struct address result = {0};
    int error = getaddrinfo(host, port, &hints, &found);
    if (error) {
        fprintf(stderr, "%s port %s: %s\n", host, port, gai_strerror(error));
        exit(2);
    }
    memcpy(&result.to, found->ai_addr, found->ai_addrlen);
    result.length = found->ai_addrlen;
    freeaddrinfo(found);
    return result;
}

void raise_file_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) fail_errno("getrlimit");
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit)) fail_errno("setrlimit");
}

void no_delay(int fd) {
    int one = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one))) fail_errno("TCP_NODELAY");
}

int open_socket(const struct address *address, int flags) {
    struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
    int fd = socket(address->to.ss_family, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0) fail_errno("socket");
    no_delay(fd);
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience))) {
        fail_errno("setsockopt");
    }
    return fd;
}

int listen_on(long port) {
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    int one = 1, zero = 0;
    int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) fail_errno("socket");
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero))) {
        fail_errno("setsockopt");
    }
    if (bind(fd, (struct sockaddr *)&any, sizeof(any))) fail_errno("bind");
    if (listen(fd, SOMAXCONN)) fail_errno("listen");
    return fd;
}

void samples_add(struct samples *samples, uint64_t ns) {
    if (samples->count == samples->limit) {
        size_t limit = samples->limit ? samples->limit * 2 : FIRST_SAMPLES;
        uint32_t *at = limit > MAX_SAMPLES ? NULL : realloc(samples->at, limit * sizeof(*at));
        if (!at) fail("too many samples");
        samples->at = at;
        samples->limit = limit;
    }
    samples->at[samples->count++] = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

static int ascending(const void *left, const void *right) {
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

/* The smallest sample that at least `share` of all do not exceed (nearest rank). */
static uint32_t percentile(const struct samples *samples, double share) {
    size_t rank = (size_t)(share * (double)samples->count);
    if ((double)rank < share * (double)samples->count) rank++;
    return samples->at[rank ? rank - 1 : 0];
}

void samples_print(struct samples *samples) {
    if (!samples->count) fail("nothing was measured");
    qsort(samples->at, samples->count, sizeof(*samples->at), ascending);
    printf("\"count\": %zu, \"min_ns\": %u, \"p50_ns\": %u, \"p90_ns\": %u, \"p99_ns\": %u, "
           "\"p999_ns\": %u, \"max_ns\": %u",
           samples->count, samples->at[0], percentile(samples, 0.5), percentile(samples, 0.9),
           percentile(samples, 0.99), percentile(samples, 0.999), samples->at[samples->count - 1]);
}
