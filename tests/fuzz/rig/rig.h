/*
 * The core under a fuzzer: one worker, run by the fuzzer's own thread, in a world that the input
 * makes. The core's files are the product's; outside of them nothing is real:
 *
 *   threads     the worker's thread is never made: rig_run calls its function (rig.c)
 *   time        stands still, and moves when the input says so (rig.c)
 *   epoll_wait  asks the kernel what is ready, after the world has done one more thing (rig.c)
 *   memory      is counted, and the n-th allocation fails when the input says so (rig.c)
 *   sockets     are pairs of unix sockets: one end is the core's, one the world's (world.c)
 *   TLS         is a cipher that does nothing (null_tls.c)
 *   Python      is the judge of world.c
 *
 * The linker puts these in place (--wrap, and files left out): the product knows nothing of them.
 */
#ifndef RIG_H
#define RIG_H

#include "h2.h"

/* Ends the process, for the fuzzer to keep the input. */
#define RIG_REQUIRE(what)                                 \
    do {                                                  \
        if (!(what)) rig_fail(__FILE__, __LINE__, #what); \
    } while (0)
_Noreturn void rig_fail(const char *file, int line, const char *what);

/* --- rig.c -------------------------------------------------------------------------------------------- */

struct rig {
    struct zt_core *core;
    struct zt_worker *worker;
    uint64_t now_us;
    bool (*step)(void); /* the world does one more thing; false: it has nothing more to do */
    void *(*thread)(void *);
    void *thread_arg;
    bool running;
    bool inside; /* the core runs: its allocations may fail */
    /* Allocations of the core until one fails (0: none will), and how many then fail in a row. */
    uint64_t fail_after, fail_count;
    uint64_t allocations;          /* that the core asked for */
    long live;                     /* objects that have not been freed */
    size_t bytes, peak;            /* their size now, and at most */
    const nghttp2_session *broken; /* nghttp2 had no memory for what it was to say, this turn */
};
extern struct rig rig;

/* Runs `core` until `step` has said false and what was under way has come to its end; frees the
 * core, and requires that nothing is left of it: no memory, no descriptor. */
void rig_run(void (*begin)(void), bool (*step)(void), void (*end)(void));
/* Turns with nothing new, for what is under way. */
void rig_settle(void);
/* A call of the core's from the control side: its allocations may fail too. */
#define RIG_CALL(call)                        \
    __extension__({                           \
        rig.inside = true;                    \
        __typeof__(call) rig_result = (call); \
        rig.inside = false;                   \
        rig_result;                           \
    })

/* --- world.c ------------------------------------------------------------------------------------------- */

/* What the input can make happen; each takes three bytes. */
#define WORLD_OPS(X)    \
    X(NEXT)             \
    X(APP_READ)         \
    X(APP_WRITE)        \
    X(APP_SHUT)         \
    X(APP_CLOSE)        \
    X(JUDGE)            \
    X(ANSWER)           \
    X(CLOCK)            \
    X(EPOCH)            \
    X(KILL_DECISION)    \
    X(KILL_IDENTITY)    \
    X(RELEASE)          \
    X(SOCKET_FAILS)     \
    X(ALLOCATION_FAILS) \
    X(NOTIFY)           \
    X(WIRE_SHUT)        \
    X(WIRE_CLOSE)       \
    X(WIRE_STALL)       \
    X(CONNECT)          \
    X(ACCEPT)           \
    X(POD_REMOVE)       \
    X(POD_ADD)          \
    X(CREDENTIAL)       \
    X(PEER_ADD)         \
    X(PEER_REMOVE)      \
    X(PEER_CLOSE)       \
    X(SERIES)           \
    X(CERTIFICATES)     \
    X(HANDSHAKE)        \
    X(COLLECT)          \
    X(LOOP)             \
    X(READ_ALL)         \
    X(DRAIN)            \
    X(LIST)
enum world_op {
#define X(name) WORLD_##name,
    WORLD_OPS(X)
#undef X
        WORLD_OP_COUNT
};

enum { THE_POD = 1, THE_CREDENTIAL = 1, THE_PEER = 1, THE_SERIES = 1, THE_IDENTITY = 7 };

struct world {
    int wire;          /* our end of the newest HBONE connection; -1: none */
    bool stalled;      /* we do not read what the core sends there */
    bool notify;       /* the cipher ends the input with close_notify */
    bool loop;         /* what the core dials comes back to it as an HBONE connection */
    bool read_all;     /* applications read at once what comes */
    int handshake_err; /* the reason with which the next handshakes fail; 0: they do not */
    unsigned questions, answers;                      /* so far, but for certificates */
    struct zt_addr asked;                             /* the destination of the last question */
    uint64_t wire_bytes;                              /* that the core has sent */
    void (*on_wire)(const uint8_t *data, size_t len); /* sees them; may be NULL */
};
extern struct world world;

/* A pod, its credential, a peer and a series, as the numbers above. */
void world_begin(void);
void world_end(void);
/* Does `op`; bytes that are not there are 0. */
void world_do(unsigned op, const uint8_t *args, size_t n);
/* Sends on the wire what the socket takes; returns how much that was. */
size_t world_send(const uint8_t *data, size_t len);
/* A client of another node dials the pod's HBONE port; an application of the pod connects. */
void world_accept(enum zt_kind kind, const struct zt_addr *from, const struct zt_addr *to);
/* Reads, judges and checks: what happens after every turn. */
void world_turn(void);
void world_check(void);
/* When every deadline has passed, whatever has not ended is open. */
void world_check_quiet(void);
/* Addresses: the pod's own, another node's pod, a third. */
extern const struct zt_addr world_local, world_remote, world_other;

/* --- null_tls.c ------------------------------------------------------------------------------------------ */

void null_tls_install(void);

/* --- frames.c: inputs of HTTP/2 ------------------------------------------------------------------------- */

/* Frames of this type and above are no frames but things for the world to do: type - FRAMES_OP. */
#define FRAMES_OP 192
_Static_assert(WORLD_OP_COUNT <= 256 - FRAMES_OP, "each has a type");

/* Runs an input: a byte, which `begins` is given when there is a world, then frames. Each step sends
 * frames on the wire until one is for the world, and lets it do that. */
int frames_run(const uint8_t *data, size_t size, void (*begins)(uint8_t how));
/* Mutates all but the first byte. */
size_t frames_mutate(uint8_t *data, size_t size, size_t most, unsigned seed, bool server);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

#endif
