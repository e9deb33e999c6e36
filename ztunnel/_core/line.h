/* The access log's lines of connections that ended as they should (docs/architecture.md). */
#ifndef ZT_LINE_H
#define ZT_LINE_H

#include "base.h"

/* What differs from connection to connection, X(NAME, name): in a line's form each stands as the byte
 * of its place in this list, counted from 1. */
#define ZT_LINE_FIELDS(X)   \
    X(TIME, "time")         \
    X(SOURCE, "source")     \
    X(RECEIVED, "received") \
    X(SENT, "sent")         \
    X(MILLISECONDS, "milliseconds")

enum zt_line_field {
#define X(name, text) ZT_F_##name,
    ZT_LINE_FIELDS(X)
#undef X
        ZT_LINE_FIELD_COUNT
};

/* The lines that a connection of one decision will be, one or two, with what differs left open. */
struct zt_line {
    size_t len;
    unsigned lines; /* how many they are */
    char form[];
};

/* What a line says and its form does not. */
struct zt_line_values {
    const struct zt_addr *source;
    uint64_t duration_us, received, sent;
};

/* Lines that wait for the control side. */
struct zt_lines {
    char *text;
    size_t len, room;
    uint64_t count;
};

/* NULL without memory; the form must be valid. */
struct zt_line *zt_line_new(const char *form, size_t len);
/* Whether the form is at most ZT_LINE_MAX long, has at most ZT_LINE_PLACES places, consists of whole
 * lines, and has no other control characters. */
bool zt_line_valid(const char *form, size_t len);

/* Appends what `line` says of a connection that has just ended; false when there is no room. */
bool zt_lines_add(struct zt_lines *to, const struct zt_line *line, const struct zt_line_values *v);
void zt_lines_clear(struct zt_lines *lines);

#endif
