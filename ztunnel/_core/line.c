/*
 * The access log's lines of connections that ended as they should.
 *
 * What such lines have in common comes with the decision, already escaped, from the control side,
 * which knows names and forms; the rest is filled in here, at the end of the connection. So an end
 * takes no Python, and nobody's first byte waits for the interpreter to finish another's line.
 */
#include "line.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The buffer at first; and what of it is kept for the next lines. */
#define ROOM_FIRST (64 * 1024)
#define ROOM_KEPT (256 * 1024)

_Static_assert(ZT_LINE_FIELD_COUNT < '\n', "a field's byte is no other control character");

struct zt_line *zt_line_new(const char *form, size_t len) {
    struct zt_line *line = malloc(sizeof(*line) + len);

    if (!line) return NULL;
    *line = (struct zt_line){.len = len};
    memcpy(line->form, form, len);
    for (size_t i = 0; i < len; i++) line->lines += form[i] == '\n';
    return line;
}

bool zt_line_valid(const char *form, size_t len) {
    unsigned places = 0;

    if (!len || len > ZT_LINE_MAX || form[len - 1] != '\n') return false;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)form[i];

        if (c >= 1 && c <= ZT_LINE_FIELD_COUNT)
            places++;
        else if (c < ' ' && c != '\n')
            return false;
    }
    return places <= ZT_LINE_PLACES;
}

/* RFC 3339, in UTC, with milliseconds. */
static void put_time(char out[ZT_ADDR_TEXT], uint64_t ago_us) {
    struct timespec now;
    struct tm tm;
    uint64_t ms;
    time_t seconds;
    size_t n;

    clock_gettime(CLOCK_REALTIME, &now);
    ms = ((uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000 - ago_us + 500) / 1000;
    seconds = (time_t)(ms / 1000);
    gmtime_r(&seconds, &tm);
    n = strftime(out, ZT_ADDR_TEXT, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(out + n, ZT_ADDR_TEXT - n, ".%03uZ", (unsigned)(ms % 1000));
}

static bool grow(struct zt_lines *to, size_t more) {
    size_t room = to->room ? to->room : ROOM_FIRST;
    char *text;

    while (room - to->len < more) room *= 2;
    if (room > ZT_LINES_MAX) return false;
    text = realloc(to->text, room);
    if (!text) return false;
    to->text = text;
    to->room = room;
    return true;
}

bool zt_lines_add(struct zt_lines *to, const struct zt_line *line, const struct zt_line_values *v) {
    const char *from = line->form, *end = line->form + line->len;
    char field[ZT_LINE_FIELD_COUNT][ZT_ADDR_TEXT];
    size_t most = line->len + (size_t)ZT_LINE_PLACES * ZT_ADDR_TEXT;
    char *at;

    if (to->room - to->len < most && !grow(to, most)) return false;
    put_time(field[ZT_F_TIME], v->duration_us);
    zt_addr_text(v->source, field[ZT_F_SOURCE]);
    snprintf(field[ZT_F_RECEIVED], ZT_ADDR_TEXT, "%llu", (unsigned long long)v->received);
    snprintf(field[ZT_F_SENT], ZT_ADDR_TEXT, "%llu", (unsigned long long)v->sent);
    snprintf(field[ZT_F_MILLISECONDS], ZT_ADDR_TEXT, "%llu",
             (unsigned long long)((v->duration_us + 500) / 1000));
    at = to->text + to->len;
    for (; from < end; from++) {
        if (*from >= 1 && *from <= ZT_LINE_FIELD_COUNT)
            at = stpcpy(at, field[*from - 1]);
        else
            *at++ = *from;
    }
    to->len = (size_t)(at - to->text);
    to->count += line->lines;
    return true;
}

void zt_lines_clear(struct zt_lines *lines) {
    if (lines->room > ROOM_KEPT) {
        free(lines->text);
        *lines = (struct zt_lines){0};
    }
    lines->len = 0;
    lines->count = 0;
}
