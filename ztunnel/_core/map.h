/*
 * Number -> object: a chained hash whose nodes are inside the objects. Not locked; the numbers are
 * ours, so that the hash needs no secret.
 */
#ifndef ZT_MAP_H
#define ZT_MAP_H

#include <stddef.h>
#include <stdint.h>

struct zt_map_node {
    struct zt_map_node *next;
    uint64_t number;
};

struct zt_map {
    struct zt_map_node **buckets;
    size_t nbuckets, count;
};

/* 0 or -ENOMEM. */
int zt_map_init(struct zt_map *m);
void zt_map_destroy(struct zt_map *m);
struct zt_map_node *zt_map_find(const struct zt_map *m, uint64_t number);
/* 0, -EEXIST or -ENOMEM. */
int zt_map_add(struct zt_map *m, struct zt_map_node *node, uint64_t number);
struct zt_map_node *zt_map_take(struct zt_map *m, uint64_t number);
/* Any node, taken out; NULL when the map is empty. */
struct zt_map_node *zt_map_pop(struct zt_map *m);

#endif
