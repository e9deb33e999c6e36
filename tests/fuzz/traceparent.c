/*
 * Invariant: a traceparent that is read is spelled as W3C Trace Context, 3.2, allows. Written again it
 * is the same text, but for the version, for flags that nobody has defined, and for what a later
 * version has appended behind a dash; it is read as sampled exactly when the last bit says so.
 */
#include <stdlib.h>
#include <string.h>

#include "trace.h"

#define WHOLE (ZT_TRACEPARENT - 1)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool what) {
    if (!what) abort();
}

static bool all_zeros(const char *text, size_t len) {
    for (size_t i = 0; i < len; i++) {
        if (text[i] != '0') return false;
    }
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const char *text = (const char *)data;
    char again[ZT_TRACEPARENT];
    struct zt_trace t = {0};
    enum zt_traced said = zt_traceparent_parse(text, size, &t.ids);

    if (said == ZT_TRACED_UNSAID) return 0;
    require(size >= WHOLE);
    require(memcmp(text, "ff", 2) != 0);
    require(size == WHOLE || (memcmp(text, "00", 2) != 0 && text[WHOLE] == '-'));
    zt_trace_write(NULL, &t, again);
    require(memcmp(again + 2, text + 2, WHOLE - 4) == 0);
    require(!all_zeros(text + 3, 32) && !all_zeros(text + 36, 16));
    require((strchr("13579bdf", text[54]) != NULL) == (said == ZT_TRACED_YES));
    return 0;
}
