/*
 * Invariant: a question is asked for a request exactly when RFC 9113, 8.5 and the authority's grammar
 * allow it (CONNECT and nothing but; an address of the pod's, spelled in one way, and a port), and it
 * is asked for the address and port that the authority spells.
 *
 * The grammar is written here a second time, by other means than the core's. Input: header fields,
 * each a byte for the name, a byte for the value, and, where that says so, the value's own length and
 * bytes. They go through HPACK, now and then in pieces.
 */
#include <stdlib.h>

#include "rig/rig.h"

#define FIELDS 12
#define VALUE 256

struct field {
    const char *name;
    uint8_t value[VALUE];
    size_t len;
};

static const char *const names[] = {":method",   ":authority", ":path",      ":scheme",
                                    ":protocol", "host",       "baggage",    "forwarded",
                                    "te",        "x-other",    "connection", ":status"};
static const char *const values[] = {"CONNECT",
                                     "10.0.0.1:8080",
                                     "10.0.0.1:80",
                                     "[::ffff:10.0.0.1]:80",
                                     "10.0.0.1:0",
                                     "10.0.0.1",
                                     "10.0.0.01:80",
                                     "10.0.0.1:65536",
                                     "[fd00::3]:443",
                                     "connect",
                                     "GET",
                                     "/",
                                     "https",
                                     "websocket",
                                     "trailers",
                                     "",
                                     "10.0.0.1:080",
                                     "10.0.0.1:65535",
                                     "user@10.0.0.1:80",
                                     "10.0.0.2:80",
                                     "10.0.0.1:80 ",
                                     "k8s.cluster.name=a",
                                     "for=\"10.0.0.2\"",
                                     "httpbin.default:80"};

static const uint8_t *input;
static size_t left;
static struct field fields[FIELDS];
static size_t nfields;
static bool pieces;

/* --- the grammar --------------------------------------------------------------------------------------- */

static bool is(const struct field *f, const char *name) {
    return strcmp(f->name, name) == 0;
}

/* decimal number without leading zeros, at most `most`; moves `at` behind it. */
static bool number(const uint8_t *text, size_t len, size_t *at, unsigned most, unsigned *out) {
    size_t from = *at;

    *out = 0;
    while (*at < len && text[*at] >= '0' && text[*at] <= '9' && *at - from < 6)
        *out = *out * 10 + text[(*at)++] - '0';
    return *at > from && (*at == from + 1 || text[from] != '0') && *out <= most;
}

/* "10.0.0.1:port", the only addresses of this pod. */
static bool authority(const struct field *f, unsigned *port) {
    static const unsigned ours[4] = {10, 0, 0, 1};
    size_t at = 0;

    for (int i = 0; i < 4; i++) {
        unsigned octet;

        if (!number(f->value, f->len, &at, 255, &octet) || octet != ours[i]) return false;
        if (at == f->len || f->value[at++] != (i < 3 ? '.' : ':')) return false;
    }
    return number(f->value, f->len, &at, 65535, port) && at == f->len && *port > 0;
}

/* RFC 9110, 5.5: no control character but a tab inside, no space around. */
static bool plain(const struct field *f) {
    for (size_t i = 0; i < f->len; i++) {
        uint8_t c = f->value[i];

        if ((c < 32 && c != '\t') || c == 127) return false;
        if ((i == 0 || i == f->len - 1) && (c == ' ' || c == '\t')) return false;
    }
    return true;
}

enum verdict { NEVER, MUST, MAY };

/* MAY: RFC 9113 leaves it to the receiver, or nghttp2 is stricter than it. */
static enum verdict allowed(unsigned *port) {
    const struct field *method = NULL, *target = NULL;
    bool regular = false, may = false;

    for (size_t i = 0; i < nfields; i++) {
        const struct field *f = &fields[i];

        if (f->name[0] == ':') {
            if (regular) return NEVER; /* 8.3 */
            if (is(f, ":method") && !method)
                method = f;
            else if (is(f, ":authority") && !target)
                target = f;
            else
                return NEVER; /* 8.5: no :path and no :scheme; once each; RFC 8441 is not spoken */
        } else {
            regular = true;
            if (!plain(f)) { /* nghttp2 drops the field, whatever it is */
                may = true;
                continue;
            }
            if (is(f, "connection")) return NEVER; /* 8.2.2 */
            if (is(f, "te") && (f->len != 8 || memcmp(f->value, "trailers", 8) != 0)) return NEVER;
            may |= is(f, "host");
        }
    }
    if (!method || method->len != 7 || memcmp(method->value, "CONNECT", 7) != 0) return NEVER;
    if (!target || !authority(target, port)) return NEVER;
    return may ? MAY : MUST;
}

/* --- the request ----------------------------------------------------------------------------------------- */

static uint8_t next_byte(void) {
    if (!left) return 0;
    left--;
    return *input++;
}

static void read_fields(void) {
    pieces = next_byte() & 1;
    nfields = 0;
    while (left && nfields < FIELDS) {
        struct field *f = &fields[nfields++];
        uint8_t which;

        f->name = names[next_byte() % (sizeof(names) / sizeof(names[0]))];
        which = next_byte();
        if (which & 0x80) {
            f->len = next_byte();
            if (f->len > left) f->len = left;
            memcpy(f->value, input, f->len);
            input += f->len;
            left -= f->len;
        } else {
            const char *value = values[which % (sizeof(values) / sizeof(values[0]))];

            f->len = strlen(value);
            memcpy(f->value, value, f->len);
        }
    }
}

static void frame(uint8_t type, uint8_t flags, const uint8_t *body, size_t len) {
    uint8_t head[9] = {
        (uint8_t)(len >> 16), (uint8_t)(len >> 8), (uint8_t)len, type, flags, 0, 0, 0, 1};

    RIG_REQUIRE(world_send(head, sizeof(head)) == sizeof(head));
    RIG_REQUIRE(world_send(body, len) == len);
}

static void begin(void) {
    static const uint8_t preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";
    static uint8_t block[FIELDS * (VALUE + 64)];
    nghttp2_nv nva[FIELDS];
    nghttp2_hd_deflater *deflater;
    ssize_t len;

    world_begin();
    world_accept(ZT_INBOUND_HBONE, &world_remote, &world_local);
    RIG_REQUIRE(world_send(preface, sizeof(preface)) == sizeof(preface));
    for (size_t i = 0; i < nfields; i++)
        nva[i] = (nghttp2_nv){(uint8_t *)(uintptr_t)fields[i].name, fields[i].value,
                              strlen(fields[i].name), fields[i].len, NGHTTP2_NV_FLAG_NONE};
    RIG_REQUIRE(nghttp2_hd_deflate_new(&deflater, 4096) == 0);
    len = nghttp2_hd_deflate_hd(deflater, block, sizeof(block), nva, nfields);
    nghttp2_hd_deflate_del(deflater);
    RIG_REQUIRE(len >= 0);
    if (pieces) {
        frame(1, 0, block, (size_t)len / 2);
        frame(9, 4, block + len / 2, (size_t)len - (size_t)len / 2);
    } else {
        frame(1, 4, block, (size_t)len);
    }
}

static bool step(void) {
    return false;
}

static void end(void) {
    unsigned port = 0;
    enum verdict verdict = allowed(&port);

    if (verdict == NEVER) RIG_REQUIRE(world.questions == 0);
    if (verdict == MUST) RIG_REQUIRE(world.questions == 1);
    if (world.questions) {
        RIG_REQUIRE(world.questions == 1 && world.asked.port == port);
        RIG_REQUIRE(zt_addr_ip_equal(&world.asked, &world_local));
    }
    world_end();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data;
    left = size;
    read_fields();
    rig_run(begin, step, end);
    return 0;
}
