#include "map.h"

#include <errno.h>
#include <stdlib.h>

static size_t slot(const struct zt_map *m, uint64_t number) {
    return (size_t)((number * 0x9e3779b97f4a7c15u) >> 32) & (m->nbuckets - 1);
}

int zt_map_init(struct zt_map *m) {
    m->nbuckets = 64;
    m->count = 0;
    m->buckets = calloc(m->nbuckets, sizeof(*m->buckets));
    return m->buckets ? 0 : -ENOMEM;
}

void zt_map_destroy(struct zt_map *m) {
    free(m->buckets);
    m->buckets = NULL;
}

struct zt_map_node *zt_map_find(const struct zt_map *m, uint64_t number) {
    struct zt_map_node *n = m->buckets[slot(m, number)];

    while (n && n->number != number) n = n->next;
    return n;
}

static void grow(struct zt_map *m) {
    struct zt_map bigger = {.nbuckets = m->nbuckets * 2, .count = m->count};

    bigger.buckets = calloc(bigger.nbuckets, sizeof(*bigger.buckets));
    if (!bigger.buckets) return; /* longer chains serve as well */
    for (size_t i = 0; i < m->nbuckets; i++) {
        while (m->buckets[i]) {
            struct zt_map_node *n = m->buckets[i], **to = &bigger.buckets[slot(&bigger, n->number)];

            m->buckets[i] = n->next;
            n->next = *to;
            *to = n;
        }
    }
    free(m->buckets);
    *m = bigger;
}

int zt_map_add(struct zt_map *m, struct zt_map_node *node, uint64_t number) {
    struct zt_map_node **to;

    if (zt_map_find(m, number)) return -EEXIST;
    if (m->count >= m->nbuckets * 2) grow(m);
    to = &m->buckets[slot(m, number)];
    node->number = number;
    node->next = *to;
    *to = node;
    m->count++;
    return 0;
}

struct zt_map_node *zt_map_take(struct zt_map *m, uint64_t number) {
    struct zt_map_node **at = &m->buckets[slot(m, number)], *n;

    while (*at && (*at)->number != number) at = &(*at)->next;
    n = *at;
    if (n) {
        *at = n->next;
        m->count--;
    }
    return n;
}

struct zt_map_node *zt_map_pop(struct zt_map *m) {
    for (size_t i = 0; m->count && i < m->nbuckets; i++) {
        if (m->buckets[i]) return zt_map_take(m, m->buckets[i]->number);
    }
    return NULL;
}
