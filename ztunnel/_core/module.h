/*
 * What the files of the Python type share: how values cross, and the list of its methods. module.c
 * is the type and its life, module_state.c what Python tells the core, module_events.c what it
 * hears. No other file of the core knows of Python, nothing here runs on a worker's thread, and no
 * worker ever takes the interpreter's lock.
 */
#ifndef ZT_MODULE_H
#define ZT_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structseq.h>

#include <errno.h>

#include "worker.h"

/* Names of the records that Python receives. */
#define ZT_PY_RECORDS(X) X(upcall) X(ended) X(failed) X(listed) X(series) X(pod) X(stats)

struct module_state {
#define X(record) PyTypeObject *record;
    ZT_PY_RECORDS(X)
#undef X
};

struct core_object {
    PyObject_HEAD
    struct zt_core *core;
    struct module_state *state;
};

/* clang-format off: a table by hand */
#define ZT_PY_METHODS(X)                \
    X(start, METH_NOARGS)               \
    X(stop, METH_NOARGS)                \
    X(drain, METH_NOARGS)               \
    X(drained, METH_NOARGS)             \
    X(advance_epoch, METH_NOARGS)       \
    X(set_deadline, METH_VARARGS)       \
    X(set_limit, METH_VARARGS)          \
    X(set_tracing, METH_VARARGS)        \
    X(add_pod, METH_VARARGS)            \
    X(remove_pod, METH_O)               \
    X(read_pod, METH_O)                 \
    X(set_credential, METH_VARARGS)     \
    X(remove_credential, METH_O)        \
    X(add_peer, METH_VARARGS)           \
    X(remove_peer, METH_O)              \
    X(close_peer, METH_VARARGS)         \
    X(suspect_peer, METH_O)             \
    X(add_series, METH_O)               \
    X(read_series, METH_O)              \
    X(remove_series, METH_O)            \
    X(decide_refuse, METH_VARARGS)      \
    X(decide_forward, METH_VARARGS)     \
    X(decide_deliver, METH_VARARGS)     \
    X(decide_hand_over, METH_VARARGS)   \
    X(decide_tunnel, METH_VARARGS)      \
    X(decide_balance, METH_VARARGS)     \
    X(describe, METH_VARARGS)           \
    X(release_decision, METH_O)         \
    X(kill_decision, METH_VARARGS)      \
    X(kill_identity, METH_VARARGS)      \
    X(upcalls, METH_O)                  \
    X(answer, METH_VARARGS)             \
    X(answer_certificate, METH_VARARGS) \
    X(ended, METH_O)                    \
    X(lines, METH_NOARGS)               \
    X(failed, METH_O)                   \
    X(freed, METH_O)                    \
    X(stats, METH_NOARGS)               \
    X(list_connections, METH_NOARGS)    \
    X(listed, METH_O)
/* clang-format on */

#define X(name, flags) PyObject *zt_py_##name(PyObject *self, PyObject *args);
ZT_PY_METHODS(X)
#undef X

struct zt_core *zt_py_core(PyObject *self);
struct module_state *zt_py_state(PyObject *self);
/* Adds the types of the records to the module; 0 or -1 with an exception set. */
int zt_py_add_records(PyObject *module, struct module_state *state);

/* --- conversions: each sets an exception when it fails ---------------------------------------- */

PyObject *zt_py_errno(int rv, const char *what);
/* None, or the exception of a negative errno. */
PyObject *zt_py_done(int rv, const char *what);
PyObject *zt_py_number(uint64_t n);
int zt_py_addr(const char *ip, Py_ssize_t len, unsigned long port, struct zt_addr *out);
int zt_py_check_reason(int reason);
PyObject *zt_py_counts(const zt_count *counts, Py_ssize_t n);

/* Fills a struct sequence field by field; a NULL among the values means that memory ran out. */
struct zt_py_filler {
    PyObject *seq;
    Py_ssize_t at;
    bool failed;
};

struct zt_py_filler zt_py_fill(PyTypeObject *type);
void zt_py_put(struct zt_py_filler *f, PyObject *value);
PyObject *zt_py_filled(struct zt_py_filler *f);

#endif
