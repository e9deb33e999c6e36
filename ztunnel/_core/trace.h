/*
 * Traces of connections: which connections are sampled, their ids, and W3C's traceparent, which
 * carries them from one half of a tunnel to the other (https://www.w3.org/TR/trace-context/).
 *
 * Off, a connection costs one look at a number. On, one that is not sampled costs a random number
 * and, in a CONNECT, a header that tells the other half so.
 */
#ifndef ZT_TRACE_H
#define ZT_TRACE_H

#include "base.h"

struct zt_core;
struct zt_worker;

/* Sampled connections that a worker begins at once, and in a second. Each is reported by itself and
 * costs the control side some 0.1 ms; a peer can ask for as many as it opens connections. */
#define ZT_TRACE_BURST 200
#define ZT_TRACE_RATE 200

/* "00-" trace "-" span "-" flags, and the terminating zero (3.2). */
#define ZT_TRACEPARENT 56

struct zt_trace_ids {
    uint8_t trace[16], span[8];
};

struct zt_trace {
    struct zt_trace_ids ids;
    uint8_t parent[8];  /* zeros: none */
    uint64_t opened_us; /* when the bytes could flow; 0: never */
};

/* What a peer says of its half. */
enum zt_traced { ZT_TRACED_UNSAID, ZT_TRACED_NO, ZT_TRACED_YES };

/* Whether connections are traced: `parts` of 2^32 of those that begin here, and those whose peer has
 * begun a trace. */
void zt_trace_set(struct zt_core *core, bool on, uint64_t parts);
bool zt_trace_on(const struct zt_core *core);
/* The trace of a connection that begins here; NULL if it is not sampled, or without memory. */
struct zt_trace *zt_trace_begin(struct zt_worker *w);
/* The same for one whose peer has begun the trace. */
struct zt_trace *zt_trace_join(struct zt_worker *w, const struct zt_trace_ids *peer);
/* Writes the header of a connection; of one that is not sampled (NULL) ids that nobody has. */
void zt_trace_write(struct zt_worker *w, const struct zt_trace *t, char out[ZT_TRACEPARENT]);
/* Reads a header: what W3C allows and nothing else is ZT_TRACED_NO or _YES, with the ids. */
enum zt_traced zt_traceparent_parse(const char *text, size_t len, struct zt_trace_ids *out);

#endif
