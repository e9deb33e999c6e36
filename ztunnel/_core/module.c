/*
 * The core as a Python type: its life, how values cross, and the module with its tables.
 */
#include "module.h"
#include "conn.h"

#include <stddef.h>

struct zt_core *zt_py_core(PyObject *self) {
    return ((struct core_object *)(void *)self)->core;
}

struct module_state *zt_py_state(PyObject *self) {
    return ((struct core_object *)(void *)self)->state;
}

/* --- conversions ------------------------------------------------------------------------------------------ */

PyObject *zt_py_errno(int rv, const char *what) {
    if (rv == -ENOMEM) return PyErr_NoMemory();
    if (rv == -ENOENT) return PyErr_Format(PyExc_KeyError, "%s: unknown number", what);
    if (rv == -EEXIST) return PyErr_Format(PyExc_ValueError, "%s: number already in use", what);
    errno = -rv;
    return PyErr_SetFromErrno(PyExc_OSError);
}

PyObject *zt_py_done(int rv, const char *what) {
    if (rv < 0) return zt_py_errno(rv, what);
    Py_RETURN_NONE;
}

int zt_py_addr(const char *ip, Py_ssize_t len, unsigned long port, struct zt_addr *out) {
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

int zt_py_check_reason(int reason) {
    if (reason >= 0 && reason < ZT_REASON_COUNT) return 0;
    PyErr_Format(PyExc_ValueError, "reason %d is not an index of REASONS", reason);
    return -1;
}

PyObject *zt_py_number(uint64_t n) {
    return PyLong_FromUnsignedLongLong(n);
}

struct zt_py_filler zt_py_fill(PyTypeObject *type) {
    struct zt_py_filler f = {.seq = PyStructSequence_New(type)};

    f.failed = !f.seq;
    return f;
}

void zt_py_put(struct zt_py_filler *f, PyObject *value) {
    if (!value) f->failed = true;
    if (f->failed) {
        Py_XDECREF(value);
        return;
    }
    PyStructSequence_SET_ITEM(f->seq, f->at++, value);
}

PyObject *zt_py_filled(struct zt_py_filler *f) {
    if (!f->failed) return f->seq;
    Py_XDECREF(f->seq);
    return NULL;
}

PyObject *zt_py_counts(const zt_count *counts, Py_ssize_t n) {
    PyObject *t = PyTuple_New(n);

    for (Py_ssize_t i = 0; t && i < n; i++) {
        PyObject *v = zt_py_number(zt_get(&counts[i]));

        if (!v) {
            Py_CLEAR(t);
            break;
        }
        PyTuple_SET_ITEM(t, i, v);
    }
    return t;
}

/* --- life ----------------------------------------------------------------------------------------------------- */

/* All cores of a process share one OpenSSL; workers of one may run while the next is made. */
static int read_functions(PyObject *functions) {
    static bool filled; /* guarded by the interpreter's lock */
    static const struct {
        const char *name;
        size_t offset;
    } rows[] = {
#define X(name, returns, arguments, declaration) {#name, offsetof(struct zt_ossl, name)},
        ZT_OSSL(X)
#undef X
    };
    struct zt_ossl table = {0};

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
    if (filled && memcmp(&table, &ossl, sizeof(table)) != 0) {
        PyErr_SetString(PyExc_ValueError, "functions: not those of the process' first core");
        return -1;
    }
    if (!filled) ossl = table;
    filled = true;
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
        zt_py_errno(rv, "core");
        return -1;
    }
    return 0;
}

static void core_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    struct zt_core *core = zt_py_core(self);

    if (core) {
        Py_BEGIN_ALLOW_THREADS;
        zt_core_free(core);
        Py_END_ALLOW_THREADS;
    }
    type->tp_free(self);
    Py_DECREF(type);
}

PyObject *zt_py_start(PyObject *self, PyObject *unused) {
    return zt_py_done(zt_core_start(zt_py_core(self)), "start");
}

PyObject *zt_py_stop(PyObject *self, PyObject *unused) {
    Py_BEGIN_ALLOW_THREADS;
    zt_core_stop(zt_py_core(self));
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject *zt_py_drain(PyObject *self, PyObject *unused) {
    return zt_py_done(zt_core_drain(zt_py_core(self)), "drain");
}

PyObject *zt_py_drained(PyObject *self, PyObject *unused) {
    return PyBool_FromLong(zt_core_drained(zt_py_core(self)));
}

static PyObject *core_event_fd(PyObject *self, void *closure) {
    return PyLong_FromLong(zt_py_core(self)->event_fd);
}

static PyObject *core_epoch(PyObject *self, void *closure) {
    return zt_py_number(atomic_load(&zt_py_core(self)->epoch));
}

PyObject *zt_py_advance_epoch(PyObject *self, PyObject *unused) {
    return zt_py_number(atomic_fetch_add(&zt_py_core(self)->epoch, 1) + 1);
}

/* --- the type and the module --------------------------------------------------------------------------------------------- */

static PyMethodDef core_methods[] = {
#define X(name, flags) {#name, zt_py_##name, flags, NULL},
    ZT_PY_METHODS(X)
#undef X
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

static int add_tables(PyObject *module) {
    PyObject *reasons = PyTuple_New(ZT_REASON_COUNT), *bounds, *functions = PyDict_New(),
             *deadlines = PyDict_New(), *limits = PyDict_New(),
             *fields = PyTuple_New(ZT_LINE_FIELD_COUNT), *states = PyTuple_New(ZT_C_ENDED);
    int i = 0;

    if (!reasons || !functions || !deadlines || !limits || !fields || !states) return -1;
#define X(name, token) PyTuple_SET_ITEM(reasons, i++, PyUnicode_FromString(token));
    ZT_REASONS(X)
#undef X
#define X(name, text) PyTuple_SET_ITEM(fields, ZT_F_##name, PyUnicode_FromString(text));
    ZT_LINE_FIELDS(X)
#undef X
#define X(name, text) PyTuple_SET_ITEM(states, ZT_C_##name, PyUnicode_FromString(text));
    ZT_CONN_STATES(X)
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
#define X(name, setting, seconds)                                               \
    {                                                                           \
        PyObject *us = zt_py_number(ZT_SECONDS(seconds));                       \
                                                                                \
        if (!us || PyDict_SetItemString(deadlines, setting, us) < 0) return -1; \
        Py_DECREF(us);                                                          \
    }
    ZT_DEADLINE_TABLE(X)
#undef X
#define X(name, setting, number)                                                 \
    {                                                                            \
        PyObject *most = zt_py_number(number);                                   \
                                                                                 \
        if (!most || PyDict_SetItemString(limits, setting, most) < 0) return -1; \
        Py_DECREF(most);                                                         \
    }
    ZT_LIMIT_TABLE(X)
#undef X
    if (PyModule_AddObject(module, "LIMITS", limits) < 0) return -1;
    if (PyModule_AddObject(module, "CONNECTION_STATES", states) < 0) return -1;
    if (PyModule_AddObject(module, "LINE_FIELDS", fields) < 0) return -1;
    if (PyModule_AddObject(module, "DEADLINES", deadlines) < 0) return -1;
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
    if (zt_py_add_records(module, state) < 0) return -1;
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        if (PyModule_AddIntConstant(module, kinds[i].name, kinds[i].kind) < 0) return -1;
    }
    return add_tables(module);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    struct module_state *s = PyModule_GetState(module);

#define X(record) Py_VISIT(s->record);
    ZT_PY_RECORDS(X)
#undef X
    return 0;
}

static int module_clear(PyObject *module) {
    struct module_state *s = PyModule_GetState(module);

#define X(record) Py_CLEAR(s->record);
    ZT_PY_RECORDS(X)
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
