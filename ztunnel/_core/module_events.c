/*
 * What Python hears from the core: questions (and its answers to them), ends, failures, counters.
 */
#include "limit.h"
#include "listing.h"
#include "module.h"

/* Takes at most this many items at once, on the stack. */
#define BATCH 256

static PyObject *ip_bytes(const struct zt_addr *a) {
    return PyBytes_FromStringAndSize((const char *)a->ip, 16);
}

static PyObject *optional_ip(const struct zt_addr *a) {
    return a->port ? ip_bytes(a) : PyBytes_FromStringAndSize(NULL, 0);
}

/* Appends and gives the reference away; -1 with an exception set. */
static int append(PyObject *list, PyObject *item) {
    int rv = item ? PyList_Append(list, item) : -1;

    Py_XDECREF(item);
    return rv;
}

/* --- upcalls ---------------------------------------------------------------------------------------------------------- */

static PyObject *chain_tuple(const struct zt_upcall *u) {
    PyObject *t = PyTuple_New(u->nchain);

    for (int i = 0; t && i < u->nchain; i++) {
        PyObject *der =
            PyBytes_FromStringAndSize((char *)u->chain[i].data, (Py_ssize_t)u->chain[i].len);

        if (!der) {
            Py_CLEAR(t);
            break;
        }
        PyTuple_SET_ITEM(t, i, der);
    }
    return t;
}

static PyObject *upcall_object(struct module_state *state, const struct zt_upcall *u) {
    struct zt_py_filler f = zt_py_fill(state->upcall);

    zt_py_put(&f, zt_py_number(u->node.number));
    zt_py_put(&f, PyLong_FromLong(u->key.kind));
    zt_py_put(&f, zt_py_number(u->epoch));
    zt_py_put(&f, zt_py_number(u->key.pod));
    zt_py_put(&f, optional_ip(&u->source));
    zt_py_put(&f, PyLong_FromLong(u->source.port));
    zt_py_put(&f, optional_ip(&u->destination));
    zt_py_put(&f, PyLong_FromLong(u->destination.port));
    zt_py_put(&f, zt_py_number(u->key.identity));
    zt_py_put(&f, zt_py_number(u->peer));
    zt_py_put(&f, chain_tuple(u));
    return zt_py_filled(&f);
}

PyObject *zt_py_upcalls(PyObject *self, PyObject *arg) {
    long most = PyLong_AsLong(arg);
    PyObject *list;
    struct zt_upcall u;

    if (PyErr_Occurred()) return NULL;
    list = PyList_New(0);
    while (list && most-- > 0 && zt_upcall_collect(zt_py_core(self), &u)) {
        PyObject *item = upcall_object(zt_py_state(self), &u);

        for (int i = 0; i < u.nchain; i++) free(u.chain[i].data);
        if (append(list, item) < 0) Py_CLEAR(list);
    }
    return list;
}

PyObject *zt_py_answer(PyObject *self, PyObject *args) {
    unsigned long long id, epoch, decision;
    int rv;

    if (!PyArg_ParseTuple(args, "KKK", &id, &epoch, &decision)) return NULL;
    rv = zt_upcall_answer(zt_py_core(self), id, epoch, decision);
    if (rv < 0) return zt_py_errno(rv, "answer");
    return PyBool_FromLong(rv);
}

PyObject *zt_py_answer_certificate(PyObject *self, PyObject *args) {
    unsigned long long id, identity;
    int reason;

    if (!PyArg_ParseTuple(args, "KKi", &id, &identity, &reason) || zt_py_check_reason(reason) < 0)
        return NULL;
    if (!identity && reason == ZT_R_CLOSED)
        return PyErr_Format(PyExc_ValueError, "a refusal needs a reason other than closed");
    zt_upcall_answer_certificate(zt_py_core(self), id, identity, (enum zt_reason)reason);
    Py_RETURN_NONE;
}

/* --- what happened ---------------------------------------------------------------------------------------------------- */

static PyObject *id_bytes(const uint8_t *id, size_t len) {
    return PyBytes_FromStringAndSize((const char *)id, (Py_ssize_t)len);
}

static PyObject *ended_object(struct module_state *state, const struct zt_ended *e) {
    struct zt_py_filler f = zt_py_fill(state->ended);

    zt_py_put(&f, PyLong_FromLong(e->kind));
    zt_py_put(&f, zt_py_number(e->pod));
    zt_py_put(&f, zt_py_number(e->decision));
    zt_py_put(&f, zt_py_number(e->identity));
    zt_py_put(&f, ip_bytes(&e->source));
    zt_py_put(&f, PyLong_FromLong(e->source.port));
    zt_py_put(&f, ip_bytes(&e->destination));
    zt_py_put(&f, PyLong_FromLong(e->destination.port));
    zt_py_put(&f, optional_ip(&e->upstream));
    zt_py_put(&f, PyLong_FromLong(e->upstream.port));
    zt_py_put(&f, zt_py_number(e->started_us));
    zt_py_put(&f, zt_py_number(e->duration_us));
    zt_py_put(&f, zt_py_number(e->received));
    zt_py_put(&f, zt_py_number(e->sent));
    zt_py_put(&f, PyLong_FromLong(e->reason));
    zt_py_put(&f, id_bytes(e->trace.ids.trace, e->traced ? sizeof(e->trace.ids.trace) : 0));
    zt_py_put(&f, id_bytes(e->trace.ids.span, e->traced ? sizeof(e->trace.ids.span) : 0));
    zt_py_put(&f, id_bytes(e->trace.parent, e->traced ? sizeof(e->trace.parent) : 0));
    zt_py_put(&f, zt_py_number(e->trace.opened_us));
    return zt_py_filled(&f);
}

static PyObject *failed_object(struct module_state *state, const struct zt_failed *x) {
    struct zt_py_filler f = zt_py_fill(state->failed);

    zt_py_put(&f, PyLong_FromLong(x->kind));
    zt_py_put(&f, zt_py_number(x->pod));
    zt_py_put(&f, zt_py_number(x->peer));
    zt_py_put(&f, ip_bytes(&x->addr));
    zt_py_put(&f, PyLong_FromLong(x->addr.port));
    zt_py_put(&f, PyLong_FromLong(x->reason));
    zt_py_put(&f, PyUnicode_DecodeUTF8(x->detail, (Py_ssize_t)strlen(x->detail), "replace"));
    return zt_py_filled(&f);
}

/* Methods that take what waits, in batches of BATCH. */
#define TAKE(method, type, call, object)                                                   \
    PyObject *zt_py_##method(PyObject *self, PyObject *arg) {                              \
        Py_ssize_t most = PyLong_AsSsize_t(arg);                                           \
        PyObject *list;                                                                    \
        type items[BATCH];                                                                 \
                                                                                           \
        if (PyErr_Occurred()) return NULL;                                                 \
        list = PyList_New(0);                                                              \
        while (list && most > 0) {                                                         \
            size_t n = call(zt_py_core(self), items, most < BATCH ? (size_t)most : BATCH); \
                                                                                           \
            for (size_t i = 0; list && i < n; i++) {                                       \
                if (append(list, object) < 0) Py_CLEAR(list);                              \
            }                                                                              \
            if (n < BATCH) break;                                                          \
            most -= (Py_ssize_t)n;                                                         \
        }                                                                                  \
        return list;                                                                       \
    }
TAKE(ended, struct zt_ended, zt_ended_take, ended_object(zt_py_state(self), &items[i]))
TAKE(failed, struct zt_failed, zt_failed_take, failed_object(zt_py_state(self), &items[i]))
TAKE(freed, uint64_t, zt_freed_take, zt_py_number(items[i]))

PyObject *zt_py_lines(PyObject *self, PyObject *unused) {
    const struct zt_lines *lines = zt_lines_take(zt_py_core(self));

    return Py_BuildValue("y#K", lines->len ? lines->text : "", (Py_ssize_t)lines->len,
                         (unsigned long long)lines->count);
}

/* --- what is carried -------------------------------------------------------------------------------------------------- */

/* A few names for thousands of connections: each is one object. */
static PyObject *name_object(const char *name) {
    return PyUnicode_InternFromString(name);
}

static PyObject *listed_object(struct module_state *state, const struct zt_listed *l) {
    struct zt_py_filler f = zt_py_fill(state->listed);

    zt_py_put(&f, zt_py_number(l->number));
    zt_py_put(&f, PyLong_FromLong(l->kind));
    zt_py_put(&f, PyLong_FromLong(l->state));
    zt_py_put(&f, zt_py_number(l->pod));
    zt_py_put(&f, zt_py_number(l->decision));
    zt_py_put(&f, zt_py_number(l->identity));
    zt_py_put(&f, ip_bytes(&l->source));
    zt_py_put(&f, PyLong_FromLong(l->source.port));
    zt_py_put(&f, ip_bytes(&l->destination));
    zt_py_put(&f, PyLong_FromLong(l->destination.port));
    zt_py_put(&f, optional_ip(&l->upstream));
    zt_py_put(&f, PyLong_FromLong(l->upstream.port));
    zt_py_put(&f, zt_py_number(l->started_us));
    zt_py_put(&f, zt_py_number(l->moved_us));
    zt_py_put(&f, zt_py_number(l->received));
    zt_py_put(&f, zt_py_number(l->sent));
    zt_py_put(&f, name_object(l->tls.version));
    zt_py_put(&f, name_object(l->tls.cipher));
    zt_py_put(&f, name_object(l->tls.group));
    return zt_py_filled(&f);
}

PyObject *zt_py_list_connections(PyObject *self, PyObject *unused) {
    int rv = zt_listing_begin(zt_py_core(self));

    return zt_py_done(rv, "list_connections");
}

PyObject *zt_py_listed(PyObject *self, PyObject *arg) {
    Py_ssize_t most = PyLong_AsSsize_t(arg);
    struct zt_listed items[BATCH];
    uint64_t missed = 0;
    bool over = false;
    PyObject *list;

    if (PyErr_Occurred()) return NULL;
    list = PyList_New(0);
    while (list && most > 0) {
        size_t n = zt_listing_take(zt_py_core(self), items, most < BATCH ? (size_t)most : BATCH,
                                   &over, &missed);

        for (size_t i = 0; list && i < n; i++) {
            if (append(list, listed_object(zt_py_state(self), &items[i])) < 0) Py_CLEAR(list);
        }
        if (n < BATCH) break;
        most -= (Py_ssize_t)n;
    }
    if (!list) return NULL;
    return Py_BuildValue("NOK", list, over ? Py_True : Py_False, (unsigned long long)missed);
}

/* --- counters --------------------------------------------------------------------------------------------------------- */

PyObject *zt_py_read_pod(PyObject *self, PyObject *arg) {
    unsigned long long number = PyLong_AsUnsignedLongLong(arg);
    struct zt_pod_counters c;
    struct zt_py_filler f;
    int rv;

    if (PyErr_Occurred()) return NULL;
    rv = zt_pod_read(zt_py_core(self), number, &c);
    if (rv < 0) return zt_py_errno(rv, "pod");
    f = zt_py_fill(zt_py_state(self)->pod);
    zt_py_put(&f, zt_py_number(c.connections));
    zt_py_put(&f, zt_py_number(c.descriptors));
    zt_py_put(&f, zt_py_number(c.dials));
    zt_py_put(&f, zt_py_number(c.questions));
    zt_py_put(&f, zt_py_number(c.handshakes));
    zt_py_put(&f, zt_py_number(c.held));
    zt_py_put(&f, zt_py_counts(c.refused, ZT_REASON_COUNT));
    return zt_py_filled(&f);
}

PyObject *zt_py_stats(PyObject *self, PyObject *unused) {
    struct zt_core *core = zt_py_core(self);
    struct zt_worker_stats s;
    PyObject *workers = PyTuple_New(core->nworkers), *loops = PyTuple_New(core->nworkers);
    struct zt_py_filler f;

    zt_stats_sum(core, &s);
    for (int i = 0; i < core->nworkers; i++) {
        const struct zt_worker_stats *w = &core->workers[i]->stats;

        if (workers && loops) {
            PyTuple_SET_ITEM(workers, i,
                             Py_BuildValue("KK", (unsigned long long)zt_get(&w->connections),
                                           (unsigned long long)zt_get(&w->accepted)));
            PyTuple_SET_ITEM(loops, i, zt_py_number(zt_get(&w->last_loop_us)));
        }
    }
    f = zt_py_fill(zt_py_state(self)->stats);
    zt_py_put(&f, zt_py_number(zt_get(&s.connections)));
    zt_py_put(&f, zt_py_number(zt_get(&s.tls_connections)));
    zt_py_put(&f, zt_py_number(zt_get(&s.descriptors)));
    zt_py_put(&f, zt_py_number(zt_descriptors_for_connections(core)));
    zt_py_put(&f, zt_py_number(zt_get(&s.held)));
    zt_py_put(&f, zt_py_counts(s.handshakes_client.bucket, ZT_BUCKETS + 1));
    zt_py_put(&f, zt_py_number(zt_get(&s.handshakes_client.sum_us)));
    zt_py_put(&f, zt_py_counts(s.handshakes_server.bucket, ZT_BUCKETS + 1));
    zt_py_put(&f, zt_py_number(zt_get(&s.handshakes_server.sum_us)));
    zt_py_put(&f, zt_py_counts(s.handshake_failures, ZT_REASON_COUNT));
    zt_py_put(&f, zt_py_counts(s.expired, ZT_DEADLINES));
    zt_py_put(&f, zt_py_number(zt_get(&s.upcalls)));
    zt_py_put(&f, zt_py_counts(s.upcall_latency.bucket, ZT_BUCKETS + 1));
    zt_py_put(&f, zt_py_number(zt_get(&s.upcall_latency.sum_us)));
    zt_py_put(&f, zt_py_number(zt_get(&s.table_hits)));
    pthread_mutex_lock(&core->queue_lock);
    zt_py_put(&f, zt_py_number(core->events_lost));
    pthread_mutex_unlock(&core->queue_lock);
    zt_py_put(&f, workers);
    zt_py_put(&f, loops);
    zt_py_put(&f, zt_py_number(zt_get(&s.traces_left_out)));
    return zt_py_filled(&f);
}

/* --- the records ------------------------------------------------------------------------------ */

/* clang-format off: tables by hand */
#define F(name) \
    { #name, NULL }
#define END \
    { NULL, NULL }
static PyStructSequence_Field upcall_fields[] = {
    F(id),       F(kind),        F(epoch),       F(pod),
    F(source),   F(source_port), F(destination), F(destination_port),
    F(identity), F(peer),        F(chain),       END};
static PyStructSequence_Field ended_fields[] = {
    F(kind),        F(pod),         F(decision),         F(identity),  F(source),
    F(source_port), F(destination), F(destination_port), F(upstream),  F(upstream_port),
    F(started_us),  F(duration_us), F(received),         F(sent),      F(reason),
    F(trace_id),    F(span_id),     F(parent_id),        F(opened_us), END};
static PyStructSequence_Field failed_fields[] = {F(kind), F(pod),    F(peer),   F(address),
                                                 F(port), F(reason), F(detail), END};
static PyStructSequence_Field listed_fields[] = {
    F(number),   F(kind),          F(state),       F(pod),         F(decision),
    F(identity), F(source),        F(source_port), F(destination), F(destination_port),
    F(upstream), F(upstream_port), F(started_us),  F(moved_us),    F(received),
    F(sent),     F(tls_version),   F(cipher),      F(group),       END};
static PyStructSequence_Field series_fields[] = {F(opened),   F(closed), F(failed),
                                                 F(received), F(sent),   END};
static PyStructSequence_Field pod_fields[] = {
    F(connections), F(descriptors), F(dials),   F(questions),
    F(handshakes),  F(held_bytes),  F(refused), END};
static PyStructSequence_Field stats_fields[] = {F(connections),
                                                F(tls_connections),
                                                F(descriptors),
                                                F(descriptors_most),
                                                F(held_bytes),
                                                F(handshakes_client),
                                                F(handshakes_client_sum_us),
                                                F(handshakes_server),
                                                F(handshakes_server_sum_us),
                                                F(handshake_failures),
                                                F(expired),
                                                F(upcalls),
                                                F(upcall_latency),
                                                F(upcall_latency_sum_us),
                                                F(table_hits),
                                                F(events_lost),
                                                F(workers),
                                                F(last_loop_us),
                                                F(traces_left_out),
                                                END};
/* clang-format on */

static int add_record(PyObject *module, PyTypeObject **slot, const char *name,
                      const char *qualified, PyStructSequence_Field *fields, int n) {
    PyStructSequence_Desc desc = {qualified, NULL, fields, n};

    *slot = PyStructSequence_NewType(&desc);
    if (!*slot) return -1;
    return PyModule_AddObjectRef(module, name, (PyObject *)*slot);
}

#define RECORD(slot, name, fields)                                        \
    add_record(module, &state->slot, name, "ztunnel._core." name, fields, \
               (int)(sizeof(fields) / sizeof(fields[0])) - 1)

int zt_py_add_records(PyObject *module, struct module_state *state) {
    if (RECORD(upcall, "Upcall", upcall_fields) < 0 || RECORD(ended, "Ended", ended_fields) < 0 ||
        RECORD(failed, "Failed", failed_fields) < 0 ||
        RECORD(listed, "Listed", listed_fields) < 0 ||
        RECORD(series, "SeriesCounters", series_fields) < 0 ||
        RECORD(pod, "PodCounters", pod_fields) < 0 || RECORD(stats, "Stats", stats_fields) < 0)
        return -1;
    return 0;
}
