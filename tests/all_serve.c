/* The tests of tools/serve.c and of the grammars that it includes (44) as one program, so that they
 * are compiled once; each is also a program of its own. */
#define _GNU_SOURCE
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>

static void *test_malloc(size_t n);
#define ALL_SERVE
#define malloc(n) test_malloc(n)
#define main serve_main
#include "../tools/serve.c"
#undef main
#undef malloc
#include "test.h"

/* A local may have the name of another file's variable. Alone each file compiles with -Wshadow. */
#pragma GCC diagnostic ignored "-Wshadow"

#undef _GNU_SOURCE
#define main main_42
#include "42_serve.c"
#undef main

#undef _GNU_SOURCE
#define main main_44
#include "44_grammar.c"
#undef main

int main(void) {
    run_file("42_serve", main_42);
    run_file("44_grammar", main_44);
    return report();
}
