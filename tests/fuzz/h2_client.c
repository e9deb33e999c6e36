/*
 * Invariant: whatever a server answers to our HBONE client, in whatever order applications, judge,
 * clock and memory do their part, no memory is misused, what is held is bounded, no stream is open
 * that was not judged and answered with 200, everything comes to an end by its deadline, and at the
 * end nothing is left.
 *
 * Input: a byte, how many applications connect at first; then frames (rig/frames.c).
 */
#include "rig/rig.h"

static void begin(uint8_t how) {
    uint8_t plain = 0;

    for (int i = 0; i <= how % 8; i++) world_do(WORLD_CONNECT, &plain, 1);
    rig_settle(); /* the connection is dialled, the certificate is judged */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    return frames_run(data, size, begin);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    if (size && seed % 64 == 0) data[0]++;
    return frames_mutate(data, size, most, seed, false);
}
