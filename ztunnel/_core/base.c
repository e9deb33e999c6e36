#include "base.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>

static const uint8_t v4_prefix[12] = {[10] = 0xff, [11] = 0xff};

bool zt_addr_is_v4(const struct zt_addr *a) {
    return memcmp(a->ip, v4_prefix, sizeof(v4_prefix)) == 0;
}

bool zt_addr_ip_equal(const struct zt_addr *a, const struct zt_addr *b) {
    return memcmp(a->ip, b->ip, sizeof(a->ip)) == 0;
}

void zt_addr_from_sockaddr(struct zt_addr *a, const struct sockaddr_storage *ss) {
    memset(a, 0, sizeof(*a));
    if (ss->ss_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)ss;

        memcpy(a->ip, v4_prefix, sizeof(v4_prefix));
        memcpy(a->ip + 12, &in->sin_addr, 4);
        a->port = ntohs(in->sin_port);
    } else if (ss->ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const void *)ss;

        memcpy(a->ip, &in6->sin6_addr, 16);
        a->port = ntohs(in6->sin6_port);
    }
}

socklen_t zt_addr_to_sockaddr(const struct zt_addr *a, struct sockaddr_storage *ss) {
    memset(ss, 0, sizeof(*ss));
    if (zt_addr_is_v4(a)) {
        struct sockaddr_in *in = (void *)ss;

        in->sin_family = AF_INET;
        in->sin_port = htons(a->port);
        memcpy(&in->sin_addr, a->ip + 12, 4);
        return sizeof(*in);
    }
    struct sockaddr_in6 *in6 = (void *)ss;

    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons(a->port);
    memcpy(&in6->sin6_addr, a->ip, 16);
    return sizeof(*in6);
}

int zt_addr_text(const struct zt_addr *a, char out[ZT_ADDR_TEXT]) {
    char ip[INET6_ADDRSTRLEN];

    if (zt_addr_is_v4(a)) {
        inet_ntop(AF_INET, a->ip + 12, ip, sizeof(ip));
        return snprintf(out, ZT_ADDR_TEXT, "%s:%u", ip, a->port);
    }
    inet_ntop(AF_INET6, a->ip, ip, sizeof(ip));
    return snprintf(out, ZT_ADDR_TEXT, "[%s]:%u", ip, a->port);
}

static int parse_port(const char *text, size_t len, uint16_t *port) {
    unsigned value = 0;

    if (len < 1 || len > 5 || text[0] == '0') return -EINVAL;
    for (size_t i = 0; i < len; i++) {
        if (text[i] < '0' || text[i] > '9') return -EINVAL;
        value = value * 10 + (unsigned)(text[i] - '0');
    }
    if (value > 65535) return -EINVAL;
    *port = (uint16_t)value;
    return 0;
}

int zt_authority_parse(const char *text, size_t len, struct zt_addr *out) {
    char ip[INET6_ADDRSTRLEN];
    const char *colon;
    size_t host_len;
    bool v6 = len > 0 && text[0] == '[';

    memset(out, 0, sizeof(*out));
    if (v6) {
        const char *end = memchr(text, ']', len);

        if (!end || (size_t)(end - text) + 1 >= len || end[1] != ':') return -EINVAL;
        colon = end + 1;
        text++;
        len--;
        host_len = (size_t)(end - text);
    } else {
        colon = memchr(text, ':', len);
        if (!colon) return -EINVAL;
        host_len = (size_t)(colon - text);
    }
    if (host_len == 0 || host_len >= sizeof(ip) || memchr(text, '\0', host_len)) return -EINVAL;
    memcpy(ip, text, host_len);
    ip[host_len] = '\0';
    if (v6) {
        /* Two spellings of one address are one too many: IPv4 is written as IPv4. */
        if (inet_pton(AF_INET6, ip, out->ip) != 1 || zt_addr_is_v4(out)) return -EINVAL;
    } else {
        /* inet_pton wants four decimal numbers without leading zeros; inet_aton would not. */
        if (inet_pton(AF_INET, ip, out->ip + 12) != 1) return -EINVAL;
        memcpy(out->ip, v4_prefix, sizeof(v4_prefix));
    }
    return parse_port(colon + 1, len - (size_t)(colon + 1 - text), &out->port);
}

void zt_observe(struct zt_histogram *h, uint64_t us) {
#define X(us) us,
    static const uint64_t bounds[ZT_BUCKETS] = {ZT_HISTOGRAM(X)};
#undef X
    size_t i = 0;

    while (i < ZT_BUCKETS && us > bounds[i]) i++;
    zt_add(&h->bucket[i], 1);
    zt_add(&h->sum_us, us);
}
