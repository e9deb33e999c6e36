/* The rig's machinery: the worker's loop in our thread, our clock, our memory. */
#define _GNU_SOURCE
#include "rig.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

/* Turns in which what is under way comes to its end. */
#define SETTLE_TURNS 24
/* Longer than any deadline; some follow one another (silence, a PING, its answer). */
#define LATER_US (40u * 1000000u)
#define LATER_TIMES 3
/* A run that goes on for this many turns makes no progress. */
#define MAX_TURNS 20000

struct rig rig;

void rig_fail(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
    abort();
}

/* --- memory ------------------------------------------------------------------------------------------- */

void *__real_malloc(size_t size);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *old, size_t size);
void __real_free(void *old);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *old, size_t size);
void __wrap_free(void *old);
char *__wrap_strndup(const char *text, size_t most);

/* The rings of a core are large, and one that lives for a millisecond touches none of it: pages that
 * the kernel clears when they are touched. */
#define LARGE (256u * 1024)
static struct {
    void *at;
    size_t size;
} large[4];

static void *large_new(size_t size) {
    for (size_t i = 0; i < sizeof(large) / sizeof(large[0]); i++) {
        if (large[i].at) continue;
        large[i].at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        RIG_REQUIRE(large[i].at != MAP_FAILED);
        large[i].size = size;
        rig.live++;
        return large[i].at;
    }
    return NULL;
}

static bool large_free(void *old) {
    for (size_t i = 0; i < sizeof(large) / sizeof(large[0]); i++) {
        if (!old || large[i].at != old) continue;
        munmap(old, large[i].size);
        large[i].at = NULL;
        rig.live--;
        return true;
    }
    return false;
}

static bool fails(void) {
    if (!rig.inside) return false;
    rig.allocations++;
    if (!rig.fail_after) return false;
    if (rig.fail_after > 1) {
        rig.fail_after--;
        return false;
    }
    if (--rig.fail_count == 0) rig.fail_after = 0;
    errno = ENOMEM;
    return true;
}

static void *counted(void *made) {
    if (made) {
        rig.live++;
        rig.bytes += malloc_usable_size(made);
        if (rig.bytes > rig.peak) rig.peak = rig.bytes;
    }
    return made;
}

static void uncounted(void *old) {
    if (old) {
        rig.live--;
        rig.bytes -= malloc_usable_size(old);
    }
}

void *__wrap_malloc(size_t size) {
    return fails() ? NULL : counted(__real_malloc(size));
}

void *__wrap_calloc(size_t n, size_t size) {
    void *made;

    if (fails()) return NULL;
    made = rig.running && n * size >= LARGE ? large_new(n * size) : NULL;
    return made ? made : counted(__real_calloc(n, size));
}

void *__wrap_realloc(void *old, size_t size) {
    size_t before = old ? malloc_usable_size(old) : 0;
    void *made;

    if (fails()) return NULL;
    made = __real_realloc(old, size);
    if (made) {
        if (old) {
            rig.live--;
            rig.bytes -= before;
        }
        counted(made);
    }
    return made;
}

/* As libc's own: its memory would come from inside of libc, uncounted. */
char *__wrap_strndup(const char *text, size_t most) {
    size_t len = strnlen(text, most);
    char *copy = __wrap_malloc(len + 1);

    if (!copy) return NULL;
    memcpy(copy, text, len);
    copy[len] = '\0';
    return copy;
}

void __wrap_free(void *old) {
    if (large_free(old)) return;
    uncounted(old);
    __real_free(old);
}

/* --- nghttp2, whose refusals must not go unheard ----------------------------------------------------------- */

int __real_nghttp2_submit_shutdown_notice(nghttp2_session *session);
int __wrap_nghttp2_submit_shutdown_notice(nghttp2_session *session);
int __real_nghttp2_submit_goaway(nghttp2_session *session, uint8_t flags, int32_t last,
                                 uint32_t error, const uint8_t *text, size_t len);
int __wrap_nghttp2_submit_goaway(nghttp2_session *session, uint8_t flags, int32_t last,
                                 uint32_t error, const uint8_t *text, size_t len);
int __real_nghttp2_submit_ping(nghttp2_session *session, uint8_t flags, const uint8_t *opaque);
int __wrap_nghttp2_submit_ping(nghttp2_session *session, uint8_t flags, const uint8_t *opaque);
int __real_nghttp2_session_set_local_window_size(nghttp2_session *session, uint8_t flags,
                                                 int32_t id, int32_t size);
int __wrap_nghttp2_session_set_local_window_size(nghttp2_session *session, uint8_t flags,
                                                 int32_t id, int32_t size);

static int heard(const nghttp2_session *session, int rv) {
    if (nghttp2_is_fatal(rv)) rig.broken = session;
    return rv;
}

int __wrap_nghttp2_submit_shutdown_notice(nghttp2_session *session) {
    return heard(session, __real_nghttp2_submit_shutdown_notice(session));
}

int __wrap_nghttp2_submit_goaway(nghttp2_session *session, uint8_t flags, int32_t last,
                                 uint32_t error, const uint8_t *text, size_t len) {
    return heard(session, __real_nghttp2_submit_goaway(session, flags, last, error, text, len));
}

int __wrap_nghttp2_submit_ping(nghttp2_session *session, uint8_t flags, const uint8_t *opaque) {
    return heard(session, __real_nghttp2_submit_ping(session, flags, opaque));
}

int __wrap_nghttp2_session_set_local_window_size(nghttp2_session *session, uint8_t flags,
                                                 int32_t id, int32_t size) {
    return heard(session, __real_nghttp2_session_set_local_window_size(session, flags, id, size));
}

/* --- threads, time, chance ------------------------------------------------------------------------------- */

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
                          void *arg);
int __wrap_pthread_join(pthread_t thread, void **result);
int __wrap_pthread_setname_np(pthread_t thread, const char *name);
int __real_clock_gettime(clockid_t clock, struct timespec *ts);
int __wrap_clock_gettime(clockid_t clock, struct timespec *ts);
ssize_t __wrap_getrandom(void *to, size_t len, unsigned flags);
int __real_epoll_wait(int epfd, struct epoll_event *events, int most, int timeout);
int __wrap_epoll_wait(int epfd, struct epoll_event *events, int most, int timeout);

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*run)(void *),
                          void *arg) {
    (void)attr;
    RIG_REQUIRE(!rig.thread);
    *thread = pthread_self();
    rig.thread = run;
    rig.thread_arg = arg;
    return 0;
}

int __wrap_pthread_join(pthread_t thread, void **result) {
    (void)thread;
    (void)result;
    return 0;
}

int __wrap_pthread_setname_np(pthread_t thread, const char *name) {
    (void)thread;
    (void)name;
    return 0;
}

int __wrap_clock_gettime(clockid_t clock, struct timespec *ts) {
    if (!rig.running) return __real_clock_gettime(clock, ts);
    ts->tv_sec = (time_t)(rig.now_us / 1000000u);
    ts->tv_nsec = (long)(rig.now_us % 1000000u) * 1000;
    return 0;
}

/* The same input takes the same way: hash seeds and choices are no chance here. */
ssize_t __wrap_getrandom(void *to, size_t len, unsigned flags) {
    (void)flags;
    memset(to, 0x5a, len);
    return (ssize_t)len;
}

/* --- the loop ----------------------------------------------------------------------------------------------- */

static int settling, turns, idle; /* idle: turns in a row without an event */
static int later;

void rig_settle(void) {
    settling = SETTLE_TURNS;
}

/* Between two turns of the worker: the world goes on, and when it has nothing more to do, what it
 * left behind gets its time, then its deadlines, then the end. */
int __wrap_epoll_wait(int epfd, struct epoll_event *events, int most, int timeout) {
    int n;

    (void)timeout;
    rig.inside = false;
    rig.now_us += 10;
    RIG_REQUIRE(++turns < MAX_TURNS);
    world_turn();
    if (settling) {
        settling = idle > 2 ? 0 : settling - 1; /* two turns may be a question and its answer */
    } else if (!rig.step()) {
        if (later++ < LATER_TIMES) {
            rig.now_us += LATER_US;
            rig_settle();
        } else {
            world_check_quiet();
            rig.fail_after = 0;
            zt_core_stop(rig.core);
        }
    }
    rig.inside = true;
    n = __real_epoll_wait(epfd, events, most, 0);
    idle = n || !zt_list_empty(&rig.worker->tasks) ? 0 : idle + 1;
    return n;
}

static int lowest_descriptor(void) {
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);

    RIG_REQUIRE(fd >= 0);
    close(fd);
    return fd;
}

void rig_run(void (*begin)(void), bool (*step)(void), void (*end)(void)) {
    int fd = lowest_descriptor();

    memset(&rig, 0, sizeof(rig));
    settling = turns = idle = later = 0;
    rig.now_us = 1000000;
    rig.step = step;
    rig.running = true;
    signal(SIGPIPE, SIG_IGN); /* as CPython does: splice(2) has no flag for it */
    null_tls_install();
    RIG_REQUIRE(zt_core_new(&rig.core, 1) == 0);
    rig.worker = rig.core->workers[0];
    begin();
    RIG_REQUIRE(zt_core_start(rig.core) == 0);
    rig.thread(rig.thread_arg);
    rig.inside = false;
    rig.fail_after = 0;
    end();
    zt_core_free(rig.core);
    rig.core = NULL;
    rig.running = false;
    RIG_REQUIRE(rig.live == 0);
    RIG_REQUIRE(lowest_descriptor() == fd);
}
