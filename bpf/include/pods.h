/*
 * The maps that all pods of a node share, by the pods' numbers: written by nodeagent, pinned, read
 * by the capture program of each pod and by the guard. They promise that a number that is not in
 * them is a pod that is closed.
 */
#ifndef PODS_H
#define PODS_H

#include "nodeagent.h"

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __uint(max_entries, MAX_PODS);
    __type(key, __u32);
    __type(value, struct pod);
} pods SEC(".maps");

/* Not one for each CPU: that would cost a pod a kilobyte for every eight, and these rarely move. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(map_flags, BPF_F_NO_PREALLOC);
    __uint(max_entries, MAX_PODS);
    __type(key, __u32);
    __type(value, struct pod_counters);
} counters SEC(".maps");

static __always_inline const struct pod *find_pod(__u32 number) {
    return bpf_map_lookup_elem(&pods, &number);
}

static __always_inline void count(__u32 pod, __u32 number) {
    struct pod_counters *found = bpf_map_lookup_elem(&counters, &pod);

    if (found && number < COUNTER_COUNT) __sync_fetch_and_add(&found->value[number], 1);
}

/* Whether `a` is one of the pod's addresses. */
static __always_inline bool is_own(const struct pod *pod, const struct address *a) {
    for (__u32 i = 0; i < MAX_ADDRESSES; i++) {
        if (i >= pod->config.count) break;
        if (same(&pod->config.address[i], a)) return true;
    }
    return false;
}

#endif
