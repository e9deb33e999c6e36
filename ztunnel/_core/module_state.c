/*
 * What Python tells the core: pods, credentials, peers, series and decisions, by number.
 */
#include "module.h"

PyObject *zt_py_set_deadline(PyObject *self, PyObject *args) {
    static const char *const names[ZT_DEADLINES] = {
#define X(name, setting, seconds) setting,
        ZT_DEADLINE_TABLE(X)
#undef X
    };
    unsigned long long us;
    const char *name;

    if (!PyArg_ParseTuple(args, "sK", &name, &us)) return NULL;
    if (us < 1 || us > ZT_DEADLINE_MAX_US)
        return PyErr_Format(PyExc_ValueError, "deadline %s: %llu is not 1 to %llu microseconds",
                            name, us, (unsigned long long)ZT_DEADLINE_MAX_US);
    for (int d = 0; d < ZT_DEADLINES; d++) {
        if (strcmp(name, names[d]) == 0) {
            atomic_store(&zt_py_core(self)->deadline_us[d], us);
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_KeyError, "no deadline is called %s", name);
}

PyObject *zt_py_set_tracing(PyObject *self, PyObject *args) {
    unsigned long long parts;
    int on;

    if (!PyArg_ParseTuple(args, "pK", &on, &parts)) return NULL;
    if (parts > (1ull << 32))
        return PyErr_Format(PyExc_ValueError, "%llu is more than 2^32 of 2^32 parts", parts);
    zt_trace_set(zt_py_core(self), on, parts);
    Py_RETURN_NONE;
}

PyObject *zt_py_set_limit(PyObject *self, PyObject *args) {
    static const char *const names[ZT_LIMITS] = {
#define X(name, setting, most) setting,
        ZT_LIMIT_TABLE(X)
#undef X
    };
    unsigned long long most;
    const char *name;

    if (!PyArg_ParseTuple(args, "sK", &name, &most)) return NULL;
    for (int i = 0; i < ZT_LIMITS; i++) {
        if (strcmp(name, names[i]) == 0) {
            atomic_store(&zt_py_core(self)->limit[i], most);
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_KeyError, "no limit is called %s", name);
}

/* --- pods, credentials, peers, series ------------------------------------------------------------------------------ */

PyObject *zt_py_add_pod(PyObject *self, PyObject *args) {
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
            zt_py_addr(ip, len, 0, &addrs[i]) < 0)
            return NULL;
    }
    return zt_py_done(
        zt_pod_add(zt_py_core(self), pod, netns, listeners, addrs, (int)n, credential), "add_pod");
}

PyObject *zt_py_add_peer(PyObject *self, PyObject *args) {
    unsigned long long peer, pod, credential;
    unsigned long port;
    const char *ip;
    Py_ssize_t len;
    struct zt_addr addr;

    if (!PyArg_ParseTuple(args, "KKy#kK", &peer, &pod, &ip, &len, &port, &credential) ||
        zt_py_addr(ip, len, port, &addr) < 0)
        return NULL;
    return zt_py_done(zt_peer_add(zt_py_core(self), peer, pod, &addr, credential), "add_peer");
}

PyObject *zt_py_set_credential(PyObject *self, PyObject *args) {
    unsigned long long credential, client, server;

    if (!PyArg_ParseTuple(args, "KKK", &credential, &client, &server)) return NULL;
    if (!client || !server) return PyErr_Format(PyExc_ValueError, "a context must not be null");
    return zt_py_done(zt_credential_set(zt_py_core(self), credential, (SSL_CTX *)(uintptr_t)client,
                                        (SSL_CTX *)(uintptr_t)server),
                      "set_credential");
}

/* Methods of one number. */
#define BY_NUMBER(method, call)                                \
    PyObject *zt_py_##method(PyObject *self, PyObject *arg) {  \
        unsigned long long n = PyLong_AsUnsignedLongLong(arg); \
                                                               \
        if (PyErr_Occurred()) return NULL;                     \
        return zt_py_done(call(zt_py_core(self), n), #method); \
    }
BY_NUMBER(remove_pod, zt_pod_remove)
BY_NUMBER(remove_credential, zt_credential_remove)
BY_NUMBER(remove_peer, zt_peer_remove)
BY_NUMBER(suspect_peer, zt_peer_suspect)
BY_NUMBER(add_series, zt_series_add)
BY_NUMBER(remove_series, zt_series_remove)
BY_NUMBER(release_decision, zt_decision_release)

/* Methods of a number and a reason. */
#define BY_REASON(method, call)                                                           \
    PyObject *zt_py_##method(PyObject *self, PyObject *args) {                            \
        unsigned long long n;                                                             \
        int reason;                                                                       \
                                                                                          \
        if (!PyArg_ParseTuple(args, "Ki", &n, &reason) || zt_py_check_reason(reason) < 0) \
            return NULL;                                                                  \
        return zt_py_done(call(zt_py_core(self), n, (enum zt_reason)reason), #method);    \
    }
BY_REASON(close_peer, zt_peer_close)
BY_REASON(kill_decision, zt_decision_kill)
BY_REASON(kill_identity, zt_identity_kill)

PyObject *zt_py_read_series(PyObject *self, PyObject *arg) {
    unsigned long long n = PyLong_AsUnsignedLongLong(arg);
    struct zt_series_counters c;
    struct zt_py_filler f;
    int rv;

    if (PyErr_Occurred()) return NULL;
    rv = zt_series_read(zt_py_core(self), n, &c);
    if (rv < 0) return zt_py_errno(rv, "read_series");
    f = zt_py_fill(zt_py_state(self)->series);
    zt_py_put(&f, zt_py_number(zt_get(&c.opened)));
    zt_py_put(&f, zt_py_number(zt_get(&c.closed)));
    zt_py_put(&f, zt_py_counts(c.failed, ZT_REASON_COUNT));
    zt_py_put(&f, zt_py_number(zt_get(&c.received)));
    zt_py_put(&f, zt_py_number(zt_get(&c.sent)));
    return zt_py_filled(&f);
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
                        struct zt_referred refers) {
    int rv = zt_decision_add(zt_py_core(self), t, decision, refers);

    if (rv < 0) drop_template(t);
    return zt_py_done(rv, "decide");
}

PyObject *zt_py_decide_refuse(PyObject *self, PyObject *args) {
    unsigned long long decision, series;
    int reason;
    struct zt_decision t = {.action = ZT_REFUSE};

    if (!PyArg_ParseTuple(args, "KKi", &decision, &series, &reason) ||
        zt_py_check_reason(reason) < 0)
        return NULL;
    if (reason == ZT_R_CLOSED)
        return PyErr_Format(PyExc_ValueError, "a refusal needs a reason other than closed");
    t.reason = (enum zt_reason)reason;
    return decide(self, &t, decision, (struct zt_referred){.series = series});
}

PyObject *zt_py_decide_forward(PyObject *self, PyObject *args) {
    unsigned long long decision, series;
    struct zt_decision t = {.action = ZT_FORWARD};
    unsigned long port;
    const char *ip;
    Py_ssize_t len;

    if (!PyArg_ParseTuple(args, "KKy#k", &decision, &series, &ip, &len, &port)) return NULL;
    if (len && zt_py_addr(ip, len, port, &t.addr) < 0) return NULL;
    return decide(self, &t, decision, (struct zt_referred){.series = series});
}

PyObject *zt_py_decide_deliver(PyObject *self, PyObject *args) {
    unsigned long long decision, series;
    struct zt_decision t = {.action = ZT_DELIVER};

    if (!PyArg_ParseTuple(args, "KK", &decision, &series)) return NULL;
    return decide(self, &t, decision, (struct zt_referred){.series = series});
}

PyObject *zt_py_decide_hand_over(PyObject *self, PyObject *args) {
    unsigned long long decision, series, mirror, pod;
    struct zt_decision t = {.action = ZT_HAND_OVER};
    unsigned long port;
    const char *ip;
    Py_ssize_t len;

    if (!PyArg_ParseTuple(args, "KKKKy#k", &decision, &series, &mirror, &pod, &ip, &len, &port) ||
        zt_py_addr(ip, len, port, &t.addr) < 0)
        return NULL;
    if (!mirror || !pod || !port)
        return PyErr_Format(PyExc_ValueError, "a hand-over needs two series, a pod and a port");
    return decide(self, &t, decision,
                  (struct zt_referred){.series = series, .mirror = mirror, .pod = pod});
}

PyObject *zt_py_decide_tunnel(PyObject *self, PyObject *args) {
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
    return decide(self, &t, decision, (struct zt_referred){.series = series, .peer = peer});
}

PyObject *zt_py_describe(PyObject *self, PyObject *args) {
    unsigned long long decision;
    const char *form;
    Py_ssize_t len;
    int rv;

    if (!PyArg_ParseTuple(args, "Ky#", &decision, &form, &len)) return NULL;
    rv = zt_decision_describe(zt_py_core(self), decision, form, (size_t)len);
    if (rv == -EINVAL)
        return PyErr_Format(PyExc_ValueError,
                            "a form is whole lines of at most %d bytes, with at most %d places",
                            ZT_LINE_MAX, ZT_LINE_PLACES);
    return zt_py_done(rv, "describe");
}

PyObject *zt_py_decide_balance(PyObject *self, PyObject *args) {
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
        if (zt_decision_find(zt_py_core(self), chosen, &d) < 0) {
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
    return decide(self, &t, decision, (struct zt_referred){0});
fail:
    drop_template(&t);
    return NULL;
}
