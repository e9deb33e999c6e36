/*
 * Invariant: in whatever order the control side calls the core (pods, peers, credentials, decisions,
 * answers old and new, kills, epochs) while connections come, talk through two of its HBONE
 * connections and go, sockets fail and memory runs out, no memory is misused, no connection is open
 * that was not judged as exactly what it is, everything comes to an end by its deadline, and at the
 * end nothing is left.
 *
 * Input: things to do, four bytes each: which (rig/rig.h, WORLD_OPS) and its arguments.
 */
#include "rig/rig.h"

static const uint8_t *input;
static size_t left;

static void begin(void) {
    world_begin();
    world.loop = true;
}

static bool step(void) {
    if (left < 4) return false;
    world_do(input[0] % 64, input + 1, 3);
    input += 4;
    left -= 4;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data;
    left = size;
    rig_run(begin, step, world_end);
    return 0;
}
