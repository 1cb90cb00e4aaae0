/* What every test program shares: include it after medrun.c, end main with `return report();`.
 * A loop over many values counts its failures in a variable and checks that once, so that the
 * last line counts statements about the code and not iterations. */
#ifndef TEST_H
#define TEST_H

/* A test that computes what medrun must give does it as medrun does: without fma of the compiler. */
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

/* Whole 64 of COLS numbers through a Walsh-Hadamard transform, as its definition recurses. */
__attribute__((unused)) static void hadamard(float *x, size_t n) {
    if (n == 1) return;
    for (size_t i = 0; i < n / 2; i++) {
        float a = x[i], b = x[i + n / 2];
        x[i] = a + b, x[i + n / 2] = a - b;
    }
    hadamard(x, n / 2), hadamard(x + n / 2, n / 2);
}

__attribute__((unused)) static void turn_row(float *x, size_t cols) {
    for (size_t k = 0; k + 64 <= cols; k += 64) {
        for (size_t i = 0; i < 64; i++) x[k + i] /= 8;
        hadamard(x + k, 64);
    }
}

static int checks_passed, checks_failed, checks_skipped;

__attribute__((unused)) static bool check_that(bool ok, const char *file, int line, const char *what) {
    if (ok) checks_passed++;
    else if (++checks_failed <= 20) printf("%s:%d: failed: %s\n", file, line, what);
    return ok;
}

__attribute__((unused)) static bool check_equal(long long a, long long b, const char *file, int line,
                                     const char *what) {
    bool ok = check_that(a == b, file, line, what);
    if (!ok && checks_failed <= 20) printf("    %lld, wanted %lld\n", a, b);
    return ok;
}

#define CHECK(cond) check_that((cond), __FILE__, __LINE__, #cond)
#define CHECK_EQ(a, b) check_equal((long long)(a), (long long)(b), __FILE__, __LINE__, \
                                   #a " == " #b)
#define SKIP(reason) (checks_skipped++, printf("skipped: %s\n", reason))

/* The same numbers on every machine (xorshift64*): random inputs that a failure can name. */
#define RANDOM_START 88172645463325252ull
static uint64_t test_random_state = RANDOM_START;

__attribute__((unused)) static uint64_t test_random(void) {
    test_random_state ^= test_random_state >> 12;
    test_random_state ^= test_random_state << 25;
    test_random_state ^= test_random_state >> 27;
    return test_random_state * 0x2545F4914F6CDD1D;
}

/* `make test-all`: loops try everything. Else those that take long try a part of it. */
__attribute__((unused)) static bool test_all(void) { return getenv("MEDRUN_TEST_ALL") != NULL; }

#ifdef _WIN32
__attribute__((unused)) static int setenv(const char *name, const char *value, int replace) {
    (void)replace;
    return _putenv_s(name, value);
}

__attribute__((unused)) static int unsetenv(const char *name) { return _putenv_s(name, ""); }
#endif

static int report(void) {
    printf("%d passed, %d failed, %d skipped\n", checks_passed, checks_failed, checks_skipped);
    return checks_failed != 0;
}

/* Runs the test file NAME as one of several in a program (all_*.c): its main, which ends with a
 * report of all checks until then. */
__attribute__((unused)) static void run_file(const char *name, int (*its_main)(void)) {
    printf("%s\n", name);
    test_random_state = RANDOM_START;
    its_main();
}

#endif
