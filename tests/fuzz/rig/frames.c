/*
 * An input as HTTP/2 frames (RFC 9113, 4.1) among which are things for the world to do, and its
 * mutation frame by frame: an input that has lost its framing fuzzes nothing but the framing.
 */
#include <stdlib.h>

#include "rig.h"

#define HEADER 9
#define MOST_FRAMES 256
#define MOST_PAYLOAD 8192

struct span {
    size_t at, len;
};

static size_t length_of(const uint8_t *frame) {
    return (size_t)frame[0] << 16 | (size_t)frame[1] << 8 | frame[2];
}

/* --- an input as steps ------------------------------------------------------------------------------- */

static const uint8_t *input;
static void (*opening)(uint8_t how);
static size_t left, unsent; /* unsent: of what lies before `input`, what the socket did not take */

static bool step(void) {
    const uint8_t *from = input - unsent;
    size_t n = unsent, sent;

    while (left >= HEADER && input[3] < FRAMES_OP) {
        size_t len = HEADER + length_of(input);

        if (len > left) len = left;
        input += len;
        left -= len;
        n += len;
    }
    if (left < HEADER) { /* the rest of a frame that never comes */
        input += left;
        n += left;
        left = 0;
    }
    if (n) {
        sent = world_send(from, n);
        unsent = n - sent;
        if (sent) return true; /* its own turn, then the rest */
        unsent = 0;            /* the core reads no more: never mind */
        return left > 0;
    }
    if (left) {
        size_t len = length_of(input);

        if (len > left - HEADER) len = left - HEADER;
        world_do(input[3] - FRAMES_OP, input + HEADER, len);
        input += HEADER + len;
        left -= HEADER + len;
        return true;
    }
    return false;
}

static void begin(void) {
    uint8_t how = *input++;

    left--;
    world_begin();
    opening(how);
}

int frames_run(const uint8_t *data, size_t size, void (*begins)(uint8_t how)) {
    if (size < 1) return 0;
    input = data;
    left = size;
    unsent = 0;
    opening = begins;
    rig_run(begin, step, world_end);
    return 0;
}

/* --- mutation ------------------------------------------------------------------------------------------ */

static uint32_t state;

static uint32_t chance(uint32_t below) {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return below ? state % below : 0;
}

static size_t parse(const uint8_t *data, size_t size, struct span spans[MOST_FRAMES]) {
    size_t n = 0, at = 0;

    while (n < MOST_FRAMES && size - at >= HEADER) {
        size_t len = HEADER + length_of(data + at);

        if (len > size - at) len = size - at;
        spans[n++] = (struct span){at, len};
        at += len;
    }
    return n;
}

static uint8_t *put(uint8_t *to, uint8_t type, uint8_t flags, uint32_t stream, size_t len) {
    to[0] = (uint8_t)(len >> 16);
    to[1] = (uint8_t)(len >> 8);
    to[2] = (uint8_t)len;
    to[3] = type;
    to[4] = flags;
    to[5] = (uint8_t)(stream >> 24);
    to[6] = (uint8_t)(stream >> 16);
    to[7] = (uint8_t)(stream >> 8);
    to[8] = (uint8_t)stream;
    return to + HEADER;
}

static void put_u32(uint8_t *to, uint32_t n) {
    to[0] = (uint8_t)(n >> 24);
    to[1] = (uint8_t)(n >> 16);
    to[2] = (uint8_t)(n >> 8);
    to[3] = (uint8_t)n;
}

static uint32_t some_u32(void) {
    static const uint32_t some[] = {0, 1, 100, 65535, 65536, 0x3fffff, 0x400000, 0x7fffffff, 1000};

    return some[chance(sizeof(some) / sizeof(some[0]))];
}

/* Literal fields without indexing (RFC 7541, 6.2.2), so that each block stands alone; now and then
 * an indexed one or a table size update. */
static size_t put_headers(uint8_t *to, bool server) {
    static const struct {
        const char *name, *value;
    } request[] = {{":method", "CONNECT"},
                   {":authority", "10.0.0.1:8080"},
                   {":authority", "[fd00::3]:80"},
                   {":method", "GET"},
                   {":path", "/"},
                   {":scheme", "https"},
                   {":protocol", "websocket"},
                   {"baggage", "k8s.cluster.name=a"},
                   {"forwarded", "for=\"10.0.0.2\""},
                   {"te", "trailers"},
                   {"content-length", "5"},
                   {"Upper", "case"},
                   {"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"},
                   {"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"}},
      answer[] = {{":status", "200"},     {":status", "100"}, {":status", "401"},
                  {":status", "503"},     {"server", "x"},    {":status", "999"},
                  {"content-length", "0"}};
    size_t used = 0;
    uint32_t fields = server ? 2 + chance(2) : 1 + chance(2);

    for (uint32_t i = 0; i < fields; i++) {
        uint32_t usual = chance(8) ? (i < 2 ? i : 7 + chance(7)) : chance(14);
        const char *name, *value;
        size_t name_len, value_len;

        if (server) {
            name = request[usual].name;
            value = request[usual].value;
        } else {
            usual = chance(4) ? (i ? 4 : 0) : chance(7);
            name = answer[usual].name;
            value = answer[usual].value;
        }
        if (!chance(32)) {
            to[used++] = (uint8_t)(0x80 | chance(70)); /* indexed */
            continue;
        }
        if (!chance(64)) {
            to[used++] = (uint8_t)(0x20 | chance(32)); /* the table's size */
            continue;
        }
        name_len = strlen(name);
        value_len = strlen(value);
        to[used++] = chance(16) ? 0 : 0x40;
        to[used++] = (uint8_t)name_len;
        memcpy(to + used, name, name_len);
        used += name_len;
        to[used++] = (uint8_t)value_len;
        memcpy(to + used, value, value_len);
        used += value_len;
    }
    return used;
}

/* A frame that means something, into room for MOST_PAYLOAD. */
static size_t make(uint8_t *to, bool server) {
    uint32_t stream = 1 + 2 * chance(chance(4) ? 3 : 300), type = chance(16);
    uint8_t *body = to + HEADER;
    size_t len;

    if (type >= 11) { /* for the world */
        body[0] = (uint8_t)chance(chance(2) ? 4 : 256);
        body[1] = (uint8_t)chance(256);
        body[2] = (uint8_t)chance(256);
        put(to, (uint8_t)(FRAMES_OP + chance(WORLD_OP_COUNT)), 0, 0, 3);
        return HEADER + 3;
    }
    switch (type) {
    case 0: { /* DATA, at times padded */
        uint8_t flags = (uint8_t)(chance(3) == 0 ? 1 : chance(8) == 0 ? 8 : 0);

        len = chance(4) ? chance(64) : chance(MOST_PAYLOAD);
        memset(body, 'x', len);
        if (flags & 8 && len) body[0] = (uint8_t)chance((uint32_t)len < 256 ? (uint32_t)len : 256);
        put(to, 0, flags, stream, len);
        return HEADER + len;
    }
    case 1:
    case 9:
    case 10:
        len = put_headers(body, server);
        put(to, type == 9 && !chance(4) ? 9 : 1,
            (uint8_t)(chance(8)   ? 4
                      : chance(2) ? 5
                                  : 0),
            stream, len);
        return HEADER + len;
    case 2:
        put_u32(body, chance(2) ? 0 : stream);
        body[4] = (uint8_t)chance(256);
        put(to, 2, 0, stream, 5);
        return HEADER + 5;
    case 3:
        put_u32(body, chance(14));
        put(to, 3, 0, stream, 4);
        return HEADER + 4;
    case 4:
        len = 6 * chance(4);
        for (size_t i = 0; i < len; i += 6) {
            body[i] = 0;
            body[i + 1] = (uint8_t)(1 + chance(8));
            put_u32(body + i + 2, some_u32());
        }
        put(to, 4, (uint8_t)(chance(8) == 0), 0, chance(8) ? len : 0);
        return HEADER + (size_t)(to[2]);
    case 5:
        put_u32(body, stream + 1);
        len = 4 + put_headers(body + 4, true);
        put(to, 5, 4, stream, len);
        return HEADER + len;
    case 6:
        memset(body, 'p', 8);
        put(to, 6, (uint8_t)chance(2), 0, 8);
        return HEADER + 8;
    case 7:
        put_u32(body, chance(2) ? 0x7fffffff : stream);
        put_u32(body + 4, chance(14));
        put(to, 7, 0, 0, 8);
        return HEADER + 8;
    default:
        put_u32(body, some_u32());
        put(to, 8, 0, chance(2) ? 0 : stream, 4);
        return HEADER + 4;
    }
}

/* Replaces `len` bytes at `at` by `new_len` others; the new size, or the old one when it is full. */
static size_t replace(uint8_t *data, size_t size, size_t most, struct span old, const uint8_t *by,
                      size_t by_len) {
    if (size - old.len + by_len > most) return size;
    memmove(data + old.at + by_len, data + old.at + old.len, size - old.at - old.len);
    memcpy(data + old.at, by, by_len);
    return size - old.len + by_len;
}

static size_t mutate_payload(uint8_t *data, size_t size, size_t most, struct span frame) {
    static uint8_t copy[HEADER + 2 * MOST_PAYLOAD];
    size_t len = frame.len - HEADER, room = len < MOST_PAYLOAD ? len + 64 : len;

    if (len > MOST_PAYLOAD) return size;
    memcpy(copy, data + frame.at, frame.len);
    len = LLVMFuzzerMutate(copy + HEADER, len, room);
    if (chance(16)) { /* and at times the length lies */
        copy[0] = (uint8_t)(len >> 16);
        copy[1] = (uint8_t)(len >> 8);
        copy[2] = (uint8_t)len;
    }
    return replace(data, size, most, frame, copy, HEADER + len);
}

static size_t mutate(uint8_t *data, size_t size, size_t most, unsigned seed, bool server) {
    static uint8_t made[HEADER + MOST_PAYLOAD + 64];
    struct span spans[MOST_FRAMES];
    size_t n = parse(data, size, spans), len;
    struct span at, other;

    state = seed | 1;
    at = n ? spans[chance((uint32_t)n)] : (struct span){0, 0};
    if (!n || chance(3) == 0) {
        bool before = chance(2);

        len = make(made, server);
        return replace(data, size, most, (struct span){before ? at.at : at.at + at.len, 0}, made,
                       len);
    }
    other = spans[chance((uint32_t)n)];
    if (at.len < HEADER) return LLVMFuzzerMutate(data, size, most);
    switch (chance(9)) {
    case 0:
        return replace(data, size, most, at, made, 0);
    case 1: /* once more, there or elsewhere */
        if (at.len > sizeof(made)) return size;
        memcpy(made, data + at.at, at.len);
        return replace(data, size, most, (struct span){other.at, 0}, made, at.len);
    case 2:
        data[at.at + 4] ^= (uint8_t)(1u << chance(8));
        return size;
    case 3: {
        uint32_t stream = chance(8) ? 1 + 2 * chance(4) : chance(8);

        data[at.at + 5] = data[at.at + 6] = 0;
        data[at.at + 7] = 0;
        data[at.at + 8] = (uint8_t)stream;
        return size;
    }
    case 4:
        data[at.at + 3] = (uint8_t)(chance(2) ? chance(12) : FRAMES_OP + chance(WORLD_OP_COUNT));
        return size;
    case 5:
        len = make(made, server);
        return replace(data, size, most, at, made, len);
    case 6:
        return LLVMFuzzerMutate(data, size, most);
    default:
        return mutate_payload(data, size, most, at);
    }
}

size_t frames_mutate(uint8_t *data, size_t size, size_t most, unsigned seed, bool server) {
    if (most < 2) return size;
    if (size == 0) data[size++] = 0;
    return 1 + mutate(data + 1, size - 1, most - 1, seed, server);
}
