/*
 * Invariant: whatever a server answers to our HBONE client, in whatever order applications, judge,
 * clock and memory do their part, no memory is misused, what is held is bounded, no stream is open
 * that was not judged and answered with 200, everything comes to an end by its deadline, and at the
 * end nothing is left.
 *
 * Input: a byte, how many applications connect at first; then frames (rig/frames.c).
 */
#include "rig/rig.h"

static const uint8_t *input;
static size_t left;

static void begin(void) {
    uint8_t plain = 0;

    world_begin();
    for (int i = 0; i <= input[0] % 8; i++) world_do(WORLD_CONNECT, &plain, 1);
    rig_settle(); /* the connection is dialled, the certificate is judged */
    frames_begin(input + 1, left - 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    input = data;
    left = size;
    rig_run(begin, frames_step, world_end);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    if (most < 2) return size;
    if (size == 0) data[size++] = 0;
    if (seed % 64 == 0) data[0]++;
    return 1 + frames_mutate(data + 1, size - 1, most - 1, seed, false);
}
