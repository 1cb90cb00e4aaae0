/* The tests of sections 3, 9 to 12 and 14 as one program, so that medrun.c is compiled once for all of
 * them; each of these files is also a program of its own. The Makefile leaves out the kernels but
 * plain C. Names that two files use are renamed here. */
#include <stddef.h>
static void *all_alloc(void *p, size_t n);
#define MEDRUN_NO_MAIN
#define MEDRUN_ALLOC all_alloc
#include "../medrun.c"
#undef MEDRUN_ALLOC
#define MEDRUN_API_ONLY         /* including medrun.c again gives nothing more                  */
#include "test.h"

/* A local may have the name of another file's variable. Alone each file compiles with -Wshadow. */
#pragma GCC diagnostic ignored "-Wshadow"

/* Some files let memory run out: theirs is the memory while they run. */
static void *(*alloc)(void *p, size_t n) = realloc;

static void *all_alloc(void *p, size_t n) { return alloc(p, n); }

#define main main_03
#include "03_basics.c"
#undef main

#define main main_09
#define refused refused_09
#define test_lies test_lies_09
#include "09_file.c"
#undef main
#undef refused
#undef test_lies

#define main main_10
#define limited_realloc alloc_10
#include "10_tokenizer.c"
#undef main
#undef limited_realloc
#undef MEDRUN_ALLOC

#define main main_11
#define limited_realloc alloc_11
#define allocations_left allocations_left_11
#define slurp slurp_11
#define test_errors test_errors_11
#define test_forged test_forged_11
#define test_no_memory test_no_memory_11
#include "11_chat.c"
#undef main

#define main main_12
#define uniform uniform_12
#include "12_model.c"
#undef main
#undef uniform

#define main main_14
#include "14_sampler.c"
#undef main

int main(void) {
    run_file("03_basics", main_03);
    run_file("09_file", main_09);
    alloc = alloc_10;
    run_file("10_tokenizer", main_10);
    alloc = alloc_11;
    run_file("11_chat", main_11);
    alloc = realloc;
    run_file("12_model", main_12);
    run_file("14_sampler", main_14);
    return report();
}
