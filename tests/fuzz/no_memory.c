/*
 * Invariant: whichever allocations fail while a core has traffic of every kind (tunnelled both ways,
 * forwarded, delivered, refused, balanced, rotated, cut), no memory is misused or lost, no connection
 * is open that was not judged or whose end was ordered, everything comes to an end by its deadline;
 * and as soon as there is memory again, connections go through, without a restart of anything.
 *
 * Input: the number of the allocation that fails first (two bytes, low one first; 0: none), and how
 * many fail in a row. tests/unit/test_core_fuzz.py goes through all of them.
 */
#include <inttypes.h>
#include <stdio.h>

#include "rig/rig.h"

static const struct {
    enum world_op op;
    uint8_t args[3];
} script[] = {
    {WORLD_LOOP, {1}},
    {WORLD_CONNECT, {0}}, /* through the tunnel, which is dialled for it */
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_APP_WRITE, {0, 32, 0}},
    {WORLD_NEXT, {0}},
    {WORLD_APP_WRITE, {1, 255, 0}},
    {WORLD_READ_ALL, {0}}, /* nobody reads: what comes has to be kept */
    {WORLD_APP_WRITE, {0, 255, 0}},
    {WORLD_NEXT, {0}},
    {WORLD_APP_WRITE, {0, 255, 0}},
    {WORLD_APP_WRITE, {0, 255, 0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_READ_ALL, {1}},
    {WORLD_NEXT, {0}},
    {WORLD_ACCEPT, {12}}, /* plaintext, delivered */
    {WORLD_NEXT, {0}},
    {WORLD_APP_WRITE, {2, 1, 0}},
    {WORLD_JUDGE, {6}}, /* forwarded */
    {WORLD_CONNECT, {1}},
    {WORLD_NEXT, {0}},
    {WORLD_APP_WRITE, {3, 1, 0}},
    {WORLD_CREDENTIAL, {0}}, /* rotated: a new connection for new streams */
    {WORLD_JUDGE, {5}},      /* balanced */
    {WORLD_EPOCH, {0}},
    {WORLD_CONNECT, {16}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_JUDGE, {1}}, /* refused */
    {WORLD_CONNECT, {32}},
    {WORLD_ACCEPT, {13}},
    {WORLD_NEXT, {0}},
    {WORLD_JUDGE, {0}},
    {WORLD_APP_SHUT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_KILL_DECISION, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_CONNECT, {48}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_KILL_IDENTITY, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_CONNECT, {64}},
    {WORLD_NEXT, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_PEER_CLOSE, {0}},
    {WORLD_NEXT, {0}},
    {WORLD_CLOCK, {60}}, /* PINGs */
    {WORLD_NEXT, {0}},
    {WORLD_POD_REMOVE, {0}},
    {WORLD_NEXT, {0}},
};

static size_t at;
static int after; /* steps of the proof */
static uint16_t first;
static uint8_t in_a_row;
static uint64_t proof_began;

static void begin(void) {
    world_begin();
    at = 0;
    after = 0;
    rig.fail_after = first;
    rig.fail_count = 1u + in_a_row;
}

static int open_of(enum zt_kind kind) {
    int n = 0;

    for (const struct zt_list *l = rig.worker->conns.next; l != &rig.worker->conns; l = l->next) {
        const struct zt_conn *c = ZT_CONTAINER((uintptr_t)l, struct zt_conn, link);

        n += c->kind == kind && c->state == ZT_C_OPEN && c->started >= proof_began;
    }
    return n;
}

/* There is memory again. The control side's own orders it repeats itself: the pod, a peer of it. */
static bool prove(void) {
    static const uint8_t none[3];

    switch (after++) {
    case 0:
        rig.fail_after = 0;
        world_do(WORLD_POD_REMOVE, none, 3);
        world_do(WORLD_PEER_REMOVE, none, 3);
        world_do(WORLD_CREDENTIAL, none, 3);
        world_do(WORLD_CLOCK, (const uint8_t[]){60}, 1);
        break;
    case 1:
        world_do(WORLD_POD_ADD, none, 3);
        world_do(WORLD_PEER_ADD, none, 3);
        world_do(WORLD_JUDGE, none, 3);
        world_do(WORLD_EPOCH, none, 3);
        break;
    case 2:
        proof_began = rig.now_us;
        world_do(WORLD_CONNECT, none, 3);
        world_do(WORLD_ACCEPT, (const uint8_t[]){12}, 1);
        rig_settle();
        break;
    default:
        RIG_REQUIRE(open_of(ZT_OUTBOUND) == 1);
        RIG_REQUIRE(open_of(ZT_INBOUND_HBONE) == 1);
        RIG_REQUIRE(open_of(ZT_INBOUND_PLAINTEXT) == 1);
        return false;
    }
    return true;
}

static bool step(void) {
    if (at == sizeof(script) / sizeof(script[0])) return after < 4 && prove();
    world_do(script[at].op, script[at].args, 3);
    at++;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size != 3) return -1;
    first = (uint16_t)(data[0] | data[1] << 8);
    in_a_row = data[2];
    rig_run(begin, step, world_end);
    if (!first) fprintf(stderr, "allocations: %" PRIu64 "\n", rig.allocations);
    return 0;
}
