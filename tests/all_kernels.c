/* The tests of sections 4 to 7 and 13 as one program, so that medrun.c with all kernels is compiled
 * once for all of them; each of these files is also a program of its own. Names that two files use
 * are renamed here. */
#define MEDRUN_NO_MAIN
#define MEDRUN_MORE_KERNELS "tools/kernels.h"
#include "../medrun.c"
#define MEDRUN_API_ONLY         /* including medrun.c again gives nothing more                  */
#include "test.h"

/* A local may have the name of another file's variable. Alone each file compiles with -Wshadow. */
#pragma GCC diagnostic ignored "-Wshadow"

#ifndef _WIN32
#define main main_04
#include "04_threads.c"
#undef main
#endif

#define main main_05
#include "05_numbers.c"
#undef main

#define main main_06
#define problem problem_06
#define STYLES STYLES_06
#define free_problem free_problem_06
#define uniform uniform_06
#include "06_kernels.c"
#undef main
#undef problem
#undef STYLES
#undef free_problem
#undef uniform

#define main main_07
#include "07_tensor.c"
#undef main

#define main main_13
#include "13_transformer.c"
#undef main

int main(void) {
#ifndef _WIN32
    run_file("04_threads", main_04);
#endif
    run_file("05_numbers", main_05);
    run_file("06_kernels", main_06);
    run_file("07_tensor", main_07);
    run_file("13_transformer", main_13);
    return report();
}
