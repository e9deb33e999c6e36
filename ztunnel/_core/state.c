#include "state.h"

#include <errno.h>
#include <malloc.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <unistd.h>

#include "h2.h"
#include "worker.h"

#define AS(type, n) ((type *)(void *)(n)) /* the map's node is the first member */

/* --- orders that are given even when there is no memory: it is taken beforehand ------------------- */

static void free_orders(struct zt_msg *orders) {
    while (orders) {
        struct zt_msg *m = orders;

        orders = m->next;
        free(m);
    }
}

static int keep_orders(struct zt_msg **orders, int n) {
    while (n--) {
        struct zt_msg *m = malloc(sizeof(*m));

        if (!m) return -ENOMEM;
        m->next = *orders;
        *orders = m;
    }
    return 0;
}

static void order(struct zt_worker *w, struct zt_msg **orders, const struct zt_msg *msg) {
    struct zt_msg *m = *orders;

    *orders = m->next;
    *m = *msg;
    zt_worker_put(w, m);
}

/* --- references ------------------------------------------------------------------------------- */

static bool last_reference(_Atomic int *refs) {
    return atomic_fetch_sub_explicit(refs, 1, memory_order_acq_rel) == 1;
}

static void reference(_Atomic int *refs) {
    atomic_fetch_add_explicit(refs, 1, memory_order_relaxed);
}

void zt_credential_put(struct zt_credential *c) {
    if (!c || !last_reference(&c->refs)) return;
    if (c->client_anchor) ossl.SSL_free(c->client_anchor);
    if (c->server_anchor) ossl.SSL_free(c->server_anchor);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

struct zt_pod *zt_pod_get(struct zt_pod *pod) {
    reference(&pod->refs);
    return pod;
}

void zt_pod_put(struct zt_pod *pod) {
    if (!pod || !last_reference(&pod->refs)) return;
    for (int i = 0; i < 3; i++) {
        if (pod->listeners[i].io.fd >= 0) close(pod->listeners[i].io.fd);
    }
    if (pod->netns >= 0) close(pod->netns);
    free_orders(pod->orders);
    zt_credential_put(pod->credential);
    free(pod);
}

struct zt_peer *zt_peer_get(struct zt_peer *peer) {
    reference(&peer->refs);
    return peer;
}

void zt_peer_put(struct zt_peer *peer) {
    if (!peer || !last_reference(&peer->refs)) return;
    zt_pod_put(peer->pod);
    zt_credential_put(peer->credential);
    free(peer);
}

static void series_put(struct zt_series *s) {
    if (s && last_reference(&s->refs)) free(s);
}

struct zt_decision *zt_decision_get(struct zt_decision *d) {
    reference(&d->refs);
    return d;
}

void zt_decision_put(struct zt_decision *d) {
    struct zt_core *core;

    if (!d || !last_reference(&d->refs)) return;
    core = d->core;
    pthread_mutex_lock(&core->lock);
    zt_map_take(&core->decisions, d->node.number);
    pthread_mutex_unlock(&core->lock);
    for (size_t i = 0; i < d->nchoices; i++) zt_decision_put(d->choices[i].decision);
    series_put(d->series);
    series_put(d->mirror);
    zt_peer_put(d->peer);
    zt_pod_put(d->pod);
    free(d->authority);
    free(d->baggage);
    free(d->host);
    free(d->line);
    free(d->choices);
    /* Its shell waits until its number has been reported. */
    pthread_mutex_lock(&core->queue_lock);
    d->freed_at = core->ended_at.tail;
    d->next_freed = NULL;
    *core->freed_tail = d;
    core->freed_tail = &d->next_freed;
    pthread_mutex_unlock(&core->queue_lock);
    zt_core_wake(core);
}

/* --- lookups: a new reference under the lock ----------------------------------------------------- */

#define DEFINE_FIND(type, field)                                                  \
    static struct zt_##type *find_##type(struct zt_core *core, uint64_t number) { \
        struct zt_##type *found;                                                  \
                                                                                  \
        pthread_mutex_lock(&core->lock);                                          \
        found = AS(struct zt_##type, zt_map_find(&core->field, number));          \
        if (found) reference(&found->refs);                                       \
        pthread_mutex_unlock(&core->lock);                                        \
        return found;                                                             \
    }
DEFINE_FIND(pod, pods)
DEFINE_FIND(peer, peers)
DEFINE_FIND(series, series)

/* The map does not own a decision, which is found for as long as anything refers to it: a
 * connection may outlive the control side's interest, and must still be found to be cut. */
static struct zt_decision *find_decision(struct zt_core *core, uint64_t number) {
    struct zt_decision *d;
    int refs;

    pthread_mutex_lock(&core->lock);
    d = AS(struct zt_decision, zt_map_find(&core->decisions, number));
    refs = d ? atomic_load(&d->refs) : 0;
    while (refs && !atomic_compare_exchange_weak(&d->refs, &refs, refs + 1)) continue;
    pthread_mutex_unlock(&core->lock);
    return refs ? d : NULL;
}

static void post_all(struct zt_core *core, struct zt_msg msg, struct zt_decision *decision,
                     struct zt_peer *peer) {
    for (int i = 0; i < core->nworkers; i++) {
        if (decision) msg.decision = zt_decision_get(decision);
        if (peer) msg.peer = zt_peer_get(peer);
        zt_worker_post(core->workers[i], &msg);
    }
}

/* --- credentials ---------------------------------------------------------------------------------- */

/* A credential exists from its first mention: pods and peers may name it before it is set. */
static struct zt_credential *credential_mention(struct zt_core *core, uint64_t number) {
    struct zt_credential *c;

    pthread_mutex_lock(&core->lock);
    c = AS(struct zt_credential, zt_map_find(&core->credentials, number));
    if (!c) {
        c = calloc(1, sizeof(*c));
        if (c && zt_map_add(&core->credentials, &c->node, number) < 0) {
            free(c);
            c = NULL;
        } else if (c) {
            pthread_mutex_init(&c->lock, NULL);
            c->refs = 1;
        }
    }
    if (c) reference(&c->refs);
    pthread_mutex_unlock(&core->lock);
    return c;
}

int zt_credential_set(struct zt_core *core, uint64_t number, SSL_CTX *client, SSL_CTX *server) {
    struct zt_credential *c = credential_mention(core, number);
    SSL *client_anchor, *server_anchor, *old_client, *old_server;

    if (!c) return -ENOMEM;
    client_anchor = ossl.SSL_new(client);
    server_anchor = ossl.SSL_new(server);
    if (!client_anchor || !server_anchor) {
        if (client_anchor) ossl.SSL_free(client_anchor);
        if (server_anchor) ossl.SSL_free(server_anchor);
        zt_credential_put(c);
        return -ENOMEM;
    }
    zt_tls_configure_server(server);
    pthread_mutex_lock(&c->lock);
    old_client = c->client_anchor;
    old_server = c->server_anchor;
    c->client_anchor = client_anchor;
    c->server_anchor = server_anchor;
    c->client = client;
    c->server = server;
    atomic_fetch_add(&c->generation, 1);
    pthread_mutex_unlock(&c->lock);
    if (old_client) ossl.SSL_free(old_client);
    if (old_server) ossl.SSL_free(old_server);
    zt_credential_put(c);
    post_all(core, (struct zt_msg){.type = ZT_MSG_RETIRE}, NULL, NULL);
    return 0;
}

int zt_credential_remove(struct zt_core *core, uint64_t number) {
    struct zt_credential *c;

    pthread_mutex_lock(&core->lock);
    c = AS(struct zt_credential, zt_map_take(&core->credentials, number));
    pthread_mutex_unlock(&core->lock);
    if (!c) return -ENOENT;
    zt_credential_put(c);
    return 0;
}

SSL *zt_credential_ssl(struct zt_credential *c, bool server, uint64_t *generation) {
    SSL *ssl = NULL;

    pthread_mutex_lock(&c->lock);
    *generation = atomic_load(&c->generation);
    if (*generation) ssl = ossl.SSL_new(server ? c->server : c->client);
    pthread_mutex_unlock(&c->lock);
    return ssl;
}

/* --- pods ------------------------------------------------------------------------------------------ */

/* In one worker's epoll; the first error. */
static int watch(const struct zt_worker *w, struct zt_pod *pod, int op) {
    int rv = 0;

    for (int k = 0; k < 3; k++) {
        /* Level-triggered, one worker woken for each connection. */
        struct epoll_event ev = {.events = EPOLLIN | EPOLLEXCLUSIVE,
                                 .data.ptr = &pod->listeners[k].io};

        if (epoll_ctl(w->epfd, op, pod->listeners[k].io.fd, &ev) < 0 && !rv) rv = -errno;
    }
    return rv;
}

static int watch_all(struct zt_core *core, struct zt_pod *pod, int op) {
    int rv = 0;

    for (int i = 0; i < core->nworkers; i++) {
        int one = watch(core->workers[i], pod, op);

        if (!rv) rv = one;
    }
    return rv;
}

/* Under the lock: a pod that is taken out of the map is then taken out of every epoll, for good. */
void zt_pods_listen(struct zt_core *core, const struct zt_worker *w, bool look) {
    pthread_mutex_lock(&core->lock);
    for (size_t b = 0; b < core->pods.nbuckets && !(look && core->draining); b++) {
        for (struct zt_map_node *n = core->pods.buckets[b]; n; n = n->next)
            watch(w, AS(struct zt_pod, n), look ? EPOLL_CTL_ADD : EPOLL_CTL_DEL);
    }
    pthread_mutex_unlock(&core->lock);
}

int zt_pod_add(struct zt_core *core, uint64_t number, int netns, const int listeners[3],
               const struct zt_addr *addrs, int naddrs, uint64_t credential) {
    static const enum zt_kind kinds[3] = {ZT_OUTBOUND, ZT_INBOUND_PLAINTEXT, ZT_INBOUND_HBONE};
    struct zt_pod *pod = calloc(1, sizeof(*pod));
    const int unsent = ZT_UNSENT_BYTES;
    int rv;

    if (!pod) return -ENOMEM;
    pod->refs = 1;
    pod->core = core;
    pod->netns = fcntl(netns, F_DUPFD_CLOEXEC, 3);
    rv = pod->netns < 0 ? -errno : 0;
    for (int k = 0; k < 3; k++) {
        struct zt_listener *l = &pod->listeners[k];

        l->pod = pod;
        l->kind = kinds[k];
        l->io.on_event = zt_worker_accept;
        l->io.fd = fcntl(listeners[k], F_DUPFD_CLOEXEC, 3);
        if (l->io.fd < 0 && !rv) rv = -errno;
        /* Inherited by what is accepted; without it the kernel's own, higher bound holds. */
        if (kinds[k] != ZT_INBOUND_HBONE)
            setsockopt(l->io.fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof(unsent));
    }
    if (!rv) rv = keep_orders(&pod->orders, 2 * core->nworkers);
    memcpy(pod->addrs, addrs, (size_t)naddrs * sizeof(*addrs));
    pod->naddrs = naddrs;
    pod->credential = credential_mention(core, credential);
    if (!pod->credential && !rv) rv = -ENOMEM;
    if (!rv) {
        pthread_mutex_lock(&core->lock);
        rv = zt_map_add(&core->pods, &pod->node, number);
        pthread_mutex_unlock(&core->lock);
    }
    if (rv) {
        zt_pod_put(pod);
        return rv;
    }
    atomic_fetch_add(&core->npods, 1);
    if (core->running && !core->draining) rv = watch_all(core, pod, EPOLL_CTL_ADD);
    if (rv) zt_pod_remove(core, number); /* a pod that is heard by half is worse than none */
    return rv;
}

int zt_pod_remove(struct zt_core *core, uint64_t number) {
    struct zt_pod *pod;

    pthread_mutex_lock(&core->lock);
    pod = AS(struct zt_pod, zt_map_take(&core->pods, number));
    pthread_mutex_unlock(&core->lock);
    if (!pod) return -ENOENT;
    atomic_store(&pod->removed, true);
    atomic_fetch_sub(&core->npods, 1);
    if (core->running) {
        if (!core->draining) watch_all(core, pod, EPOLL_CTL_DEL);
        for (int i = 0; i < core->nworkers; i++) {
            struct zt_msg gone = {.type = ZT_MSG_POD_GONE, .pod = zt_pod_get(pod)};

            order(core->workers[i], &pod->orders, &gone);
        }
    }
    zt_pod_put(pod);
    return 0;
}

int zt_pod_read(struct zt_core *core, uint64_t number, struct zt_pod_counters *out) {
    struct zt_pod *pod = find_pod(core, number);
    int64_t held;

    if (!pod) return -ENOENT;
    held = atomic_load(&pod->held);
    *out = (struct zt_pod_counters){.connections = (uint64_t)atomic_load(&pod->connections),
                                    .descriptors = (uint64_t)atomic_load(&pod->descriptors),
                                    .dials = (uint64_t)atomic_load(&pod->dials),
                                    .questions = (uint64_t)atomic_load(&pod->asking),
                                    .handshakes = (uint64_t)atomic_load(&pod->handshakes),
                                    .held = (uint64_t)held};
    for (int r = 0; r < ZT_REASON_COUNT; r++) zt_add(&out->refused[r], zt_get(&pod->refused[r]));
    zt_pod_put(pod);
    return 0;
}

/* --- peers ------------------------------------------------------------------------------------------ */

int zt_peer_add(struct zt_core *core, uint64_t number, uint64_t pod, const struct zt_addr *addr,
                uint64_t credential) {
    struct zt_peer *peer =
        calloc(1, sizeof(*peer) + (size_t)core->nworkers * sizeof(peer->pools[0]));
    int rv = 0;

    if (!peer) return -ENOMEM;
    peer->refs = 1;
    peer->addr = *addr;
    for (int i = 0; i < core->nworkers; i++) {
        zt_list_init(&peer->pools[i].connections);
        zt_list_init(&peer->pools[i].waiting);
    }
    peer->pod = find_pod(core, pod);
    if (!peer->pod) rv = -ENOENT;
    if (!rv) {
        peer->credential = credential_mention(core, credential);
        if (!peer->credential) rv = -ENOMEM;
    }
    if (!rv) {
        pthread_mutex_lock(&core->lock);
        rv = zt_map_add(&core->peers, &peer->node, number);
        pthread_mutex_unlock(&core->lock);
    }
    if (rv) zt_peer_put(peer);
    return rv;
}

int zt_peer_remove(struct zt_core *core, uint64_t number) {
    struct zt_peer *peer;

    pthread_mutex_lock(&core->lock);
    peer = AS(struct zt_peer, zt_map_take(&core->peers, number));
    pthread_mutex_unlock(&core->lock);
    if (!peer) return -ENOENT;
    atomic_store(&peer->draining, true);
    post_all(core, (struct zt_msg){.type = ZT_MSG_RETIRE}, NULL, NULL);
    zt_peer_put(peer);
    return 0;
}

int zt_peer_suspect(struct zt_core *core, uint64_t number) {
    struct zt_peer *peer = find_peer(core, number);

    if (!peer) return -ENOENT;
    post_all(core, (struct zt_msg){.type = ZT_MSG_SUSPECT_PEER}, NULL, peer);
    zt_peer_put(peer);
    return 0;
}

int zt_peer_close(struct zt_core *core, uint64_t number, enum zt_reason reason) {
    struct zt_peer *peer = find_peer(core, number);

    if (!peer) return -ENOENT;
    post_all(core, (struct zt_msg){.type = ZT_MSG_CLOSE_PEER, .reason = reason}, NULL, peer);
    zt_peer_put(peer);
    return 0;
}

/* --- series ------------------------------------------------------------------------------------------ */

int zt_series_add(struct zt_core *core, uint64_t number) {
    struct zt_series *s = calloc(1, sizeof(*s) + (size_t)core->nworkers * sizeof(s->by_worker[0]));
    int rv;

    if (!s) return -ENOMEM;
    s->refs = 1;
    pthread_mutex_lock(&core->lock);
    rv = zt_map_add(&core->series, &s->node, number);
    pthread_mutex_unlock(&core->lock);
    if (rv) series_put(s);
    return rv;
}

int zt_series_remove(struct zt_core *core, uint64_t number) {
    struct zt_series *s;

    pthread_mutex_lock(&core->lock);
    s = AS(struct zt_series, zt_map_take(&core->series, number));
    pthread_mutex_unlock(&core->lock);
    if (!s) return -ENOENT;
    series_put(s);
    return 0;
}

int zt_series_read(struct zt_core *core, uint64_t number, struct zt_series_counters *out) {
    struct zt_series *s = find_series(core, number);

    if (!s) return -ENOENT;
    memset(out, 0, sizeof(*out));
    for (int i = 0; i < core->nworkers; i++) {
        const struct zt_series_counters *c = &s->by_worker[i];

        zt_add(&out->opened, zt_get(&c->opened));
        zt_add(&out->closed, zt_get(&c->closed));
        zt_add(&out->received, zt_get(&c->received));
        zt_add(&out->sent, zt_get(&c->sent));
        for (int r = 0; r < ZT_REASON_COUNT; r++) zt_add(&out->failed[r], zt_get(&c->failed[r]));
    }
    series_put(s);
    return 0;
}

/* --- decisions ---------------------------------------------------------------------------------------- */

int zt_decision_add(struct zt_core *core, const struct zt_decision *template, uint64_t number,
                    struct zt_referred refers) {
    struct zt_decision *d = malloc(sizeof(*d));
    int rv = 0;

    if (!d) return -ENOMEM;
    *d = *template;
    d->refs = 1;
    d->core = core;
    d->series = refers.series ? find_series(core, refers.series) : NULL;
    d->mirror = refers.mirror ? find_series(core, refers.mirror) : NULL;
    d->peer = refers.peer ? find_peer(core, refers.peer) : NULL;
    d->pod = refers.pod ? find_pod(core, refers.pod) : NULL;
    if (!d->series != !refers.series || !d->mirror != !refers.mirror || !d->peer != !refers.peer ||
        !d->pod != !refers.pod)
        rv = -ENOENT;
    if (!rv) {
        pthread_mutex_lock(&core->lock);
        rv = zt_map_add(&core->decisions, &d->node, number);
        pthread_mutex_unlock(&core->lock);
    }
    if (rv) {
        series_put(d->series);
        series_put(d->mirror);
        zt_peer_put(d->peer);
        zt_pod_put(d->pod);
        free(d);
    }
    return rv;
}

int zt_decision_find(struct zt_core *core, uint64_t number, struct zt_decision **out) {
    *out = find_decision(core, number);
    return *out ? 0 : -ENOENT;
}

int zt_decision_describe(struct zt_core *core, uint64_t number, const char *form, size_t len) {
    struct zt_decision *d;
    struct zt_line *line;
    int rv = 0;

    if (!zt_line_valid(form, len)) return -EINVAL;
    d = find_decision(core, number);
    if (!d) return -ENOENT;
    line = d->line ? NULL : zt_line_new(form, len);
    if (d->line)
        rv = -EEXIST;
    else if (!line)
        rv = -ENOMEM;
    else
        d->line = line;
    zt_decision_put(d);
    return rv;
}

int zt_decision_release(struct zt_core *core, uint64_t number) {
    struct zt_decision *d;
    bool released = true;

    pthread_mutex_lock(&core->lock);
    d = AS(struct zt_decision, zt_map_find(&core->decisions, number));
    if (d) {
        released = d->released;
        d->released = true;
    }
    pthread_mutex_unlock(&core->lock);
    if (released) return -ENOENT;
    zt_decision_put(d);
    return 0;
}

int zt_decision_kill(struct zt_core *core, uint64_t number, enum zt_reason reason) {
    struct zt_decision *d = find_decision(core, number);

    if (!d) return 0;
    atomic_store(&d->killed, 1 + (int)reason);
    post_all(core, (struct zt_msg){.type = ZT_MSG_KILL_DECISION, .reason = reason}, d, NULL);
    zt_decision_put(d);
    return 0;
}

int zt_identity_kill(struct zt_core *core, uint64_t identity, enum zt_reason reason) {
    post_all(core,
             (struct zt_msg){.type = ZT_MSG_KILL_IDENTITY, .identity = identity, .reason = reason},
             NULL, NULL);
    return 0;
}

/* --- the core itself ------------------------------------------------------------------------------------ */

int zt_core_start(struct zt_core *core) {
    int rv = 0;

    for (int i = 0; i < core->nworkers; i++) {
        rv = zt_worker_start(core->workers[i]);
        if (!rv) continue;
        while (i--) {
            struct zt_msg stop = {.type = ZT_MSG_STOP};

            zt_worker_post(core->workers[i], &stop);
            zt_worker_join(core->workers[i]);
        }
        return rv;
    }
    core->running = true;
    pthread_mutex_lock(&core->lock);
    for (size_t b = 0; b < core->pods.nbuckets && !rv; b++) {
        for (struct zt_map_node *n = core->pods.buckets[b]; n && !rv; n = n->next)
            rv = watch_all(core, AS(struct zt_pod, n), EPOLL_CTL_ADD);
    }
    pthread_mutex_unlock(&core->lock);
    return rv;
}

void zt_core_stop(struct zt_core *core) {
    if (!core->running) return;
    core->running = false;
    post_all(core, (struct zt_msg){.type = ZT_MSG_STOP}, NULL, NULL);
    for (int i = 0; i < core->nworkers; i++) zt_worker_join(core->workers[i]);
}

/* To every worker, and counted until each has served it. */
static void order_parting(struct zt_core *core, struct zt_msg **orders, enum zt_msg_type type,
                          struct zt_pod *pod) {
    for (int i = 0; i < core->nworkers; i++) {
        struct zt_msg m = {.type = type, .pod = pod ? zt_pod_get(pod) : NULL};

        atomic_fetch_add(&core->parting, 1);
        order(core->workers[i], orders, &m);
    }
}

int zt_core_drain(struct zt_core *core) {
    if (!core->running) return -EINVAL;
    if (core->draining) return 0;
    pthread_mutex_lock(&core->lock);
    core->draining = true;
    for (size_t b = 0; b < core->pods.nbuckets; b++) {
        for (struct zt_map_node *n = core->pods.buckets[b]; n; n = n->next) {
            struct zt_pod *pod = AS(struct zt_pod, n);

            watch_all(core, pod, EPOLL_CTL_DEL);
            atomic_store(&pod->hearing, core->nworkers);
            order_parting(core, &pod->orders, ZT_MSG_DEAF, pod);
        }
    }
    pthread_mutex_unlock(&core->lock);
    order_parting(core, &core->orders, ZT_MSG_DRAIN, NULL);
    return 0;
}

bool zt_core_drained(const struct zt_core *core) {
    if (!core->draining || atomic_load(&core->parting)) return false;
    for (int i = 0; i < core->nworkers; i++) {
        struct zt_worker *w = core->workers[i];

        /* In this order: a stream comes from an HBONE connection, never the other way round. */
        if (atomic_load(&w->load_connections) || atomic_load(&w->load_tls) ||
            zt_get(&w->stats.tls_connections) || atomic_load(&w->lingering))
            return false;
    }
    return true;
}

int zt_core_new(struct zt_core **out, int nworkers) {
    struct zt_core *core = calloc(1, sizeof(*core));
    struct rlimit files = {0};
    int rv;

    if (!core) return -ENOMEM;
    /* Each nghttp2 session keeps room for one frame of ours, of which it writes the header only.
     * As a mapping of its own that is one page; glibc would stop making mappings of that size as
     * soon as the first is freed, and use the heap. */
    mallopt(M_MMAP_THRESHOLD, ZT_CHUNK / 2);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) core->descriptors_most = files.rlim_cur;
    core->event_fd = -1;
    core->epoch = 1;
#define X(name, setting, seconds) core->deadline_us[ZT_D_##name] = ZT_SECONDS(seconds);
    ZT_DEADLINE_TABLE(X)
#undef X
#define X(name, setting, most) core->limit[ZT_L_##name] = most;
    ZT_LIMIT_TABLE(X)
#undef X
    core->next_upcall = 1;
    core->upcalls_tail = &core->upcalls_head;
    core->freed_tail = &core->freed_head;
    core->listing.tail = &core->listing.head;
    pthread_mutex_init(&core->lock, NULL);
    pthread_mutex_init(&core->queue_lock, NULL);
    core->workers = calloc((size_t)nworkers, sizeof(*core->workers));
    rv = core->workers ? zt_queues_init(core) : -ENOMEM;
    if (!rv) rv = zt_map_init(&core->pods);
    if (!rv) rv = zt_map_init(&core->credentials);
    if (!rv) rv = zt_map_init(&core->peers);
    if (!rv) rv = zt_map_init(&core->series);
    if (!rv) rv = zt_map_init(&core->decisions);
    for (int i = 0; i < nworkers && !rv; i++) {
        rv = zt_worker_new(&core->workers[i], core, i);
        if (!rv) core->nworkers++;
    }
    if (!rv) rv = keep_orders(&core->orders, nworkers);
    if (rv) {
        zt_core_free(core);
        return rv;
    }
    *out = core;
    return 0;
}

void zt_core_free(struct zt_core *core) {
    struct zt_map_node *n;
    struct zt_map *maps[] = {&core->pods, &core->credentials, &core->peers, &core->series,
                             &core->decisions};

    zt_core_stop(core);
    for (int i = 0; i < core->nworkers; i++) zt_worker_free(core->workers[i]);
    free(core->workers);
    free_orders(core->orders);
    if (core->decisions.buckets) {
        while ((n = zt_map_pop(&core->decisions))) {
            if (!AS(struct zt_decision, n)->released) zt_decision_put(AS(struct zt_decision, n));
        }
        while ((n = zt_map_pop(&core->series))) series_put(AS(struct zt_series, n));
        while ((n = zt_map_pop(&core->peers))) zt_peer_put(AS(struct zt_peer, n));
        while ((n = zt_map_pop(&core->pods))) zt_pod_put(AS(struct zt_pod, n));
        while ((n = zt_map_pop(&core->credentials))) zt_credential_put(AS(struct zt_credential, n));
    }
    for (size_t i = 0; i < sizeof(maps) / sizeof(maps[0]); i++) zt_map_destroy(maps[i]);
    zt_queues_free(core);
    pthread_mutex_destroy(&core->lock);
    pthread_mutex_destroy(&core->queue_lock);
    free(core);
}
