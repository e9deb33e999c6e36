/*
 * Invariant: what zt_authority_parse accepts is an address and a port that, written by zt_addr_text,
 * parse to the same address and port again; and nothing that it reads lies outside its input.
 */
#include <stdlib.h>

#include "base.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct zt_addr first, second;
    char text[ZT_ADDR_TEXT];
    int len;

    if (zt_authority_parse((const char *)data, size, &first) < 0) return 0;
    if (first.port == 0) abort();
    len = zt_addr_text(&first, text);
    if (len <= 0 || len >= ZT_ADDR_TEXT) abort();
    if (zt_authority_parse(text, (size_t)len, &second) < 0) abort();
    if (!zt_addr_ip_equal(&first, &second) || first.port != second.port) abort();
    return 0;
}
