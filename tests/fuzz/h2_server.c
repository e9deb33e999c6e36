/*
 * Invariant: whatever a client of our HBONE port sends once its certificate is judged, in whatever
 * order applications, judge, clock and memory do their part, no memory is misused, what is held is
 * bounded (streams, queued frames, bytes), no stream is open that was not judged as exactly what it
 * is, everything comes to an end by its deadline, and at the end nothing is left.
 *
 * Input: a byte, bit 0: no preface of ours; then frames (rig/frames.c).
 */
#include "rig/rig.h"

static void begin(uint8_t how) {
    static const uint8_t preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0";

    world_accept(ZT_INBOUND_HBONE, &world_remote, &world_local);
    if (!(how & 1)) world_send(preface, sizeof(preface));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    return frames_run(data, size, begin);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    if (size && seed % 256 == 0) data[0] ^= 1;
    return frames_mutate(data, size, most, seed, true);
}
