/*
 * The core as a Python type. The only file that knows of Python: it converts, checks and calls.
 * Nothing here runs on a worker's thread, and no worker ever takes the interpreter's lock.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structseq.h>

#include <errno.h>
#include <stddef.h>

#include "worker.h"

/* Takes at most this many items at once, on the stack. */
#define BATCH 256

#define RECORDS(X) X(upcall) X(ended) X(failed) X(series) X(stats)

struct module_state {
#define X(record) PyTypeObject *record;
    RECORDS(X)
#undef X
};

struct core_object {
    PyObject_HEAD
    struct zt_core *core;
    struct module_state *state;
};

static struct zt_core *core_of(PyObject *self) {
    return ((struct core_object *)(void *)self)->core;
}

static struct module_state *state_of(PyObject *self) {
    return ((struct core_object *)(void *)self)->state;
}

/* --- conversions ------------------------------------------------------------------------------------------ */

static PyObject *raise_errno(int rv, const char *what) {
    if (rv == -ENOMEM) return PyErr_NoMemory();
    if (rv == -ENOENT) return PyErr_Format(PyExc_KeyError, "%s: unknown number", what);
    if (rv == -EEXIST) return PyErr_Format(PyExc_ValueError, "%s: number already in use", what);
    errno = -rv;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *done(int rv, const char *what) {
    if (rv < 0) return raise_errno(rv, what);
    Py_RETURN_NONE;
}

static int to_addr(const char *ip, Py_ssize_t len, unsigned long port, struct zt_addr *out) {
    memset(out, 0, sizeof(*out));
    if (len != 16) {
        PyErr_Format(PyExc_ValueError, "an address has 16 bytes, not %zd", len);
        return -1;
    }
    if (port > 65535) {
        PyErr_Format(PyExc_ValueError, "port %lu is above 65535", port);
        return -1;
    }
    memcpy(out->ip, ip, 16);
    out->port = (uint16_t)port;
    return 0;
}

static int check_reason(int reason) {
    if (reason >= 0 && reason < ZT_REASON_COUNT) return 0;
    PyErr_Format(PyExc_ValueError, "reason %d is not an index of REASONS", reason);
    return -1;
}

static PyObject *ip_bytes(const struct zt_addr *a) {
    return PyBytes_FromStringAndSize((const char *)a->ip, 16);
}

static PyObject *optional_ip(const struct zt_addr *a) {
    return a->port ? ip_bytes(a) : PyBytes_FromStringAndSize(NULL, 0);
}

static PyObject *number(uint64_t n) {
    return PyLong_FromUnsignedLongLong(n);
}

/* Fills a struct sequence field by field; a NULL among the values means that memory ran out. */
struct filler {
    PyObject *seq;
    Py_ssize_t at;
    bool failed;
};

static struct filler fill(PyTypeObject *type) {
    struct filler f = {.seq = PyStructSequence_New(type)};

    f.failed = !f.seq;
    return f;
}

static void put(struct filler *f, PyObject *value) {
    if (!value) f->failed = true;
    if (f->failed) {
        Py_XDECREF(value);
        return;
    }
    PyStructSequence_SET_ITEM(f->seq, f->at++, value);
}

static PyObject *filled(struct filler *f) {
    if (!f->failed) return f->seq;
    Py_XDECREF(f->seq);
    return NULL;
}

static PyObject *count_tuple(const zt_count *counts, Py_ssize_t n) {
    PyObject *t = PyTuple_New(n);

    for (Py_ssize_t i = 0; t && i < n; i++) {
        PyObject *v = number(zt_get(&counts[i]));

        if (!v) {
            Py_CLEAR(t);
            break;
        }
        PyTuple_SET_ITEM(t, i, v);
    }
    return t;
}

/* Appends and gives the reference away; -1 with an exception set. */
static int append(PyObject *list, PyObject *item) {
    int rv = item ? PyList_Append(list, item) : -1;

    Py_XDECREF(item);
    return rv;
}

/* --- life ----------------------------------------------------------------------------------------------------- */

static int read_functions(PyObject *functions) {
    static const struct {
        const char *name;
        size_t offset;
    } rows[] = {
#define X(name, returns, arguments, declaration) {#name, offsetof(struct zt_ossl, name)},
        ZT_OSSL(X)
#undef X
    };
    struct zt_ossl table;

    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        PyObject *value = PyDict_GetItemString(functions, rows[i].name);
        void *pointer = value ? PyLong_AsVoidPtr(value) : NULL;

        if (PyErr_Occurred()) return -1;
        if (!pointer) {
            PyErr_Format(PyExc_ValueError, "functions: no address for %s", rows[i].name);
            return -1;
        }
        memcpy((char *)&table + rows[i].offset, &pointer, sizeof(pointer));
    }
    ossl = table;
    return 0;
}

static int core_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"workers", "functions", NULL};
    struct core_object *o = (struct core_object *)(void *)self;
    PyObject *functions;
    int workers, rv;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iO!", names, &workers, &PyDict_Type,
                                     &functions))
        return -1;
    if (o->core) {
        PyErr_SetString(PyExc_RuntimeError, "the core is initialised already");
        return -1;
    }
    if (workers < 1 || workers > ZT_MAX_WORKERS) {
        PyErr_Format(PyExc_ValueError, "workers must be 1 to %d, not %d", ZT_MAX_WORKERS, workers);
        return -1;
    }
    if (read_functions(functions) < 0) return -1;
    o->state = PyType_GetModuleState(Py_TYPE(self));
    rv = zt_core_new(&o->core, workers);
    if (rv < 0) {
        raise_errno(rv, "core");
        return -1;
    }
    return 0;
}

static void core_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    struct zt_core *core = core_of(self);

    if (core) {
        Py_BEGIN_ALLOW_THREADS;
        zt_core_free(core);
        Py_END_ALLOW_THREADS;
    }
    type->tp_free(self);
    Py_DECREF(type);
}

static PyObject *core_start(PyObject *self, PyObject *unused) {
    return done(zt_core_start(core_of(self)), "start");
}

static PyObject *core_stop(PyObject *self, PyObject *unused) {
    Py_BEGIN_ALLOW_THREADS;
    zt_core_stop(core_of(self));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

static PyObject *core_event_fd(PyObject *self, void *closure) {
    return PyLong_FromLong(core_of(self)->event_fd);
}

static PyObject *core_epoch(PyObject *self, void *closure) {
    return number(atomic_load(&core_of(self)->epoch));
}

static PyObject *core_advance_epoch(PyObject *self, PyObject *unused) {
    return number(atomic_fetch_add(&core_of(self)->epoch, 1) + 1);
}

/* --- pods, credentials, peers, series ------------------------------------------------------------------------------ */

static PyObject *core_add_pod(PyObject *self, PyObject *args) {
    struct zt_addr addrs[ZT_MAX_POD_ADDRS];
    unsigned long long pod, credential;
    int netns, listeners[3];
    PyObject *addresses;
    Py_ssize_t n;

    if (!PyArg_ParseTuple(args, "KiiiiO!K", &pod, &netns, &listeners[0], &listeners[1],
                          &listeners[2], &PyTuple_Type, &addresses, &credential))
        return NULL;
    n = PyTuple_GET_SIZE(addresses);
    if (n < 1 || n > ZT_MAX_POD_ADDRS)
        return PyErr_Format(PyExc_ValueError, "a pod has 1 to %d addresses, not %zd",
                            ZT_MAX_POD_ADDRS, n);
    for (Py_ssize_t i = 0; i < n; i++) {
        char *ip;
        Py_ssize_t len;

        if (PyBytes_AsStringAndSize(PyTuple_GET_ITEM(addresses, i), &ip, &len) < 0 ||
            to_addr(ip, len, 0, &addrs[i]) < 0)
            return NULL;
    }
    return done(zt_pod_add(core_of(self), pod, netns, listeners, addrs, (int)n, credential),
                "add_pod");
}

static PyObject *core_add_peer(PyObject *self, PyObject *args) {
    unsigned long long peer, pod, credential;
    unsigned long port;
    const char *ip;
    Py_ssize_t len;
    struct zt_addr addr;

    if (!PyArg_ParseTuple(args, "KKy#kK", &peer, &pod, &ip, &len, &port, &credential) ||
        to_addr(ip, len, port, &addr) < 0)
        return NULL;
    return done(zt_peer_add(core_of(self), peer, pod, &addr, credential), "add_peer");
}

static PyObject *core_set_credential(PyObject *self, PyObject *args) {
    unsigned long long credential, client, server;

    if (!PyArg_ParseTuple(args, "KKK", &credential, &client, &server)) return NULL;
    if (!client || !server) return PyErr_Format(PyExc_ValueError, "a context must not be null");
    return done(zt_credential_set(core_of(self), credential, (SSL_CTX *)(uintptr_t)client,
                                  (SSL_CTX *)(uintptr_t)server),
                "set_credential");
}

/* Methods of one number. */
#define BY_NUMBER(method, call)                                     \
    static PyObject *core_##method(PyObject *self, PyObject *arg) { \
        unsigned long long n = PyLong_AsUnsignedLongLong(arg);      \
                                                                    \
        if (PyErr_Occurred()) return NULL;                          \
        return done(call(core_of(self), n), #method);               \
    }
BY_NUMBER(remove_pod, zt_pod_remove)
BY_NUMBER(remove_credential, zt_credential_remove)
BY_NUMBER(remove_peer, zt_peer_remove)
BY_NUMBER(add_series, zt_series_add)
BY_NUMBER(remove_series, zt_series_remove)
BY_NUMBER(release_decision, zt_decision_release)

/* Methods of a number and a reason. */
#define BY_REASON(method, call)                                                                  \
    static PyObject *core_##method(PyObject *self, PyObject *args) {                             \
        unsigned long long n;                                                                    \
        int reason;                                                                              \
                                                                                                 \
        if (!PyArg_ParseTuple(args, "Ki", &n, &reason) || check_reason(reason) < 0) return NULL; \
        return done(call(core_of(self), n, (enum zt_reason)reason), #method);                    \
    }
BY_REASON(close_peer, zt_peer_close)
BY_REASON(kill_decision, zt_decision_kill)
BY_REASON(kill_identity, zt_identity_kill)

static PyObject *core_read_series(PyObject *self, PyObject *arg) {
    unsigned long long n = PyLong_AsUnsignedLongLong(arg);
    struct zt_series_counters c;
    struct filler f;
    int rv;

    if (PyErr_Occurred()) return NULL;
    rv = zt_series_read(core_of(self), n, &c);
    if (rv < 0) return raise_errno(rv, "read_series");
    f = fill(state_of(self)->series);
    put(&f, number(zt_get(&c.opened)));
    put(&f, number(zt_get(&c.closed)));
    put(&f, count_tuple(c.failed, ZT_REASON_COUNT));
    put(&f, number(zt_get(&c.received)));
    put(&f, number(zt_get(&c.sent)));
    return filled(&f);
}

/* --- decisions ------------------------------------------------------------------------------------------------------- */

static void drop_template(struct zt_decision *t) {
    for (size_t i = 0; i < t->nchoices; i++) zt_decision_put(t->choices[i].decision);
    free(t->authority);
    free(t->baggage);
    free(t->host);
    free(t->choices);
}

static PyObject *decide(PyObject *self, struct zt_decision *t, unsigned long long decision,
                        unsigned long long series, unsigned long long peer) {
    int rv = zt_decision_add(core_of(self), t, decision, series, peer);

    if (rv < 0) drop_template(t);
    return done(rv, "decide");
}

static PyObject *core_decide_refuse(PyObject *self, PyObject *args) {
    unsigned long long decision, series;
    int reason;
    struct zt_decision t = {.action = ZT_REFUSE};

    if (!PyArg_ParseTuple(args, "KKi", &decision, &series, &reason) || check_reason(reason) < 0)
        return NULL;
    if (reason == ZT_R_CLOSED)
        return PyErr_Format(PyExc_ValueError, "a refusal needs a reason other than closed");
    t.reason = (enum zt_reason)reason;
    return decide(self, &t, decision, series, 0);
}

static PyObject *core_decide_forward(PyObject *self, PyObject *args) {
    unsigned long long decision, series;
    struct zt_decision t = {.action = ZT_FORWARD};
    unsigned long port;
    const char *ip;
    Py_ssize_t len;

    if (!PyArg_ParseTuple(args, "KKy#k", &decision, &series, &ip, &len, &port)) return NULL;
    if (len && to_addr(ip, len, port, &t.addr) < 0) return NULL;
    return decide(self, &t, decision, series, 0);
}

static PyObject *core_decide_deliver(PyObject *self, PyObject *args) {
    unsigned long long decision, series;
    struct zt_decision t = {.action = ZT_DELIVER};

    if (!PyArg_ParseTuple(args, "KK", &decision, &series)) return NULL;
    return decide(self, &t, decision, series, 0);
}

static PyObject *core_decide_tunnel(PyObject *self, PyObject *args) {
    unsigned long long decision, series, peer;
    const char *authority, *baggage, *host;
    struct zt_decision t = {.action = ZT_TUNNEL};

    if (!PyArg_ParseTuple(args, "KKKsss", &decision, &series, &peer, &authority, &baggage, &host))
        return NULL;
    if (strlen(authority) + strlen(baggage) + strlen(host) > ZT_MAX_HEADER_BYTES / 2)
        return PyErr_Format(PyExc_ValueError, "authority, baggage and host exceed %d bytes",
                            ZT_MAX_HEADER_BYTES / 2);
    if (!peer) return PyErr_Format(PyExc_ValueError, "a tunnel needs a peer");
    t.authority = strdup(authority);
    t.baggage = strdup(baggage);
    t.host = strdup(host);
    if (!t.authority || !t.baggage || !t.host) {
        drop_template(&t);
        return PyErr_NoMemory();
    }
    return decide(self, &t, decision, series, peer);
}

static PyObject *core_decide_balance(PyObject *self, PyObject *args) {
    unsigned long long decision;
    struct zt_decision t = {.action = ZT_BALANCE};
    PyObject *choices;
    Py_ssize_t n;

    if (!PyArg_ParseTuple(args, "KO!", &decision, &PyTuple_Type, &choices)) return NULL;
    n = PyTuple_GET_SIZE(choices);
    if (n < 1) return PyErr_Format(PyExc_ValueError, "a balance needs a choice");
    t.choices = calloc((size_t)n, sizeof(*t.choices));
    if (!t.choices) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < n; i++) {
        unsigned long long chosen;
        unsigned int weight;
        struct zt_decision *d;

        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(choices, i), "KI", &chosen, &weight)) goto fail;
        if (zt_decision_find(core_of(self), chosen, &d) < 0) {
            PyErr_Format(PyExc_KeyError, "decide_balance: unknown decision %llu", chosen);
            goto fail;
        }
        t.choices[t.nchoices++] = (struct zt_choice){d, weight};
        t.total_weight += weight;
        if (d->action == ZT_BALANCE || !weight) {
            PyErr_Format(PyExc_ValueError, "a choice has a weight and is no balance itself");
            goto fail;
        }
    }
    return decide(self, &t, decision, 0, 0);
fail:
    drop_template(&t);
    return NULL;
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
    struct filler f = fill(state->upcall);

    put(&f, number(u->node.number));
    put(&f, PyLong_FromLong(u->key.kind));
    put(&f, number(u->epoch));
    put(&f, number(u->key.pod));
    put(&f, optional_ip(&u->source));
    put(&f, PyLong_FromLong(u->source.port));
    put(&f, optional_ip(&u->destination));
    put(&f, PyLong_FromLong(u->destination.port));
    put(&f, number(u->key.identity));
    put(&f, number(u->peer));
    put(&f, chain_tuple(u));
    return filled(&f);
}

static PyObject *core_upcalls(PyObject *self, PyObject *arg) {
    long most = PyLong_AsLong(arg);
    PyObject *list;
    struct zt_upcall u;

    if (PyErr_Occurred()) return NULL;
    list = PyList_New(0);
    while (list && most-- > 0 && zt_upcall_collect(core_of(self), &u)) {
        PyObject *item = upcall_object(state_of(self), &u);

        for (int i = 0; i < u.nchain; i++) free(u.chain[i].data);
        if (append(list, item) < 0) Py_CLEAR(list);
    }
    return list;
}

static PyObject *core_answer(PyObject *self, PyObject *args) {
    unsigned long long id, epoch, decision;
    int rv;

    if (!PyArg_ParseTuple(args, "KKK", &id, &epoch, &decision)) return NULL;
    rv = zt_upcall_answer(core_of(self), id, epoch, decision);
    if (rv < 0) return raise_errno(rv, "answer");
    return PyBool_FromLong(rv);
}

static PyObject *core_answer_certificate(PyObject *self, PyObject *args) {
    unsigned long long id, identity;
    int reason;

    if (!PyArg_ParseTuple(args, "KKi", &id, &identity, &reason) || check_reason(reason) < 0)
        return NULL;
    if (!identity && reason == ZT_R_CLOSED)
        return PyErr_Format(PyExc_ValueError, "a refusal needs a reason other than closed");
    zt_upcall_answer_certificate(core_of(self), id, identity, (enum zt_reason)reason);
    Py_RETURN_NONE;
}

/* --- what happened ---------------------------------------------------------------------------------------------------- */

static PyObject *ended_object(struct module_state *state, const struct zt_ended *e) {
    struct filler f = fill(state->ended);

    put(&f, PyLong_FromLong(e->kind));
    put(&f, number(e->pod));
    put(&f, number(e->decision));
    put(&f, number(e->identity));
    put(&f, ip_bytes(&e->source));
    put(&f, PyLong_FromLong(e->source.port));
    put(&f, ip_bytes(&e->destination));
    put(&f, PyLong_FromLong(e->destination.port));
    put(&f, optional_ip(&e->upstream));
    put(&f, PyLong_FromLong(e->upstream.port));
    put(&f, number(e->started_us));
    put(&f, number(e->duration_us));
    put(&f, number(e->received));
    put(&f, number(e->sent));
    put(&f, PyLong_FromLong(e->reason));
    return filled(&f);
}

static PyObject *failed_object(struct module_state *state, const struct zt_failed *x) {
    struct filler f = fill(state->failed);

    put(&f, PyLong_FromLong(x->kind));
    put(&f, number(x->pod));
    put(&f, number(x->peer));
    put(&f, ip_bytes(&x->addr));
    put(&f, PyLong_FromLong(x->addr.port));
    put(&f, PyLong_FromLong(x->reason));
    put(&f, PyUnicode_DecodeUTF8(x->detail, (Py_ssize_t)strlen(x->detail), "replace"));
    return filled(&f);
}

/* Methods that take what waits, in batches of BATCH. */
#define TAKE(method, type, call, object)                                                \
    static PyObject *core_##method(PyObject *self, PyObject *arg) {                     \
        Py_ssize_t most = PyLong_AsSsize_t(arg);                                        \
        PyObject *list;                                                                 \
        type items[BATCH];                                                              \
                                                                                        \
        if (PyErr_Occurred()) return NULL;                                              \
        list = PyList_New(0);                                                           \
        while (list && most > 0) {                                                      \
            size_t n = call(core_of(self), items, most < BATCH ? (size_t)most : BATCH); \
                                                                                        \
            for (size_t i = 0; list && i < n; i++) {                                    \
                if (append(list, object) < 0) Py_CLEAR(list);                           \
            }                                                                           \
            if (n < BATCH) break;                                                       \
            most -= (Py_ssize_t)n;                                                      \
        }                                                                               \
        return list;                                                                    \
    }
TAKE(ended, struct zt_ended, zt_ended_take, ended_object(state_of(self), &items[i]))
TAKE(failed, struct zt_failed, zt_failed_take, failed_object(state_of(self), &items[i]))
TAKE(freed, uint64_t, zt_freed_take, number(items[i]))

static PyObject *core_stats(PyObject *self, PyObject *unused) {
    struct zt_core *core = core_of(self);
    struct zt_worker_stats s;
    PyObject *workers = PyTuple_New(core->nworkers), *loops = PyTuple_New(core->nworkers);
    struct filler f;

    zt_stats_sum(core, &s);
    for (int i = 0; i < core->nworkers; i++) {
        const struct zt_worker_stats *w = &core->workers[i]->stats;

        if (workers && loops) {
            PyTuple_SET_ITEM(workers, i,
                             Py_BuildValue("KK", (unsigned long long)zt_get(&w->connections),
                                           (unsigned long long)zt_get(&w->accepted)));
            PyTuple_SET_ITEM(loops, i, number(zt_get(&w->last_loop_us)));
        }
    }
    f = fill(state_of(self)->stats);
    put(&f, number(zt_get(&s.connections)));
    put(&f, number(zt_get(&s.tls_connections)));
    put(&f, count_tuple(s.handshakes_client.bucket, ZT_BUCKETS + 1));
    put(&f, number(zt_get(&s.handshakes_client.sum_us)));
    put(&f, count_tuple(s.handshakes_server.bucket, ZT_BUCKETS + 1));
    put(&f, number(zt_get(&s.handshakes_server.sum_us)));
    put(&f, count_tuple(s.handshake_failures, ZT_REASON_COUNT));
    put(&f, number(zt_get(&s.upcalls)));
    put(&f, count_tuple(s.upcall_latency.bucket, ZT_BUCKETS + 1));
    put(&f, number(zt_get(&s.upcall_latency.sum_us)));
    put(&f, number(zt_get(&s.table_hits)));
    pthread_mutex_lock(&core->queue_lock);
    put(&f, number(core->events_lost));
    pthread_mutex_unlock(&core->queue_lock);
    put(&f, workers);
    put(&f, loops);
    return filled(&f);
}

/* --- the type and the module --------------------------------------------------------------------------------------------- */

#define METHOD(name, flags) \
    { #name, core_##name, flags, NULL }
static PyMethodDef core_methods[] = {
    METHOD(start, METH_NOARGS),
    METHOD(stop, METH_NOARGS),
    METHOD(advance_epoch, METH_NOARGS),
    METHOD(add_pod, METH_VARARGS),
    METHOD(remove_pod, METH_O),
    METHOD(set_credential, METH_VARARGS),
    METHOD(remove_credential, METH_O),
    METHOD(add_peer, METH_VARARGS),
    METHOD(remove_peer, METH_O),
    METHOD(close_peer, METH_VARARGS),
    METHOD(add_series, METH_O),
    METHOD(read_series, METH_O),
    METHOD(remove_series, METH_O),
    METHOD(decide_refuse, METH_VARARGS),
    METHOD(decide_forward, METH_VARARGS),
    METHOD(decide_deliver, METH_VARARGS),
    METHOD(decide_tunnel, METH_VARARGS),
    METHOD(decide_balance, METH_VARARGS),
    METHOD(release_decision, METH_O),
    METHOD(kill_decision, METH_VARARGS),
    METHOD(kill_identity, METH_VARARGS),
    METHOD(upcalls, METH_O),
    METHOD(answer, METH_VARARGS),
    METHOD(answer_certificate, METH_VARARGS),
    METHOD(ended, METH_O),
    METHOD(failed, METH_O),
    METHOD(freed, METH_O),
    METHOD(stats, METH_NOARGS),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef core_getset[] = {
    {"event_fd", core_event_fd, NULL, NULL, NULL},
    {"epoch", core_epoch, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot core_slots[] = {
    {Py_tp_init, core_init},
    {Py_tp_dealloc, core_dealloc},
    {Py_tp_methods, core_methods},
    {Py_tp_getset, core_getset},
    {0, NULL},
};

static PyType_Spec core_spec = {
    .name = "ztunnel._core.Core",
    .basicsize = sizeof(struct core_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = core_slots,
};

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
    F(kind),     F(pod),           F(decision),    F(identity),
    F(source),   F(source_port),   F(destination), F(destination_port),
    F(upstream), F(upstream_port), F(started_us),  F(duration_us),
    F(received), F(sent),          F(reason),      END};
static PyStructSequence_Field failed_fields[] = {F(kind), F(pod),    F(peer),   F(address),
                                                 F(port), F(reason), F(detail), END};
static PyStructSequence_Field series_fields[] = {F(opened),   F(closed), F(failed),
                                                 F(received), F(sent),   END};
static PyStructSequence_Field stats_fields[] = {F(connections),
                                                F(tls_connections),
                                                F(handshakes_client),
                                                F(handshakes_client_sum_us),
                                                F(handshakes_server),
                                                F(handshakes_server_sum_us),
                                                F(handshake_failures),
                                                F(upcalls),
                                                F(upcall_latency),
                                                F(upcall_latency_sum_us),
                                                F(table_hits),
                                                F(events_lost),
                                                F(workers),
                                                F(last_loop_us),
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

static int add_tables(PyObject *module) {
    PyObject *reasons = PyTuple_New(ZT_REASON_COUNT), *bounds, *functions = PyDict_New();
    int i = 0;

    if (!reasons || !functions) return -1;
#define X(name, token) PyTuple_SET_ITEM(reasons, i++, PyUnicode_FromString(token));
    ZT_REASONS(X)
#undef X
#define X(us) us,
    const long all[] = {ZT_HISTOGRAM(X)};
#undef X
    bounds = PyTuple_New(ZT_BUCKETS);
    if (!bounds) return -1;
    for (i = 0; i < ZT_BUCKETS; i++) PyTuple_SET_ITEM(bounds, i, PyLong_FromLong(all[i]));
#define X(name, returns, arguments, declaration)                                  \
    {                                                                             \
        PyObject *text = PyUnicode_FromString(declaration);                       \
                                                                                  \
        if (!text || PyDict_SetItemString(functions, #name, text) < 0) return -1; \
        Py_DECREF(text);                                                          \
    }
    ZT_OSSL(X)
#undef X
    if (PyModule_AddObject(module, "REASONS", reasons) < 0) return -1;
    if (PyModule_AddObject(module, "HISTOGRAM_BOUNDS_US", bounds) < 0) return -1;
    return PyModule_AddObject(module, "FUNCTIONS", functions);
}

static const struct {
    const char *name;
    enum zt_kind kind;
} kinds[] = {{"OUTBOUND", ZT_OUTBOUND},
             {"INBOUND_PLAINTEXT", ZT_INBOUND_PLAINTEXT},
             {"INBOUND_HBONE", ZT_INBOUND_HBONE},
             {"PEER_CERTIFICATE", ZT_PEER_CERTIFICATE},
             {"SERVER_CERTIFICATE", ZT_SERVER_CERTIFICATE}};

static int module_exec(PyObject *module) {
    struct module_state *state = PyModule_GetState(module);
    PyObject *type = PyType_FromModuleAndSpec(module, &core_spec, NULL);

    if (!type || PyModule_AddObject(module, "Core", type) < 0) return -1;
    if (RECORD(upcall, "Upcall", upcall_fields) < 0 || RECORD(ended, "Ended", ended_fields) < 0 ||
        RECORD(failed, "Failed", failed_fields) < 0 ||
        RECORD(series, "SeriesCounters", series_fields) < 0 ||
        RECORD(stats, "Stats", stats_fields) < 0)
        return -1;
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        if (PyModule_AddIntConstant(module, kinds[i].name, kinds[i].kind) < 0) return -1;
    }
    return add_tables(module);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    struct module_state *s = PyModule_GetState(module);

#define X(record) Py_VISIT(s->record);
    RECORDS(X)
#undef X
    return 0;
}

static int module_clear(PyObject *module) {
    struct module_state *s = PyModule_GetState(module);

#define X(record) Py_CLEAR(s->record);
    RECORDS(X)
#undef X
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,   .m_name = "ztunnel._core",     .m_size = sizeof(struct module_state),
    .m_slots = module_slots, .m_traverse = module_traverse, .m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__core(void) {
    return PyModuleDef_Init(&module_def);
}
