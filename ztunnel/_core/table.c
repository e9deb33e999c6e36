/* The decision table of one worker: answers at once what has been judged before. */
#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "conn.h"
#include "limit.h"
#include "worker.h"

#define BUCKETS 4096 /* about 16 entries a chain when the table is full */

int zt_table_init(struct zt_table *t) {
    t->nbuckets = BUCKETS;
    t->buckets = calloc(t->nbuckets, sizeof(*t->buckets));
    if (!t->buckets) return -ENOMEM;
    /* Keys hold addresses that strangers choose: the seed keeps them from choosing the chain. */
    if (getrandom(t->seed, sizeof(t->seed), 0) != (ssize_t)sizeof(t->seed)) return -errno;
    return 0;
}

/* SipHash-1-3 (Aumasson, Bernstein; https://www.aumasson.jp/siphash/) of whole words. */
static uint64_t rotl(uint64_t x, int b) {
    return (x << b) | (x >> (64 - b));
}

static void sip_round(uint64_t v[4]) {
    v[0] += v[1];
    v[1] = rotl(v[1], 13) ^ v[0];
    v[0] = rotl(v[0], 32);
    v[2] += v[3];
    v[3] = rotl(v[3], 16) ^ v[2];
    v[0] += v[3];
    v[3] = rotl(v[3], 21) ^ v[0];
    v[2] += v[1];
    v[1] = rotl(v[1], 17) ^ v[2];
    v[2] = rotl(v[2], 32);
}

static size_t slot(const struct zt_table *t, const struct zt_key *key) {
    _Static_assert(sizeof(*key) % 8 == 0, "hashed as words");
    uint64_t v[4] = {t->seed[0] ^ 0x736f6d6570736575u, t->seed[1] ^ 0x646f72616e646f6du,
                     t->seed[0] ^ 0x6c7967656e657261u, t->seed[1] ^ 0x7465646279746573u};

    for (size_t i = 0; i < sizeof(*key) / 8; i++) {
        uint64_t m;

        memcpy(&m, (const char *)key + i * 8, 8);
        v[3] ^= m;
        sip_round(v);
        v[0] ^= m;
    }
    v[2] ^= 0xff;
    for (int i = 0; i < 3; i++) sip_round(v);
    return (size_t)(v[0] ^ v[1] ^ v[2] ^ v[3]) & (t->nbuckets - 1);
}

static struct zt_entry **find(struct zt_table *t, const struct zt_key *key) {
    struct zt_entry **at = &t->buckets[slot(t, key)];

    while (*at && memcmp(&(*at)->key, key, sizeof(*key)) != 0) at = &(*at)->next;
    return at;
}

static void asked_no_more(struct zt_entry *e) {
    zt_timer_stop(&e->timer);
    if (!e->pod) return;
    atomic_fetch_sub(&e->pod->asking, 1);
    zt_pod_put(e->pod);
    e->pod = NULL;
}

/* Takes the entry out; those that wait for it end with `reason`. */
static void drop(struct zt_worker *w, struct zt_entry **at, enum zt_reason reason) {
    struct zt_entry *e = *at;

    *at = e->next;
    w->table.count--;
    asked_no_more(e);
    if (!e->decision && e->upcall) zt_upcall_cancel(w->core, e->upcall);
    while (!zt_list_empty(&e->waiting)) {
        struct zt_conn *c = ZT_CONTAINER(e->waiting.next, struct zt_conn, wait);

        zt_list_remove(&c->wait);
        zt_conn_end(c, reason);
    }
    zt_decision_put(e->decision);
    free(e);
}

void zt_table_clear(struct zt_worker *w) {
    for (size_t i = 0; i < w->table.nbuckets; i++) {
        while (w->table.buckets[i]) drop(w, &w->table.buckets[i], ZT_R_SHUTDOWN);
    }
}

/* The table is full, which a node's own traffic does not do: keep only the open questions. */
static void sweep(struct zt_worker *w) {
    for (size_t i = 0; i < w->table.nbuckets; i++) {
        struct zt_entry **at = &w->table.buckets[i];

        while (*at) {
            if ((*at)->decision)
                drop(w, at, ZT_R_INTERNAL);
            else
                at = &(*at)->next;
        }
    }
}

void zt_table_expire(struct zt_worker *w) {
    uint64_t epoch = atomic_load(&w->core->epoch);

    if (w->table.swept == epoch) return;
    w->table.swept = epoch;
    for (size_t i = 0; i < w->table.nbuckets; i++) {
        struct zt_entry **at = &w->table.buckets[i];

        while (*at) {
            if ((*at)->decision && (*at)->epoch != epoch)
                drop(w, at, ZT_R_INTERNAL);
            else
                at = &(*at)->next;
        }
    }
}

static void on_decision_deadline(struct zt_worker *w, struct zt_timer *t) {
    struct zt_entry *e = ZT_CONTAINER(t, struct zt_entry, timer);
    struct zt_key key = e->key;

    zt_add(&w->stats.expired[t->deadline], 1);
    drop(w, find(&w->table, &key), ZT_R_DECISION_TIMEOUT);
}

static int ask(struct zt_worker *w, struct zt_entry *e, const struct zt_conn *c) {
    struct zt_upcall *u = calloc(1, sizeof(*u));

    if (!u) return -ENOMEM;
    u->worker = w;
    u->key = e->key;
    u->epoch = atomic_load(&w->core->epoch);
    u->source = c->source;
    u->destination = c->destination;
    e->asked_us = w->now;
    e->upcall = zt_upcall_send(w->core, u);
    if (!e->upcall) return -ENOMEM;
    zt_add(&w->stats.upcalls, 1);
    return 0;
}

int zt_table_decide(struct zt_worker *w, struct zt_conn *conn, const struct zt_key *key) {
    struct zt_table *t = &w->table;
    struct zt_entry **at = find(t, key), *e = *at;
    int rv;

    if (e && e->decision) {
        if (e->epoch == atomic_load(&w->core->epoch) && !atomic_load(&e->decision->killed)) {
            struct zt_decision *d = zt_decision_get(e->decision);

            zt_add(&w->stats.table_hits, 1);
            zt_conn_decided(conn, d);
            zt_decision_put(d);
            return 0;
        }
        drop(w, at, ZT_R_INTERNAL);
        e = NULL;
    }
    if (!e) {
        if (t->count >= ZT_TABLE_MAX) sweep(w);
        if (t->count >= ZT_TABLE_MAX ||
            zt_beyond(w->core, ZT_L_QUESTIONS, atomic_load(&conn->pod->asking) + 1))
            return -EBUSY;
        e = calloc(1, sizeof(*e));
        if (!e) return -ENOMEM;
        e->key = *key;
        zt_list_init(&e->waiting);
        zt_list_init(&e->timer.link);
        e->timer.fire = on_decision_deadline;
        rv = ask(w, e, conn);
        if (rv) {
            free(e);
            return rv;
        }
        e->pod = zt_pod_get(conn->pod);
        atomic_fetch_add(&e->pod->asking, 1);
        at = find(t, key);
        e->next = *at;
        *at = e;
        t->count++;
        zt_timer_set(w, &e->timer, ZT_D_DECISION);
    }
    zt_list_append(&e->waiting, &conn->wait);
    return 0;
}

void zt_table_answer(struct zt_worker *w, const struct zt_msg *msg) {
    struct zt_entry **at = find(&w->table, &msg->key), *e = *at;
    struct zt_decision *d = msg->decision;
    struct zt_list waiting;

    if (!e || e->decision || e->upcall != msg->id) {
        zt_decision_put(d);
        return;
    }
    if (!d || msg->epoch != atomic_load(&w->core->epoch)) {
        zt_decision_put(d);
        if (zt_list_empty(&e->waiting) ||
            ask(w, e, ZT_CONTAINER(e->waiting.next, struct zt_conn, wait)) < 0)
            drop(w, at, ZT_R_NO_MEMORY);
        return;
    }
    zt_observe(&w->stats.upcall_latency, w->now - e->asked_us);
    asked_no_more(e);
    e->decision = zt_decision_get(d);
    e->epoch = msg->epoch;
    /* From here on the entry may go, for what follows may fill the table anew. */
    zt_list_init(&waiting);
    while (!zt_list_empty(&e->waiting)) {
        struct zt_list *l = e->waiting.next;

        zt_list_remove(l);
        zt_list_append(&waiting, l);
    }
    while (!zt_list_empty(&waiting)) {
        struct zt_conn *c = ZT_CONTAINER(waiting.next, struct zt_conn, wait);

        zt_list_remove(&c->wait);
        zt_conn_decided(c, d);
    }
    zt_decision_put(d);
}
