/*
 * nodeagent.capture._libbpf: the part of libbpf that the capture needs, and nothing above it.
 *
 * Owns the translation between Python objects and libbpf: it opens an object from memory,
 * loads it, and hands out file descriptors; the rest are single calls on descriptors. Promises that every failure is an OSError with errno and libbpf's own words, and
 * that every descriptor it returns is close-on-exec and the caller's to close. It decides nothing,
 * keeps no state between calls, and touches no path that it was not given.
 *
 * libbpf prints through one callback for the whole process; what it prints is kept for each thread
 * until the call on that thread ends. The GIL is released around what enters the kernel for long.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

/* What is kept of libbpf's words: the tail, where the reason stands, verifier logs included. */
#define WORDS_SIZE 2048

/* Reading an iterator ends by itself; this only bounds a kernel that never ends it. */
#define ITERATOR_READS 100000

static _Thread_local char words[WORDS_SIZE];
static _Thread_local size_t words_used;

static int keep_words(enum libbpf_print_level level, const char *format, va_list arguments) {
    char line[WORDS_SIZE];
    size_t skip, size, excess;
    va_list again;
    char *whole;
    int length;

    if (level != LIBBPF_WARN) return 0;
    va_copy(again, arguments);
    length = vsnprintf(line, sizeof(line), format, arguments);
    whole = NULL;
    if (length >= (int)sizeof(line) && vasprintf(&whole, format, again) < 0) whole = NULL;
    va_end(again);
    if (length <= 0) return 0;
    size = whole ? (size_t)length : strlen(line);
    skip = size >= WORDS_SIZE ? size - (WORDS_SIZE - 1) : 0;
    size -= skip;
    excess = words_used + size >= WORDS_SIZE ? words_used + size - (WORDS_SIZE - 1) : 0;
    memmove(words, words + excess, words_used - excess);
    words_used -= excess;
    memcpy(words + words_used, (whole ? whole : line) + skip, size);
    words_used += size;
    free(whole);
    return length;
}

/* Raise OSError for `error` (positive errno): "what: strerror: libbpf's words". Returns NULL. */
static PyObject *fail(int error, const char *what) {
    PyObject *text, *said, *arguments;

    while (words_used && (words[words_used - 1] == '\n' || words[words_used - 1] == ' '))
        words_used--;
    said = PyUnicode_DecodeUTF8(words, (Py_ssize_t)words_used, "replace");
    words_used = 0;
    if (!said) return NULL;
    text = PyUnicode_GetLength(said)
               ? PyUnicode_FromFormat("%s: %s: %U", what, strerror(error), said)
               : PyUnicode_FromFormat("%s: %s", what, strerror(error));
    Py_DECREF(said);
    if (!text) return NULL;
    arguments = Py_BuildValue("(iN)", error, text);
    if (!arguments) return NULL;
    PyErr_SetObject(PyExc_OSError, arguments);
    Py_DECREF(arguments);
    return NULL;
}

static PyObject *own_copy(int fd, const char *what) {
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);

    return copy < 0 ? fail(errno, what) : PyLong_FromLong(copy);
}

/* --- Object ----------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    struct bpf_object *object; /* NULL once closed */
    bool loaded;
} Object;

static int object_open(Object *self) {
    if (self->object) return 0;
    PyErr_SetString(PyExc_ValueError, "the BPF object is closed");
    return -1;
}

static PyObject *object_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    static char *names[] = {"data", "name", NULL};
    LIBBPF_OPTS(bpf_object_open_opts, options);
    struct bpf_object *object;
    Py_buffer data;
    Object *self;
    char *name;
    int error;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "y*s", names, &data, &name)) return NULL;
    words_used = 0;
    options.object_name = name;
    object = bpf_object__open_mem(data.buf, (size_t)data.len, &options);
    error = errno;
    PyBuffer_Release(&data);
    if (!object) return fail(error, name);
    self = (Object *)type->tp_alloc(type, 0);
    if (!self) {
        bpf_object__close(object);
        return NULL;
    }
    self->object = object;
    self->loaded = false;
    return (PyObject *)self;
}

static PyObject *object_close(Object *self, PyObject *unused) {
    struct bpf_object *object = self->object;

    self->object = NULL;
    if (object) {
        Py_BEGIN_ALLOW_THREADS;
        bpf_object__close(object);
        Py_END_ALLOW_THREADS;
    }
    Py_RETURN_NONE;
}

static void object_dealloc(Object *self) {
    PyTypeObject *type = Py_TYPE(self);

    bpf_object__close(self->object);
    type->tp_free(self);
    Py_DECREF(type);
}

static struct bpf_map *find_map(Object *self, const char *name) {
    struct bpf_map *map = bpf_object__find_map_by_name(self->object, name);

    if (!map) PyErr_Format(PyExc_KeyError, "the BPF object has no map %s", name);
    return map;
}

static PyObject *object_reuse_map(Object *self, PyObject *arguments) {
    struct bpf_map *map;
    const char *name;
    int fd, error;

    if (object_open(self) || !PyArg_ParseTuple(arguments, "si", &name, &fd)) return NULL;
    map = find_map(self, name);
    if (!map) return NULL;
    words_used = 0;
    error = bpf_map__reuse_fd(map, fd);
    if (error) return fail(-error, name);
    Py_RETURN_NONE;
}

static PyObject *object_load(Object *self, PyObject *unused) {
    int error;

    if (object_open(self)) return NULL;
    words_used = 0;
    Py_BEGIN_ALLOW_THREADS;
    error = bpf_object__load(self->object);
    Py_END_ALLOW_THREADS;
    if (error) return fail(-error, bpf_object__name(self->object));
    self->loaded = true;
    Py_RETURN_NONE;
}

static PyObject *object_program(Object *self, PyObject *arguments) {
    struct bpf_program *program;
    const char *name;

    if (object_open(self) || !PyArg_ParseTuple(arguments, "s", &name)) return NULL;
    program = bpf_object__find_program_by_name(self->object, name);
    if (!program) return PyErr_Format(PyExc_KeyError, "the BPF object has no program %s", name);
    words_used = 0;
    return own_copy(bpf_program__fd(program), name);
}

/* The program as the kernel got it: maps stand in it by descriptors of this object. */
static PyObject *object_instructions(Object *self, PyObject *arguments) {
    struct bpf_program *program;
    const char *name;

    if (object_open(self) || !PyArg_ParseTuple(arguments, "s", &name)) return NULL;
    program = bpf_object__find_program_by_name(self->object, name);
    if (!program) return PyErr_Format(PyExc_KeyError, "the BPF object has no program %s", name);
    return PyBytes_FromStringAndSize(
        (const char *)bpf_program__insns(program),
        (Py_ssize_t)(bpf_program__insn_cnt(program) * sizeof(struct bpf_insn)));
}

static PyObject *object_map(Object *self, PyObject *arguments) {
    struct bpf_map *map;
    const char *name;

    if (object_open(self) || !PyArg_ParseTuple(arguments, "s", &name)) return NULL;
    map = find_map(self, name);
    if (!map) return NULL;
    words_used = 0;
    return own_copy(bpf_map__fd(map), name);
}

static PyMethodDef object_methods[] = {
    {"close", (PyCFunction)object_close, METH_NOARGS, NULL},
    {"reuse_map", (PyCFunction)object_reuse_map, METH_VARARGS, NULL},
    {"load", (PyCFunction)object_load, METH_NOARGS, NULL},
    {"program", (PyCFunction)object_program, METH_VARARGS, NULL},
    {"instructions", (PyCFunction)object_instructions, METH_VARARGS, NULL},
    {"map", (PyCFunction)object_map, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot object_slots[] = {
    {Py_tp_new, object_new},
    {Py_tp_dealloc, object_dealloc},
    {Py_tp_methods, object_methods},
    {0, NULL},
};

static PyType_Spec object_spec = {
    .name = "nodeagent.capture._libbpf.Object",
    .basicsize = sizeof(Object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = object_slots,
};

/* --- single calls ----------------------------------------------------------------------------- */

static PyObject *create_map(PyObject *module, PyObject *arguments) {
    LIBBPF_OPTS(bpf_map_create_opts, options);
    unsigned type, key_size, value_size, entries;
    const char *name;
    int fd;

    if (!PyArg_ParseTuple(arguments, "IsIII", &type, &name, &key_size, &value_size, &entries))
        return NULL;
    words_used = 0;
    /* Hashes of ours are mostly empty. */
    if (type == BPF_MAP_TYPE_HASH) options.map_flags = BPF_F_NO_PREALLOC;
    fd = bpf_map_create((enum bpf_map_type)type, name, key_size, value_size, entries, &options);
    return fd < 0 ? fail(-fd, name) : PyLong_FromLong(fd);
}

/*
 * Raise OSError unless the map's key and value have these sizes: the kernel reads and writes by the
 * map's own, and a pinned map may be another version's.
 */
static int check_sizes(int fd, Py_ssize_t key, Py_ssize_t value) {
    struct bpf_map_info info = {0};
    __u32 size = sizeof(info);
    Py_ssize_t needed;
    int error;

    error = bpf_obj_get_info_by_fd(fd, &info, &size);
    if (error) {
        fail(-error, "map info");
        return -1;
    }
    /* None of ours is per CPU; one of another shape is refused as a whole. */
    needed = info.type == BPF_MAP_TYPE_PERCPU_ARRAY ? PY_SSIZE_T_MAX : info.value_size;
    if (key != info.key_size || value < needed) {
        fail(EINVAL, "the map has another shape");
        return -1;
    }
    return 0;
}

static PyObject *update_map(PyObject *module, PyObject *arguments) {
    Py_buffer key, value;
    int fd, error, fresh;

    fresh = 0;
    if (!PyArg_ParseTuple(arguments, "iy*y*|p", &fd, &key, &value, &fresh)) return NULL;
    words_used = 0;
    if (check_sizes(fd, key.len, value.len)) {
        PyBuffer_Release(&key);
        PyBuffer_Release(&value);
        return NULL;
    }
    error = bpf_map_update_elem(fd, key.buf, value.buf, fresh ? BPF_NOEXIST : BPF_ANY);
    PyBuffer_Release(&key);
    PyBuffer_Release(&value);
    if (error) return fail(-error, "map update");
    Py_RETURN_NONE;
}

static PyObject *delete_map(PyObject *module, PyObject *arguments) {
    Py_buffer key;
    int fd, error;

    if (!PyArg_ParseTuple(arguments, "iy*", &fd, &key)) return NULL;
    words_used = 0;
    error = bpf_map_delete_elem(fd, key.buf);
    PyBuffer_Release(&key);
    if (error) return fail(-error, "map delete");
    Py_RETURN_NONE;
}

static PyObject *read_map(PyObject *module, PyObject *arguments) {
    unsigned size;
    PyObject *value;
    Py_buffer key;
    int fd, error;

    if (!PyArg_ParseTuple(arguments, "iy*I", &fd, &key, &size)) return NULL;
    words_used = 0;
    if (check_sizes(fd, key.len, size)) {
        PyBuffer_Release(&key);
        return NULL;
    }
    value = PyBytes_FromStringAndSize(NULL, size);
    error = value ? bpf_map_lookup_elem(fd, key.buf, PyBytes_AS_STRING(value)) : 0;
    PyBuffer_Release(&key);
    if (error) {
        Py_DECREF(value);
        return fail(-error, "map lookup");
    }
    return value;
}

static PyObject *next_key(PyObject *module, PyObject *arguments) {
    unsigned size;
    PyObject *key;
    Py_buffer after;
    int fd, error;

    if (!PyArg_ParseTuple(arguments, "iz*I", &fd, &after, &size)) return NULL;
    words_used = 0;
    key = NULL;
    if (check_sizes(fd, after.buf ? after.len : (Py_ssize_t)size, PY_SSIZE_T_MAX)) goto cleanup;
    if (after.buf && after.len != (Py_ssize_t)size) {
        PyErr_SetString(PyExc_ValueError, "keys of two sizes");
        goto cleanup;
    }
    key = PyBytes_FromStringAndSize(NULL, size);
    if (!key) goto cleanup;
    error = bpf_map_get_next_key(fd, after.buf, PyBytes_AS_STRING(key));
    if (error) {
        Py_CLEAR(key);
        key = error == -ENOENT ? Py_NewRef(Py_None) : fail(-error, "map next key");
    }
cleanup:
    if (after.buf) PyBuffer_Release(&after);
    return key;
}

/* What the kernel says of the object whose descriptor is the only argument. False: an exception. */
static bool read_info(PyObject *arguments, void *info, __u32 size, const char *what) {
    int fd, error;

    if (!PyArg_ParseTuple(arguments, "i", &fd)) return false;
    words_used = 0;
    error = bpf_obj_get_info_by_fd(fd, info, &size);
    if (error) fail(-error, what);
    return !error;
}

static PyObject *map_id(PyObject *module, PyObject *arguments) {
    struct bpf_map_info info = {0};

    if (!read_info(arguments, &info, sizeof(info), "map info")) return NULL;
    return PyLong_FromUnsignedLong(info.id);
}

static PyObject *map_info(PyObject *module, PyObject *arguments) {
    struct bpf_map_info info = {0};

    if (!read_info(arguments, &info, sizeof(info), "map info")) return NULL;
    return Py_BuildValue("(IIII)", info.type, info.key_size, info.value_size, info.max_entries);
}

/*
 * Load an sk_lookup program from bare instructions: no object file, no BTF. The kernel's log is
 * only asked for when it refuses; asked for at once, it would cost more than the verification.
 */
static PyObject *load_sk_lookup(PyObject *module, PyObject *arguments) {
    LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = BPF_SK_LOOKUP);
    char log[WORDS_SIZE];
    Py_buffer code;
    const char *name;
    size_t count;
    int fd;

    if (!PyArg_ParseTuple(arguments, "sy*", &name, &code)) return NULL;
    words_used = 0;
    count = (size_t)code.len / sizeof(struct bpf_insn);
    Py_BEGIN_ALLOW_THREADS;
    fd = bpf_prog_load(BPF_PROG_TYPE_SK_LOOKUP, name, "GPL", code.buf, count, &options);
    if (fd < 0) {
        options.log_buf = log;
        options.log_size = sizeof(log);
        options.log_level = 1;
        log[0] = 0;
        fd = bpf_prog_load(BPF_PROG_TYPE_SK_LOOKUP, name, "GPL", code.buf, count, &options);
        if (fd < 0) {
            words_used = strnlen(log, sizeof(log) - 1);
            memcpy(words, log, words_used);
        }
    }
    Py_END_ALLOW_THREADS;
    PyBuffer_Release(&code);
    return fd < 0 ? fail(-fd, name) : PyLong_FromLong(fd);
}

static PyObject *program_id(PyObject *module, PyObject *arguments) {
    struct bpf_prog_info info = {0};

    if (!read_info(arguments, &info, sizeof(info), "program info")) return NULL;
    return PyLong_FromUnsignedLong(info.id);
}

static PyObject *link_info(PyObject *module, PyObject *arguments) {
    struct bpf_link_info info = {0};

    if (!read_info(arguments, &info, sizeof(info), "link info")) return NULL;
    if (info.type != BPF_LINK_TYPE_NETNS)
        return PyErr_Format(PyExc_ValueError, "link of type %u belongs to no network namespace",
                            info.type);
    return Py_BuildValue("(II)", info.prog_id, info.netns.netns_ino);
}

static PyObject *next_link(PyObject *module, PyObject *arguments) {
    unsigned after, found;

    if (!PyArg_ParseTuple(arguments, "I", &after)) return NULL;
    if (!bpf_link_get_next_id(after, &found)) return PyLong_FromUnsignedLong(found);
    if (errno != ENOENT) return fail(errno, "next link");
    Py_RETURN_NONE;
}

static PyObject *open_link(PyObject *module, PyObject *arguments) {
    unsigned id;
    int fd;

    if (!PyArg_ParseTuple(arguments, "I", &id)) return NULL;
    words_used = 0;
    fd = bpf_link_get_fd_by_id(id);
    return fd < 0 ? fail(-fd, "link") : PyLong_FromLong(fd);
}

static PyObject *program_name(PyObject *module, PyObject *arguments) {
    struct bpf_prog_info info = {0};
    __u32 size = sizeof(info);
    unsigned id;
    int fd, error;

    if (!PyArg_ParseTuple(arguments, "I", &id)) return NULL;
    words_used = 0;
    fd = bpf_prog_get_fd_by_id(id);
    if (fd < 0) return fail(-fd, "program");
    error = bpf_obj_get_info_by_fd(fd, &info, &size);
    close(fd);
    if (error) return fail(-error, "program info");
    return PyUnicode_DecodeLatin1(info.name, (Py_ssize_t)strnlen(info.name, sizeof(info.name)),
                                  NULL);
}

static PyObject *link_netns(PyObject *module, PyObject *arguments) {
    int program, netns, fd;

    if (!PyArg_ParseTuple(arguments, "ii", &program, &netns)) return NULL;
    words_used = 0;
    fd = bpf_link_create(program, netns, BPF_SK_LOOKUP, NULL);
    return fd < 0 ? fail(-fd, "attach sk_lookup") : PyLong_FromLong(fd);
}

static PyObject *update_link(PyObject *module, PyObject *arguments) {
    int link, program, error;

    if (!PyArg_ParseTuple(arguments, "ii", &link, &program)) return NULL;
    words_used = 0;
    error = bpf_link_update(link, program, NULL);
    if (error) return fail(-error, "link update");
    Py_RETURN_NONE;
}

static PyObject *pin(PyObject *module, PyObject *arguments) {
    const char *path;
    int fd, error;

    if (!PyArg_ParseTuple(arguments, "is", &fd, &path)) return NULL;
    words_used = 0;
    error = bpf_obj_pin(fd, path);
    if (error) return fail(-error, path);
    Py_RETURN_NONE;
}

static PyObject *get_pinned(PyObject *module, PyObject *arguments) {
    const char *path;
    int fd;

    if (!PyArg_ParseTuple(arguments, "s", &path)) return NULL;
    words_used = 0;
    fd = bpf_obj_get(path);
    return fd < 0 ? fail(-fd, path) : PyLong_FromLong(fd);
}

static PyObject *file_system(PyObject *module, PyObject *arguments) {
    struct statfs found;
    const char *path;

    if (!PyArg_ParseTuple(arguments, "s", &path)) return NULL;
    words_used = 0;
    if (statfs(path, &found)) return fail(errno, path);
    return PyLong_FromLong((long)found.f_type);
}

static PyObject *run_iterator(PyObject *module, PyObject *arguments) {
    int program, link, iterator, error;
    char sink[512];
    ssize_t got;

    if (!PyArg_ParseTuple(arguments, "i", &program)) return NULL;
    words_used = 0;
    error = 0;
    link = bpf_link_create(program, 0, BPF_TRACE_ITER, NULL);
    if (link < 0) return fail(-link, "attach iterator");
    iterator = bpf_iter_create(link);
    if (iterator < 0) {
        error = -iterator;
        goto cleanup;
    }
    Py_BEGIN_ALLOW_THREADS;
    got = 1;
    for (int i = 0; i < ITERATOR_READS && got != 0; i++) {
        got = read(iterator, sink, sizeof(sink));
        /* EAGAIN: the kernel pauses after a million objects without output. */
        if (got < 0 && errno != EAGAIN && errno != EINTR) {
            error = errno;
            break;
        }
    }
    if (!error && got != 0) error = ETIME;
    Py_END_ALLOW_THREADS;
    close(iterator);
cleanup:
    close(link);
    if (error) return fail(error, "run iterator");
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"create_map", create_map, METH_VARARGS, NULL},
    {"update_map", update_map, METH_VARARGS, NULL},
    {"delete_map", delete_map, METH_VARARGS, NULL},
    {"read_map", read_map, METH_VARARGS, NULL},
    {"next_key", next_key, METH_VARARGS, NULL},
    {"map_id", map_id, METH_VARARGS, NULL},
    {"map_info", map_info, METH_VARARGS, NULL},
    {"load_sk_lookup", load_sk_lookup, METH_VARARGS, NULL},
    {"program_id", program_id, METH_VARARGS, NULL},
    {"link_info", link_info, METH_VARARGS, NULL},
    {"next_link", next_link, METH_VARARGS, NULL},
    {"open_link", open_link, METH_VARARGS, NULL},
    {"program_name", program_name, METH_VARARGS, NULL},
    {"link_netns", link_netns, METH_VARARGS, NULL},
    {"update_link", update_link, METH_VARARGS, NULL},
    {"pin", pin, METH_VARARGS, NULL},
    {"get_pinned", get_pinned, METH_VARARGS, NULL},
    {"file_system", file_system, METH_VARARGS, NULL},
    {"run_iterator", run_iterator, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int module_exec(PyObject *module) {
    PyObject *type;
    int error;

    libbpf_set_print(keep_words);
    type = PyType_FromModuleAndSpec(module, &object_spec, NULL);
    if (!type) return -1;
    error = PyModule_AddObjectRef(module, "Object", type);
    Py_DECREF(type);
    if (error) return -1;
    if (PyModule_AddIntConstant(module, "MAP_TYPE_ARRAY", BPF_MAP_TYPE_ARRAY) ||
        PyModule_AddIntConstant(module, "MAP_TYPE_PERCPU_ARRAY", BPF_MAP_TYPE_PERCPU_ARRAY) ||
        PyModule_AddIntConstant(module, "MAP_TYPE_HASH", BPF_MAP_TYPE_HASH) ||
        PyModule_AddIntConstant(module, "MAP_TYPE_SOCKHASH", BPF_MAP_TYPE_SOCKHASH) ||
        PyModule_AddIntConstant(module, "MAP_TYPE_SOCKMAP", BPF_MAP_TYPE_SOCKMAP))
        return -1;
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "nodeagent.capture._libbpf",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__libbpf(void) {
    return PyModuleDef_Init(&module_definition);
}
