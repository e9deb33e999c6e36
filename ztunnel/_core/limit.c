#include "limit.h"

void zt_hold(struct zt_worker *w, struct zt_pod *pod, int n) {
    zt_add(&w->stats.descriptors, (uint64_t)(int64_t)n);
    if (pod) atomic_fetch_add_explicit(&pod->descriptors, n, memory_order_relaxed);
}

static uint64_t reserved(const struct zt_core *core) {
    uint64_t quarter = core->descriptors_most / 4;

    return quarter < ZT_RESERVED_DESCRIPTORS ? quarter : ZT_RESERVED_DESCRIPTORS;
}

uint64_t zt_descriptors_for_connections(const struct zt_core *core) {
    uint64_t others = reserved(core) + ZT_POD_DESCRIPTORS * (uint64_t)atomic_load(&core->npods);

    return core->descriptors_most > others ? core->descriptors_most - others : 0;
}

uint64_t zt_descriptors(const struct zt_core *core) {
    uint64_t used = 0; /* a descriptor may be closed by another worker than took it: mod 2^64 */

    for (int i = 0; i < core->nworkers; i++) used += zt_get(&core->workers[i]->stats.descriptors);
    return used;
}

static enum zt_reason admit_descriptor(const struct zt_core *core, const struct zt_pod *pod,
                                       bool hbone) {
    uint64_t most = zt_descriptors_for_connections(core), used = zt_descriptors(core);
    int held = atomic_load_explicit(&pod->descriptors, memory_order_relaxed);

    if (!hbone) most -= most / ZT_HBONE_SHARE;
    if (used >= most) return ZT_R_NO_DESCRIPTORS;
    return held > 0 && (uint64_t)held >= most - used ? ZT_R_POD_DESCRIPTORS : ZT_R_CLOSED;
}

enum zt_reason zt_admit(const struct zt_worker *w, const struct zt_pod *pod, enum zt_use use) {
    const struct zt_core *core = w->core;
    int connections = atomic_load_explicit(&pod->connections, memory_order_relaxed);
    int dials = atomic_load_explicit(&pod->dials, memory_order_relaxed);

    if (use == ZT_USE_CONNECTION && zt_beyond(core, ZT_L_CONNECTIONS, connections + 1))
        return ZT_R_POD_CONNECTIONS;
    if ((use == ZT_USE_DIAL || use == ZT_USE_HBONE_DIAL) && zt_beyond(core, ZT_L_DIALS, dials + 1))
        return ZT_R_POD_DIALS;
    return admit_descriptor(core, pod, use == ZT_USE_HBONE || use == ZT_USE_HBONE_DIAL);
}

bool zt_is_limit(enum zt_reason reason) {
    switch (reason) {
    case ZT_R_NO_DESCRIPTORS:
    case ZT_R_NO_MEMORY:
    case ZT_R_NO_PORTS:
    case ZT_R_POD_QUESTIONS:
    case ZT_R_POD_CONNECTIONS:
    case ZT_R_POD_DESCRIPTORS:
    case ZT_R_POD_DIALS:
    case ZT_R_POD_HANDSHAKES:
    case ZT_R_POD_HELD:
        return true;
    default:
        return false;
    }
}

void zt_count_refusal(struct zt_pod *pod, enum zt_reason reason) {
    if (zt_is_limit(reason))
        atomic_fetch_add_explicit(&pod->refused[reason], 1, memory_order_relaxed);
}
