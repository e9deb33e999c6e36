#include "glitch.h"

#define PREFACE_BYTES 24
#define FLAG_END_STREAM 0x1
#define FLAG_END_HEADERS 0x4
#define FLAG_PADDED 0x8

/* RFC 9113, 6. */
enum {
    DATA,
    HEADERS,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    PUSH_PROMISE,
    PING,
    GOAWAY,
    WINDOW_UPDATE,
    CONTINUATION,
    TYPES
};

static const char *const too_many[TYPES + 1] = {
    [DATA] = "too many empty DATA frames",
    [HEADERS] = "a header block that is too large",
    [PRIORITY] = "too many PRIORITY frames",
    [RST_STREAM] = "too many streams reset before they were answered",
    [SETTINGS] = "too many SETTINGS frames",
    [PUSH_PROMISE] = "too many PUSH_PROMISE frames",
    [PING] = "too many PING frames",
    [GOAWAY] = "too many GOAWAY frames",
    [WINDOW_UPDATE] = "too many WINDOW_UPDATE frames",
    [CONTINUATION] = "too many CONTINUATION frames",
    [TYPES] = "too many frames of unknown types",
};

void zt_glitch_init(struct zt_glitch *g, bool server, uint64_t now_us) {
    *g = (struct zt_glitch){
        .skip = server ? PREFACE_BYTES : 0, .budget = ZT_GLITCH_BURST, .refilled = now_us};
}

void zt_glitch_earn(struct zt_glitch *g, size_t n) {
    size_t most = (size_t)(ZT_GLITCH_BURST - g->budget);

    g->budget += (int32_t)(n < most ? n : most);
}

void zt_glitch_sent(struct zt_glitch *g, size_t bytes) {
    g->updates += ZT_GLITCH_UPDATES(bytes);
}

bool zt_glitch_one(struct zt_glitch *g, uint64_t now_us) {
    if (g->budget == 0) {
        uint64_t earned = (now_us - g->refilled) / (ZT_SECONDS(1) / ZT_GLITCH_RATE);

        zt_glitch_earn(g, earned);
        if (g->budget == 0) return false;
        g->refilled = now_us;
    }
    g->budget--;
    return true;
}

static uint32_t length_of(const struct zt_glitch *g) {
    return (uint32_t)g->head[0] << 16 | (uint32_t)g->head[1] << 8 | g->head[2];
}

/* RFC 9113, 6.1: the payload of padded DATA begins with the length of its padding. */
static bool padded(const struct zt_glitch *g) {
    return g->head[3] == DATA && (g->head[4] & FLAG_PADDED) && length_of(g) > 0;
}

/* How much of the frame is to be seen before it can be judged. */
static size_t wanted(const struct zt_glitch *g) {
    return ZT_FRAME_HEADER + (g->have >= ZT_FRAME_HEADER && padded(g));
}

/* Whether the frame at hand does work for a stream, or ends one in good order. */
static bool useful(const struct zt_glitch *g) {
    uint32_t nothing = padded(g) ? 1u + g->head[ZT_FRAME_HEADER] : 0;

    /* A request costs what any connection costs, and is bounded and counted as one. */
    if (g->head[3] == HEADERS) return true;
    if (g->head[3] != DATA) return false;
    return length_of(g) > nothing || (g->head[4] & FLAG_END_STREAM);
}

static const char *judge(struct zt_glitch *g, uint64_t now_us) {
    uint32_t length = length_of(g);
    uint8_t type = g->head[3] < TYPES ? g->head[3] : TYPES;

    g->skip = length - padded(g);
    if (type == HEADERS || type == CONTINUATION) {
        /* What is larger encoded is larger decoded; libnghttp2 would decode some blocks that it
         * ignores without telling of their fields. A frame too large is its to refuse. */
        g->block = type == HEADERS ? length : g->block + length;
        if (g->block > ZT_MAX_HEADER_BYTES && length <= ZT_MAX_FRAME) return too_many[HEADERS];
        if (g->head[4] & FLAG_END_HEADERS) g->block = 0;
    }
    if (type == WINDOW_UPDATE && g->updates) {
        g->updates--;
        return NULL;
    }
    return useful(g) || zt_glitch_one(g, now_us) ? NULL : too_many[type];
}

const char *zt_glitch_seen(struct zt_glitch *g, const uint8_t *data, size_t len, uint64_t now_us) {
    while (len) {
        const char *excess;
        size_t n;

        if (g->skip) {
            n = g->skip < len ? g->skip : len;
            g->skip -= (uint32_t)n;
        } else {
            n = wanted(g) - g->have;
            if (n > len) n = len;
            memcpy(g->head + g->have, data, n);
            g->have = (uint8_t)(g->have + n);
            if (g->have == wanted(g)) {
                g->have = 0;
                excess = judge(g, now_us);
                if (excess) return excess;
            }
        }
        data += n;
        len -= n;
    }
    return NULL;
}
