/*
 * Everything around the core: applications, the wire to another node, and a judge who remembers
 * what was asked and what was answered, so that no connection can be open without that.
 *
 * It takes the place of sock.c, of accept4(2) and of getsockname(2).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "listing.h"
#include "rig.h"

#define APPS 64
#define DECISIONS 1024 /* what the judge remembers; it answers no more questions than these */
#define LEFT 64        /* questions that wait for an answer */
#define FDS 4096
#define LISTED 1024 /* connections of one listing that are looked at */
/* What one stream or the connection may hold: HTTP/2's window and what is in flight. */
#define BYTES_MAX (96u * 1024 * 1024)

const struct zt_addr world_local = {.ip = {[10] = 0xff, [11] = 0xff, [12] = 10, [15] = 1},
                                    .port = 15008};
const struct zt_addr world_remote = {.ip = {[10] = 0xff, [11] = 0xff, [12] = 10, [15] = 2},
                                     .port = 8080};
const struct zt_addr world_other = {.ip = {[0] = 0xfd, [15] = 3}, .port = 443};

struct world world;

/* What is said through a listener's socket: one accepted connection. */
struct arrival {
    int fd;
    struct zt_addr from, to;
};

enum judging { ALLOW, REFUSE, LEAVE, STALE, UNKNOWN, BALANCE, FORWARD, JUDGINGS };

struct left {
    uint64_t id, epoch;
    struct zt_key key;
};

static int apps[APPS], napps;
static int listeners[3][2]; /* the core's end, ours */
static struct zt_addr local_of[FDS];
static struct {
    struct zt_key key;
    bool answered, released;
} judged[DECISIONS];
static uint64_t ndecisions;
static enum judging judging, certificates;
static struct left left[LEFT];
static int nleft;
static int socket_errno;
/* Orders of the step before: what they mean is gone by now. */
static uint64_t cut_identity;
static const struct zt_peer *cut_peer;
static bool pod_there;
/* The listing under way, who it has named, and the last connection that was there at its order. */
static bool listing;
static uint64_t seen[LISTED], born;
static size_t nlisted;

static uint8_t byte(const uint8_t *args, size_t n, size_t i) {
    return i < n ? args[i] : 0;
}

/* --- sockets ------------------------------------------------------------------------------------------------ */

static void pair_of(int fds[2]) {
    RIG_REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    RIG_REQUIRE(fds[0] < FDS && fds[1] < FDS);
}

static void keep_app(int fd) {
    for (int i = 0; i < napps; i++) {
        if (apps[i] < 0) {
            apps[i] = fd;
            return;
        }
    }
    if (napps < APPS)
        apps[napps++] = fd;
    else
        close(fd);
}

static void keep_wire(int fd) {
    if (world.wire >= 0) close(world.wire);
    world.wire = fd;
}

static void arrive(enum zt_kind kind, int fd, const struct zt_addr *from,
                   const struct zt_addr *to) {
    struct arrival a = {.fd = fd, .from = *from, .to = *to};

    local_of[fd] = *to;
    if (!pod_there || send(listeners[kind - ZT_OUTBOUND][1], &a, sizeof(a), 0) != sizeof(a))
        close(fd);
}

void world_accept(enum zt_kind kind, const struct zt_addr *from, const struct zt_addr *to) {
    int fds[2];

    pair_of(fds);
    if (kind == ZT_INBOUND_HBONE)
        keep_wire(fds[1]);
    else
        keep_app(fds[1]);
    arrive(kind, fds[0], from, to);
}

int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *len, int flags);
int __wrap_getsockname(int fd, struct sockaddr *address, socklen_t *len);

int __wrap_accept4(int fd, struct sockaddr *address, socklen_t *len, int flags) {
    struct arrival a;

    (void)flags;
    if (recv(fd, &a, sizeof(a), MSG_DONTWAIT) != sizeof(a)) {
        errno = EAGAIN;
        return -1;
    }
    *len = zt_addr_to_sockaddr(&a.from, (void *)address);
    return a.fd;
}

int __wrap_getsockname(int fd, struct sockaddr *address, socklen_t *len) {
    *len = zt_addr_to_sockaddr(&local_of[fd], (void *)address);
    return 0;
}

static int fail_once(void) {
    int error = socket_errno;

    socket_errno = 0;
    return -error;
}

static int dial(void) {
    int fds[2];

    if (socket_errno) return fail_once();
    pair_of(fds);
    keep_app(fds[1]);
    return fds[0];
}

int zt_sock_to_peer(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *to) {
    int fds[2];

    (void)w;
    (void)pod;
    (void)to;
    if (socket_errno) return fail_once();
    pair_of(fds);
    if (world.loop)
        arrive(ZT_INBOUND_HBONE, fds[1], &world_remote, &world_local);
    else
        keep_wire(fds[1]);
    return fds[0];
}

int zt_sock_forward(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *from,
                    const struct zt_addr *to) {
    (void)w;
    (void)pod;
    (void)from;
    (void)to;
    return dial();
}

int zt_sock_deliver(struct zt_worker *w, const struct zt_pod *pod, const struct zt_addr *from,
                    const struct zt_addr *to) {
    (void)w;
    (void)pod;
    (void)from;
    (void)to;
    return dial();
}

int zt_sock_share(int fd) {
    (void)fd;
    return 0;
}

int zt_sock_error(int fd) {
    (void)fd;
    return -fail_once();
}

void zt_sock_abort(int fd) {
    close(fd);
}

void zt_sock_close(int fd) {
    close(fd);
}

/* --- the judge ------------------------------------------------------------------------------------------------- */

/* strdup's memory would not be counted: it comes from inside libc. */
static char *text(const char *from) {
    char *copy = malloc(strlen(from) + 1);

    RIG_REQUIRE(copy);
    return strcpy(copy, from);
}

/* The form of a log line, which every second decision has. */
static const char LINE[] = "\x01 \x02 \x03 \x04 \x05\n";

static uint64_t decide(const struct zt_key *key, enum zt_action action) {
    struct zt_decision t = {.action = action, .reason = ZT_R_POLICY_DENIED};
    struct zt_referred refers = {0};
    uint64_t number = ndecisions + 1;
    int rv;

    if (ndecisions == DECISIONS - 1) return 0;
    if (action == ZT_TUNNEL) {
        t.authority = text("10.0.0.1:8080");
        t.baggage = text("k8s.cluster.name=test");
        t.host = text("service.test");
    }
    if (action == ZT_BALANCE) {
        uint64_t chosen = decide(key, key->kind == ZT_OUTBOUND ? ZT_TUNNEL : ZT_DELIVER);
        struct zt_decision *d;

        if (!chosen || zt_decision_find(rig.core, chosen, &d) < 0) return 0;
        number = ndecisions + 1;
        t.choices = calloc(1, sizeof(*t.choices));
        t.choices[0] = (struct zt_choice){d, 1};
        t.nchoices = 1;
        t.total_weight = 1;
    }
    refers.series = action == ZT_BALANCE ? 0 : THE_SERIES;
    refers.peer = action == ZT_TUNNEL ? THE_PEER : 0;
    rv = RIG_CALL(zt_decision_add(rig.core, &t, number, refers));
    if (rv < 0) {
        free(t.authority);
        free(t.baggage);
        free(t.host);
        for (size_t i = 0; i < t.nchoices; i++) zt_decision_put(t.choices[i].decision);
        free(t.choices);
        return 0;
    }
    ndecisions++;
    if (number % 2) RIG_CALL(zt_decision_describe(rig.core, number, LINE, sizeof(LINE) - 1));
    judged[number].key = *key;
    judged[number].released = false;
    /* A choice of a balance is answered by the balance. */
    judged[number].answered = true;
    return number;
}

static void answer(uint64_t id, uint64_t epoch, const struct zt_key *key) {
    static const enum zt_action action[2][JUDGINGS] = {
        [0] = {[ALLOW] = ZT_DELIVER,
               [REFUSE] = ZT_REFUSE,
               [BALANCE] = ZT_BALANCE,
               [STALE] = ZT_DELIVER,
               [FORWARD] = ZT_FORWARD},
        [1] = {[ALLOW] = ZT_TUNNEL,
               [REFUSE] = ZT_REFUSE,
               [BALANCE] = ZT_BALANCE,
               [STALE] = ZT_TUNNEL,
               [FORWARD] = ZT_FORWARD},
    };
    uint64_t number;

    if (judging == UNKNOWN) {
        RIG_REQUIRE(zt_upcall_answer(rig.core, id, epoch, 999999) <= 0 ||
                    epoch != atomic_load(&rig.core->epoch));
        return;
    }
    number = decide(key, action[key->kind == ZT_OUTBOUND][judging]);
    if (!number) return;
    RIG_CALL(zt_upcall_answer(rig.core, id, judging == STALE ? epoch - 1 : epoch, number));
    world.answers++;
}

static void answer_left(void) {
    int n = nleft;

    nleft = 0;
    for (int i = 0; i < n; i++) {
        bool certificate = left[i].key.kind >= ZT_PEER_CERTIFICATE;

        if (certificate)
            zt_upcall_answer_certificate(rig.core, left[i].id, THE_IDENTITY, ZT_R_CLOSED);
        else
            answer(left[i].id, left[i].epoch, &left[i].key);
    }
}

static void judge(const struct zt_upcall *u) {
    bool certificate = u->key.kind >= ZT_PEER_CERTIFICATE;
    enum judging how = certificate ? certificates : judging;

    if (!certificate) {
        world.questions++;
        world.asked = u->destination;
    }
    if (how == LEAVE) {
        if (nleft < LEFT) left[nleft++] = (struct left){u->node.number, u->epoch, u->key};
        return;
    }
    if (certificate)
        zt_upcall_answer_certificate(rig.core, u->node.number, how == REFUSE ? 0 : THE_IDENTITY,
                                     ZT_R_CERT_UNTRUSTED);
    else
        answer(u->node.number, u->epoch, &u->key);
}

/* --- after every turn ---------------------------------------------------------------------------------------------- */

static void read_from(int fd, void (*sees)(const uint8_t *data, size_t len)) {
    static uint8_t buffer[64 * 1024];
    ssize_t n;

    while ((n = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT)) > 0) {
        if (sees) sees(buffer, (size_t)n);
        if (fd == world.wire) world.wire_bytes += (uint64_t)n;
    }
}

/* A listing names each connection once, and those that were there at the order and still are: all
 * of them but for those that found no memory. */
static void take_listing(void) {
    struct zt_listed listed[32];
    uint64_t missed;
    bool over;
    size_t n;

    do {
        n = zt_listing_take(rig.core, listed, 32, &over, &missed);
        for (size_t i = 0; i < n && nlisted < LISTED; i++) {
            for (size_t k = 0; k < nlisted; k++) RIG_REQUIRE(seen[k] != listed[i].number);
            seen[nlisted++] = listed[i].number;
        }
    } while (n == 32);
    if (!over) return;
    for (const struct zt_list *l = rig.worker->conns.next; listing && l != &rig.worker->conns;
         l = l->next) {
        const struct zt_conn *c = ZT_CONTAINER((uintptr_t)l, struct zt_conn, link);
        bool found = c->number > born || missed || nlisted == LISTED;

        for (size_t k = 0; k < nlisted; k++)
            found |= seen[k] == c->number * ZT_MAX_WORKERS + (uint64_t)rig.worker->index;
        RIG_REQUIRE(found);
    }
    listing = false;
}

static void begin_listing(void) {
    if (RIG_CALL(zt_listing_begin(rig.core)) != 0) return;
    listing = true;
    nlisted = 0;
    born = rig.worker->born;
}

static void collect(void) {
    struct zt_ended ended[32];
    struct zt_failed failed[32];
    uint64_t freed[32];
    const struct zt_lines *lines = zt_lines_take(rig.core);

    RIG_REQUIRE(!lines->len == !lines->count && lines->len <= lines->room);
    RIG_REQUIRE(!lines->len || lines->text[lines->len - 1] == '\n');
    while (zt_ended_take(rig.core, ended, 32)) continue;
    while (zt_failed_take(rig.core, failed, 32)) continue;
    while (zt_freed_take(rig.core, freed, 32)) continue;
    take_listing();
}

void world_turn(void) {
    struct zt_upcall u;

    if (world.wire >= 0 && !world.stalled) read_from(world.wire, world.on_wire);
    if (world.read_all) {
        for (int i = 0; i < napps; i++) {
            if (apps[i] >= 0) read_from(apps[i], NULL);
        }
    }
    while (zt_upcall_collect(rig.core, &u)) {
        for (int i = 0; i < u.nchain; i++) free(u.chain[i].data);
        judge(&u);
    }
    world_check();
}

static void check_conn(const struct zt_conn *c) {
    size_t pending = 0;

    for (const struct zt_chunk *k = c->stream.pending; k; k = k->next) {
        RIG_REQUIRE(k->pos <= k->len);
        pending += k->len - k->pos;
    }
    /* The window that we gave, and no byte more. */
    RIG_REQUIRE(pending <= ZT_STREAM_WINDOW_MOST);
    if (c->state != ZT_C_OPEN) return;
    RIG_REQUIRE(c->decision && !atomic_load(&c->decision->killed));
    RIG_REQUIRE(!atomic_load(&c->pod->removed));
    RIG_REQUIRE(c->decision->action == ZT_FORWARD || c->decision->action == ZT_DELIVER ||
                c->decision->action == ZT_TUNNEL);
    RIG_REQUIRE(c->decision->node.number <= ndecisions);
    RIG_REQUIRE(judged[c->decision->node.number].answered);
    {
        const struct zt_key *key = &judged[c->decision->node.number].key;

        RIG_REQUIRE(key->kind == c->kind && key->pod == c->pod->node.number);
        RIG_REQUIRE(key->identity == c->identity && key->port == c->destination.port);
        RIG_REQUIRE(memcmp(key->destination, c->destination.ip, 16) == 0);
        if (c->kind != ZT_OUTBOUND) RIG_REQUIRE(memcmp(key->source, c->source.ip, 16) == 0);
    }
    if (c->kind == ZT_INBOUND_HBONE) RIG_REQUIRE(c->identity == THE_IDENTITY);
}

static void check_h2(const struct zt_h2 *h) {
    int streams = 0;

    for (const struct zt_list *l = h->streams.next; l != &h->streams; l = l->next) streams++;
    RIG_REQUIRE(streams == h->nstreams);
    RIG_REQUIRE(h->nstreams <= (h->server ? ZT_SERVER_STREAMS : ZT_CLIENT_STREAMS));
    RIG_REQUIRE(h->state == ZT_H_OPEN || h->nstreams == 0);
    RIG_REQUIRE(h->early_len <= ZT_CHUNK);
    if (h->state != ZT_H_OPEN) return;
    /* Half a conversation is none. */
    RIG_REQUIRE(h->session != rig.broken);
    RIG_REQUIRE(!atomic_load(&h->pod->removed));
    RIG_REQUIRE(!h->server || h->identity != cut_identity);
    RIG_REQUIRE(h->server || h->peer != cut_peer);
    RIG_REQUIRE(!h->server || h->identity == THE_IDENTITY);
    /* One read's worth of frames may come on top before the limit is looked at. */
    RIG_REQUIRE(nghttp2_session_get_outbound_queue_size(h->session) <=
                ZT_MAX_QUEUED + ZT_CHUNK / 9);
}

void world_check_quiet(void) {
    const struct zt_worker *w = rig.worker;

    for (const struct zt_list *l = w->conns.next; l != &w->conns; l = l->next)
        RIG_REQUIRE(ZT_CONTAINER((uintptr_t)l, struct zt_conn, link)->state == ZT_C_OPEN);
    for (const struct zt_list *l = w->h2s.next; l != &w->h2s; l = l->next)
        RIG_REQUIRE(ZT_CONTAINER((uintptr_t)l, struct zt_h2, link)->state == ZT_H_OPEN);
    if (!rig.core->draining) return;
    /* The worker has heard of it, and nobody may use a listener any more. */
    RIG_REQUIRE(w->draining && atomic_load(&rig.core->parting) == 0);
    for (size_t b = 0; b < rig.core->pods.nbuckets; b++) {
        for (struct zt_map_node *n = rig.core->pods.buckets[b]; n; n = n->next)
            RIG_REQUIRE(atomic_load(&((struct zt_pod *)(void *)n)->hearing) == 0);
    }
}

void world_check(void) {
    const struct zt_worker *w = rig.worker;
    uint64_t conns = 0, h2s = 0;

    for (const struct zt_list *l = w->conns.next; l != &w->conns; l = l->next, conns++)
        check_conn(ZT_CONTAINER((uintptr_t)l, struct zt_conn, link));
    for (const struct zt_list *l = w->h2s.next; l != &w->h2s; l = l->next, h2s++)
        check_h2(ZT_CONTAINER((uintptr_t)l, struct zt_h2, link));
    RIG_REQUIRE(conns == zt_get(&w->stats.connections));
    RIG_REQUIRE(h2s == zt_get(&w->stats.tls_connections));
    RIG_REQUIRE(w->ngathers == 0);
    RIG_REQUIRE(rig.bytes <= BYTES_MAX);
    cut_identity = 0;
    cut_peer = NULL;
    rig.broken = NULL;
}

/* --- what the input does ---------------------------------------------------------------------------------------------- */

size_t world_send(const uint8_t *data, size_t len) {
    ssize_t n = world.wire < 0 ? 0 : send(world.wire, data, len, MSG_DONTWAIT | MSG_NOSIGNAL);

    return n > 0 ? (size_t)n : 0;
}

static int *app(uint8_t i) {
    return &apps[napps ? i % napps : 0];
}

static void app_do(enum world_op op, const uint8_t *args, size_t n) {
    static const uint8_t zeros[65536];
    int *at = app(byte(args, n, 0)), fd = napps ? *at : -1;
    size_t len = (size_t)(byte(args, n, 1) << 8 | byte(args, n, 2));

    if (fd < 0) return;
    switch (op) {
    case WORLD_APP_READ:
        read_from(fd, NULL);
        break;
    case WORLD_APP_WRITE:
        if (send(fd, zeros, len, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) break;
        break;
    case WORLD_APP_SHUT:
        shutdown(fd, SHUT_WR);
        break;
    default:
        close(fd);
        *at = -1;
    }
}

static void pod_do(bool add) {
    int ends[3];

    for (int i = 0; i < 3; i++) ends[i] = listeners[i][0];
    if (add) {
        if (RIG_CALL(
                zt_pod_add(rig.core, THE_POD, ends[0], ends, &world_local, 1, THE_CREDENTIAL)) == 0)
            pod_there = true;
    } else if (RIG_CALL(zt_pod_remove(rig.core, THE_POD)) == 0) {
        pod_there = false;
    }
}

static void connect_app(uint8_t which) {
    struct zt_addr from = world_local, to = which & 1 ? world_other : world_remote;

    from.port = 40000;
    to.port = (uint16_t)(to.port + (which >> 4));
    if (which & 2) to = world_local;   /* it calls itself */
    if (which & 4) from = world_other; /* with an address that it has not */
    world_accept(ZT_OUTBOUND, &from, &to);
}

static void accept_one(uint8_t which) {
    struct zt_addr from = which & 1 ? world_other : world_remote, to = world_local;

    if (which & 2) to = world_other;
    if (which & 4) to.port = 8080;
    world_accept(which & 8 ? ZT_INBOUND_PLAINTEXT : ZT_INBOUND_HBONE, &from, &to);
}

static uint64_t decision_at(uint8_t i) {
    return ndecisions ? 1 + i % ndecisions : 0;
}

/* The judge's part, the control side's part. */
static void control(enum world_op op, uint8_t a, uint8_t b) {
    /* Any two pointers: the cipher looks at neither. */
    SSL_CTX *context = (SSL_CTX *)(void *)&world;
    uint64_t number;

    switch (op) {
    case WORLD_JUDGE:
        judging = (enum judging)(a % JUDGINGS);
        break;
    case WORLD_ANSWER:
        answer_left();
        break;
    case WORLD_EPOCH:
        atomic_fetch_add(&rig.core->epoch, 1);
        break;
    case WORLD_KILL_DECISION:
        RIG_CALL(zt_decision_kill(rig.core, decision_at(a), ZT_R_POLICY_CHANGED));
        break;
    case WORLD_KILL_IDENTITY:
        cut_identity = a % 2 ? 8 : THE_IDENTITY;
        RIG_CALL(zt_identity_kill(rig.core, cut_identity, ZT_R_TRUST_WITHDRAWN));
        break;
    case WORLD_RELEASE:
        number = decision_at(a);
        if (number && !judged[number].released) {
            judged[number].released = true;
            RIG_REQUIRE(zt_decision_release(rig.core, number) == 0);
        }
        break;
    case WORLD_POD_REMOVE:
    case WORLD_POD_ADD:
        pod_do(op == WORLD_POD_ADD);
        break;
    case WORLD_CREDENTIAL:
        if (a % 4 == 3)
            zt_credential_remove(rig.core, THE_CREDENTIAL);
        else
            RIG_CALL(zt_credential_set(rig.core, THE_CREDENTIAL, context, context));
        break;
    case WORLD_PEER_ADD:
        RIG_CALL(zt_peer_add(rig.core, THE_PEER, THE_POD, &world_remote, THE_CREDENTIAL));
        break;
    case WORLD_PEER_REMOVE:
        RIG_CALL(zt_peer_remove(rig.core, THE_PEER));
        break;
    case WORLD_PEER_CLOSE:
        if (RIG_CALL(zt_peer_close(rig.core, THE_PEER, ZT_R_TRUST_WITHDRAWN)) == 0)
            cut_peer = (void *)zt_map_find(&rig.core->peers, THE_PEER);
        break;
    case WORLD_SERIES:
        if (a % 2)
            RIG_CALL(zt_series_add(rig.core, THE_SERIES));
        else
            RIG_CALL(zt_series_remove(rig.core, THE_SERIES));
        break;
    case WORLD_CERTIFICATES:
        certificates = a % 3 == 0 ? ALLOW : a % 3 == 1 ? REFUSE : LEAVE;
        break;
    case WORLD_HANDSHAKE:
        world.handshake_err = a % 3 == 0 ? 0 : a % 3 == 1 ? ZT_R_CERT_EXPIRED : -1;
        break;
    case WORLD_DRAIN:
        RIG_CALL(zt_core_drain(rig.core));
        break;
    case WORLD_LIST:
        begin_listing();
        break;
    case WORLD_ALLOCATION_FAILS:
        rig.fail_after = a;
        rig.fail_count = 1u + b % 16; /* in a row */
        break;
    default:
        collect();
    }
}

void world_do(unsigned op, const uint8_t *args, size_t n) {
    static const int errors[] = {0, ECONNREFUSED, ETIMEDOUT, EMFILE, ENOMEM, EADDRNOTAVAIL};
    uint8_t a = byte(args, n, 0);

    switch ((enum world_op)op) {
    case WORLD_NEXT:
        break;
    case WORLD_APP_READ:
    case WORLD_APP_WRITE:
    case WORLD_APP_SHUT:
    case WORLD_APP_CLOSE:
        app_do((enum world_op)op, args, n);
        break;
    case WORLD_CLOCK:
        rig.now_us += (uint64_t)a * 250000u;
        break;
    case WORLD_SOCKET_FAILS:
        socket_errno = errors[a % (sizeof(errors) / sizeof(errors[0]))];
        break;
    case WORLD_NOTIFY:
        world.notify = true;
        break;
    case WORLD_WIRE_SHUT:
        if (world.wire >= 0) shutdown(world.wire, SHUT_WR);
        break;
    case WORLD_WIRE_CLOSE:
        keep_wire(-1);
        break;
    case WORLD_WIRE_STALL:
        world.stalled = a % 2;
        break;
    case WORLD_CONNECT:
        connect_app(a);
        break;
    case WORLD_ACCEPT:
        accept_one(a);
        break;
    case WORLD_LOOP:
        world.loop = a % 2;
        break;
    case WORLD_READ_ALL:
        world.read_all = a % 2;
        break;
    default:
        control((enum world_op)op, a, byte(args, n, 1));
    }
}

/* --- beginning and end ------------------------------------------------------------------------------------------------- */

void world_begin(void) {
    memset(&world, 0, sizeof(world));
    memset(judged, 0, sizeof(judged));
    world.wire = -1;
    world.read_all = true;
    napps = nleft = socket_errno = 0;
    ndecisions = 0;
    listing = false;
    judging = certificates = ALLOW;
    for (int i = 0; i < 3; i++)
        RIG_REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0,
                               listeners[i]) == 0);
    zt_trace_set(rig.core, true, 1ull << 31);
    control(WORLD_SERIES, 1, 0);
    control(WORLD_CREDENTIAL, 0, 0);
    pod_do(true);
    control(WORLD_PEER_ADD, 0, 0);
}

void world_end(void) {
    struct zt_upcall u;

    while (zt_upcall_collect(rig.core, &u)) {
        for (int i = 0; i < u.nchain; i++) free(u.chain[i].data);
    }
    collect();
    RIG_REQUIRE(zt_list_empty(&rig.worker->conns) && zt_list_empty(&rig.worker->h2s));
    for (int i = 0; i < napps; i++) {
        if (apps[i] >= 0) close(apps[i]);
    }
    keep_wire(-1);
    for (int i = 0; i < 3; i++) {
        struct arrival a;

        /* Nobody accepted them. */
        while (recv(listeners[i][0], &a, sizeof(a), MSG_DONTWAIT) == sizeof(a)) close(a.fd);
        close(listeners[i][0]);
        close(listeners[i][1]);
    }
}
