#include "trace.h"

#include <stdlib.h>
#include <sys/random.h>

#include "worker.h"

/* The last flag: the caller may have recorded (3.2.2.5.1). */
#define SAMPLED 0x01

/* --- chance ------------------------------------------------------------------------------------------ */

/* Ids must be different, not secret: one question to the kernel for each worker. SplitMix64 (Steele,
 * Lea, Flood: Fast splittable pseudorandom number generators, 2014). */
static uint64_t draw(struct zt_worker *w) {
    uint64_t z;

    while (!w->trace_seed) {
        if (getrandom(&w->trace_seed, sizeof(w->trace_seed), 0) != sizeof(w->trace_seed))
            w->trace_seed = zt_now_us() << 8 | (uint64_t)w->index;
    }
    z = w->trace_seed += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* Zeros are no id. */
static void draw_id(struct zt_worker *w, uint8_t *out, size_t len) {
    for (size_t at = 0; at < len; at += sizeof(uint64_t)) {
        uint64_t n = draw(w) | 1;

        memcpy(out + at, &n, sizeof(n));
    }
}

/* --- what is sampled ---------------------------------------------------------------------------------- */

void zt_trace_set(struct zt_core *core, bool on, uint64_t parts) {
    atomic_store_explicit(&core->tracing, on ? 1 + parts : 0, memory_order_relaxed);
}

static uint64_t tracing(const struct zt_core *core) {
    return atomic_load_explicit(&core->tracing, memory_order_relaxed);
}

bool zt_trace_on(const struct zt_core *core) {
    return tracing(core) > 0;
}

static struct zt_trace *trace_new(struct zt_worker *w) {
    uint64_t earned = (w->now - w->trace_at) * ZT_TRACE_RATE / ZT_SECONDS(1);
    struct zt_trace *t;

    if (earned) {
        w->trace_room += earned < ZT_TRACE_BURST ? (int)earned : ZT_TRACE_BURST;
        if (w->trace_room > ZT_TRACE_BURST) w->trace_room = ZT_TRACE_BURST;
        w->trace_at = w->now;
    }
    t = w->trace_room > 0 ? calloc(1, sizeof(*t)) : NULL;
    if (!t) {
        zt_add(&w->stats.traces_left_out, 1);
        return NULL;
    }
    w->trace_room--;
    draw_id(w, t->ids.span, sizeof(t->ids.span));
    return t;
}

struct zt_trace *zt_trace_begin(struct zt_worker *w) {
    uint64_t on = tracing(w->core);
    struct zt_trace *t;

    if (!on || draw(w) >> 32 >= on - 1) return NULL;
    t = trace_new(w);
    if (t) draw_id(w, t->ids.trace, sizeof(t->ids.trace));
    return t;
}

struct zt_trace *zt_trace_join(struct zt_worker *w, const struct zt_trace_ids *peer) {
    struct zt_trace *t = trace_new(w);

    if (!t) return NULL;
    memcpy(t->ids.trace, peer->trace, sizeof(t->ids.trace));
    memcpy(t->parent, peer->span, sizeof(t->parent));
    return t;
}

/* --- the header ------------------------------------------------------------------------------------------ */

static char *put_hex(char *at, const uint8_t *from, size_t len) {
    static const char digits[] = "0123456789abcdef";

    for (size_t i = 0; i < len; i++) {
        *at++ = digits[from[i] >> 4];
        *at++ = digits[from[i] & 15];
    }
    return at;
}

void zt_trace_write(struct zt_worker *w, const struct zt_trace *t, char out[ZT_TRACEPARENT]) {
    uint8_t version = 0, flags = t ? SAMPLED : 0;
    struct zt_trace_ids nobody;
    const struct zt_trace_ids *ids = t ? &t->ids : &nobody;
    char *at;

    if (!t) {
        draw_id(w, nobody.trace, sizeof(nobody.trace));
        draw_id(w, nobody.span, sizeof(nobody.span));
    }
    at = put_hex(out, &version, 1);
    *at++ = '-';
    at = put_hex(at, ids->trace, sizeof(ids->trace));
    *at++ = '-';
    at = put_hex(at, ids->span, sizeof(ids->span));
    *at++ = '-';
    *put_hex(at, &flags, 1) = '\0';
}

/* HEXDIGLC (3.2): no capitals. -1 for what is none. */
static int digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool get_hex(const char *from, uint8_t *out, size_t len) {
    for (size_t i = 0; i < len; i++) {
        int high = digit(from[2 * i]), low = digit(from[2 * i + 1]);

        if (high < 0 || low < 0) return false;
        out[i] = (uint8_t)(high << 4 | low);
    }
    return true;
}

static bool any(const uint8_t *bytes, size_t len) {
    for (size_t i = 0; i < len; i++) {
        if (bytes[i]) return true;
    }
    return false;
}

enum zt_traced zt_traceparent_parse(const char *text, size_t len, struct zt_trace_ids *out) {
    const size_t whole = ZT_TRACEPARENT - 1;
    uint8_t version, flags;

    if (len < whole || text[2] != '-' || text[35] != '-' || text[52] != '-')
        return ZT_TRACED_UNSAID;
    if (!get_hex(text, &version, 1) || !get_hex(text + 3, out->trace, sizeof(out->trace)) ||
        !get_hex(text + 36, out->span, sizeof(out->span)) || !get_hex(text + 53, &flags, 1))
        return ZT_TRACED_UNSAID;
    /* Of a later version the beginning is read, and more may follow behind a dash (3.2.4). */
    if (version == 0xff || (version == 0 && len > whole)) return ZT_TRACED_UNSAID;
    if (len > whole && text[whole] != '-') return ZT_TRACED_UNSAID;
    if (!any(out->trace, sizeof(out->trace)) || !any(out->span, sizeof(out->span)))
        return ZT_TRACED_UNSAID;
    return flags & SAMPLED ? ZT_TRACED_YES : ZT_TRACED_NO;
}
