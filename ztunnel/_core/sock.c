/* Sockets that the core dials, each in its pod's network namespace. */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <unistd.h>

#include "conn.h"

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

/* What the field's node proxy uses: a dead peer is noticed within half an hour. */
#define KEEPALIVE_IDLE_S 180
#define KEEPALIVE_INTERVAL_S 180
#define KEEPALIVE_PROBES 9

static int set(int fd, int level, int name, int value) {
    return setsockopt(fd, level, name, &value, sizeof(value)) < 0 ? -errno : 0;
}

static int open_in(struct zt_worker *w, const struct zt_pod *pod, bool v4, int mark) {
    int fd, rv;

    if (w->netns != pod) {
        /* A worker's thread wanders: it has no namespace of its own to go back to. */
        w->netns = NULL;
        if (setns(pod->netns, CLONE_NEWNET) < 0) return -errno;
        w->netns = pod;
    }
    fd = socket(v4 ? AF_INET : AF_INET6, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP);
    if (fd < 0) return -errno;
    rv = set(fd, SOL_SOCKET, SO_MARK, mark);
    if (!rv) rv = set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    if (rv) {
        close(fd);
        return rv;
    }
    return fd;
}

/* An application's socket is closed by a reset unless we say otherwise at its end: if this process
 * dies, what was under way must not look complete. Accepted ones inherit it from their listener. */
static int linger(int fd, bool now) {
    struct linger l = {.l_onoff = now, .l_linger = 0};

    return setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof(l)) < 0 ? -errno : 0;
}

static int bound_unsent(int fd) {
    return set(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, ZT_UNSENT_BYTES);
}

/* For sockets that leave the pod. On lo the kernel knows when the application has gone. */
static int keep_alive(int fd) {
    int rv = set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);

    if (!rv) rv = set(fd, IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_S);
    if (!rv) rv = set(fd, IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S);
    if (!rv) rv = set(fd, IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_PROBES);
    return rv;
}

int zt_sock_share(int fd) {
    return set(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, ZT_UNSENT);
}

static int bind_to(int fd, const struct zt_addr *from) {
    struct zt_addr any_port = *from;
    struct sockaddr_storage ss;
    socklen_t len;

    any_port.port = 0;
    len = zt_addr_to_sockaddr(&any_port, &ss);
    /* The port is chosen by connect(), for the whole four-tuple: no port runs out early. */
    set(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
    return bind(fd, (void *)&ss, len) < 0 ? -errno : 0;
}

static int connect_to(int fd, const struct zt_addr *to) {
    struct sockaddr_storage ss;
    socklen_t len = zt_addr_to_sockaddr(to, &ss);

    if (connect(fd, (void *)&ss, len) < 0 && errno != EINPROGRESS) return -errno;
    return 0;
}

static int finish(int fd, int rv) {
    if (rv) {
        close(fd);
        return rv;
    }
    return fd;
}

int zt_sock_to_peer(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *to) {
    int fd = open_in(w, pod, zt_addr_is_v4(to), ZT_MARK_TUNNEL), rv;

    if (fd < 0) return fd;
    rv = keep_alive(fd);
    if (!rv) rv = zt_sock_share(fd);
    if (!rv) rv = connect_to(fd, to);
    return finish(fd, rv);
}

int zt_sock_forward(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *from,
                    const struct zt_addr *to) {
    int fd = open_in(w, pod, zt_addr_is_v4(to), ZT_MARK_TUNNEL), rv;

    if (fd < 0) return fd;
    rv = linger(fd, true);
    if (!rv) rv = bound_unsent(fd);
    if (!rv) rv = keep_alive(fd);
    if (!rv && zt_addr_is_v4(from) == zt_addr_is_v4(to)) rv = bind_to(fd, from);
    if (!rv) rv = connect_to(fd, to);
    return finish(fd, rv);
}

int zt_sock_deliver(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *from,
                    const struct zt_addr *to) {
    bool v4 = zt_addr_is_v4(to);
    int fd, rv;

    if (zt_addr_is_v4(from) != v4) return -EAFNOSUPPORT;
    fd = open_in(w, pod, v4, ZT_MARK_DELIVER);
    if (fd < 0) return fd;
    /* Bound to lo, so that the capture program takes it for ours and not for one from outside. */
    rv = v4 ? set(fd, IPPROTO_IP, IP_TRANSPARENT, 1) : set(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, 1);
    if (!rv) rv = linger(fd, true);
    if (!rv) rv = bound_unsent(fd);
    if (!rv && setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, "lo", 3) < 0) rv = -errno;
    if (!rv) rv = bind_to(fd, from);
    if (!rv) rv = connect_to(fd, to);
    return finish(fd, rv);
}

int zt_sock_error(int fd) {
    int error = 0;
    socklen_t len = sizeof(error);

    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) < 0) return errno;
    return error;
}

void zt_sock_abort(int fd) {
    linger(fd, true);
    close(fd);
}

void zt_sock_close(int fd) {
    linger(fd, false);
    close(fd);
}
