/*
 * What a peer may say on an HBONE connection that does no work for any stream: PINGs, SETTINGS,
 * window updates for nothing, empty DATA, frames of unknown types, streams that are reset before
 * they were answered. Each costs the peer a few bytes and us a turn of the parser or an answer, and
 * no window bounds them. They are counted by their frame headers, before libnghttp2 looks at them,
 * against a budget that time refills and that honest work earns; who has spent it is cut off.
 *
 * Values in, values out: no socket, no clock, no memory of its own.
 */
#ifndef ZT_GLITCH_H
#define ZT_GLITCH_H

#include "base.h"

#define ZT_FRAME_HEADER 9 /* RFC 9113, 4.1 */

struct zt_glitch {
    uint8_t head[ZT_FRAME_HEADER + 1]; /* of the frame at hand, and how much padding DATA has */
    uint8_t have;                      /* have <= sizeof(head) */
    uint32_t skip;    /* bytes of its payload (or of the preface) that are still to come */
    uint32_t block;   /* bytes of the header block at hand, on the wire */
    int32_t budget;   /* 0 <= budget <= ZT_GLITCH_BURST */
    uint64_t updates; /* WINDOW_UPDATEs that belong to what we have sent */
    uint64_t refilled;
};

/* `server`: the peer begins with the preface (RFC 9113, 3.4). */
void zt_glitch_init(struct zt_glitch *g, bool server, uint64_t now_us);
/* Looks at plaintext as it came, in any pieces. NULL, or what there was too much of, for the log. */
const char *zt_glitch_seen(struct zt_glitch *g, const uint8_t *data, size_t len, uint64_t now_us);
/* One that no frame header shows; false when the budget is spent. */
bool zt_glitch_one(struct zt_glitch *g, uint64_t now_us);
/* We have sent DATA, which the peer will give back by window updates. */
void zt_glitch_sent(struct zt_glitch *g, size_t bytes);
/* Work was done: so many useless frames may be a part of it. */
void zt_glitch_earn(struct zt_glitch *g, size_t n);

#endif
