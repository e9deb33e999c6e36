/*
 * Who may still take something that runs out. A pod is refused by its own limits (base.h), by its
 * share of the descriptors, or because there are none; it never waits for another pod's.
 *
 * The share: a pod may hold as many descriptors as are still free. So one greedy pod gets a half of
 * them all, two get a third each, and n leave one part in n + 1 to whoever comes next, without a
 * number that somebody would have to choose (dynamic thresholds: Choudhury and Hahne, 1998).
 */
#ifndef ZT_LIMIT_H
#define ZT_LIMIT_H

#include "worker.h"

enum zt_use {
    ZT_USE_CONNECTION, /* an application connection begins */
    ZT_USE_DIAL,       /* a socket of one is dialled */
    ZT_USE_HBONE,      /* an HBONE connection was accepted */
    ZT_USE_HBONE_DIAL,
};

/* 0 (ZT_R_CLOSED), or the reason why not. Takes nothing. */
enum zt_reason zt_admit(const struct zt_worker *w, const struct zt_pod *pod, enum zt_use use);
/* `n` more descriptors are in use for a connection of the pod; negative: fewer. */
void zt_hold(struct zt_worker *w, struct zt_pod *pod, int n);
/* Whether a reason says that something ran out. */
bool zt_is_limit(enum zt_reason reason);
/* Counts what ended so, if it did. */
void zt_count_refusal(struct zt_pod *pod, enum zt_reason reason);
/* Descriptors of this process that the core knows of. */
uint64_t zt_descriptors(const struct zt_core *core);
/* Those that connections may take in all; also of what is RLIMIT_NOFILE without any pod. */
uint64_t zt_descriptors_for_connections(const struct zt_core *core);

static inline uint64_t zt_limit(const struct zt_core *core, enum zt_limit limit) {
    return atomic_load_explicit(&core->limit[limit], memory_order_relaxed);
}

/* Whether a limit's count, with the one that asks, is beyond it. */
static inline bool zt_beyond(const struct zt_core *core, enum zt_limit limit, int64_t count) {
    uint64_t most = zt_limit(core, limit);

    return most && count > 0 && (uint64_t)count > most;
}

#endif
