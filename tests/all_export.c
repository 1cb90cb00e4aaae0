/* The tests of tools/export.c (20, 21) as one program, so that it is compiled once for both; each is
 * also a program of its own. Names that both use are renamed here. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <stddef.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

static void *all_alloc(void *p, size_t n);
static ssize_t test_pwrite(int fd, const void *from, size_t n, off_t at);
#define MEDRUN_ALLOC all_alloc
#define MEDRUN_EXPORT_NO_MAIN
#define pwrite test_pwrite
#include "../tools/export.c"
#undef pwrite
#undef MEDRUN_ALLOC
#undef MEDRUN_EXPORT_NO_MAIN
#include "test.h"

/* A local may have the name of another file's variable. Alone each file compiles with -Wshadow. */
#pragma GCC diagnostic ignored "-Wshadow"

/* Both let memory run out: theirs is the memory while they run. */
static void *(*alloc)(void *p, size_t n) = realloc;

static void *all_alloc(void *p, size_t n) { return alloc(p, n); }

#undef _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#define main main_20
#define test_realloc alloc_20
#include "20_export.c"
#undef main
#undef test_realloc
#undef MEDRUN_ALLOC
#undef MEDRUN_EXPORT_NO_MAIN

#undef _GNU_SOURCE
#define main main_21
#define test_realloc alloc_21
#define answer answer_21
#define fail_alloc_at fail_alloc_at_21
#define n_allocs n_allocs_21
#define fixtures fixtures_21
#define work work_21
#define must must_21
#define read_file read_file_21
#define write_file write_file_21
#define test_allocations test_allocations_21
#define test_flips test_flips_21
#define test_header test_header_21
#include "21_gguf.c"
#undef main

int main(void) {
    alloc = alloc_20;
    run_file("20_export", main_20);
    alloc = alloc_21;
    run_file("21_gguf", main_21);
    return report();
}
