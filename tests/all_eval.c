/* The tests of tools/eval.c and of tools/explain.c, which includes it, as one program, so that they
 * are compiled once; each is also a program of its own. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdlib.h>

static void *all_alloc(void *p, size_t n);
#define ALL_EVAL
#define MEDRUN_ALLOC all_alloc
#define MEDRUN_EXPLAIN_NO_MAIN
#include "../tools/explain.c"
#include "test.h"

/* A local may have the name of another file's variable. Alone each file compiles with -Wshadow. */
#pragma GCC diagnostic ignored "-Wshadow"

/* The first lets memory run out: its is the memory while it runs. */
static void *(*alloc)(void *p, size_t n) = realloc;

static void *all_alloc(void *p, size_t n) { return alloc(p, n); }

#undef _GNU_SOURCE
#define main main_22
#include "22_eval.c"
#undef main

#undef _GNU_SOURCE
#define main main_43
#include "43_explain.c"
#undef main

int main(void) {
    alloc = test_alloc;
    run_file("22_eval", main_22);
    alloc = realloc;
    run_file("43_explain", main_43);
    return report();
}
