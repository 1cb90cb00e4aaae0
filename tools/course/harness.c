/* What the checks of all lessons share: opens the demo model, draws inputs from a seed, says hints,
 * and explains a crash. Usage: PROGRAM [DEMO.mdr]; SEED in the environment. MIT licence. */
#include "course.h"
#include <signal.h>
#include <stdarg.h>
#include <sys/time.h>
#include <unistd.h>

static uint64_t state = 1;

/* splitmix64 */
static uint64_t draw_bits(void) {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

double draw_number(void) { return (double)(draw_bits() >> 11) * 0x1p-53; }

size_t draw_below(size_t n) { return (size_t)(draw_number() * (double)n); }

double draw_normal(void) {              /* the sum of twelve is near enough                     */
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += draw_number();
    return sum;
}

const char *draw_question(void) {
    static const char *const all[] = {
        "What are the symptoms of diabetes?", "What causes anemia?", "What is gout?",
        "How is asthma treated?", "What does insulin do?", "What is aspirin used for?",
        "Where is the liver?", "What is a stroke?", "What is a token?", "How is gout treated?",
        "What are the symptoms of asthma?", "What is a normal heart rate?"};
    return all[draw_below(sizeof all / sizeof *all)];
}

void hint(const char *text, ...) {
    va_list list;
    fflush(stderr);
    printf("Not yet: ");
    va_start(list, text);
    vprintf(text, list);
    va_end(list);
    printf("\n");
    exit(1);
}

void right(const char *text, ...) {
    va_list list;
    printf("Right: ");
    va_start(list, text);
    vprintf(text, list);
    va_end(list);
    printf("\n");
}

/* Only write and _exit may be called here. */
static void on_crash(int number) {
    static const char late[] = "Not yet: it ran for 20 seconds. Does your loop ever end?\n";
    static const char wild[] = "Not yet: it crashed: it read or wrote where nothing is. Look at "
                               "your indices.\n";
    ssize_t done = number == SIGVTALRM ? write(1, late, sizeof late - 1)
                                     : write(1, wild, sizeof wild - 1);
    _exit(done < 0 ? 2 : 1);
}

int main(int argc, char **argv) {
    const char *path = argc > 1 ? argv[1] : "demo.mdr", *seed = getenv("SEED");
    medrun_error e = {0};
    medrun_options one = {.threads = 1};
    if (medrun_open(&demo, path, &one, &e)) {
        fprintf(stderr, "%s\n", e.text);
        return 2;
    }
    medrun_describe(demo, &facts);
    if (seed && *seed) state = strtoull(seed, NULL, 10);
    signal(SIGVTALRM, on_crash), signal(SIGSEGV, on_crash), signal(SIGBUS, on_crash);
    signal(SIGFPE, on_crash), signal(SIGABRT, on_crash);
    /* Of the processor's time: a busy machine is no mistake. */
    setitimer(ITIMER_VIRTUAL, &(struct itimerval){.it_value = {20, 0}}, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    lesson();
    medrun_close(demo);
    return 0;
}
