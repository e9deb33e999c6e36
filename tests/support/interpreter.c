/* The interpreter with a sanitizer's runtime linked in: the tests and every daemon that they start
 * run on it, and no other program of the machine is touched. */
#include <Python.h>

int main(int argc, char **argv) {
    return Py_BytesMain(argc, argv);
}
