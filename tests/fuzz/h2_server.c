/*
 * Invariant: whatever a client of our HBONE port sends once its certificate is judged, in whatever
 * order applications, judge, clock and memory do their part, no memory is misused, what is held is
 * bounded (streams, queued frames, bytes), no stream is open that was not judged as exactly what it
 * is, everything comes to an end by its deadline, and at the end nothing is left.
 *
 * Input: a byte, bit 0: no preface of ours; then frames (rig/frames.c).
 */
#include "rig/rig.h"

static const uint8_t *input;
static size_t left;

static void begin(void) {
    static const uint8_t preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";

    world_begin();
    world_accept(ZT_INBOUND_HBONE, &world_remote, &world_local);
    if (!(input[0] & 1)) world_send(preface, sizeof(preface));
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
    if (seed % 256 == 0) data[0] ^= 1;
    return 1 + frames_mutate(data + 1, size - 1, most - 1, seed, true);
}
