/* Tests of section 4: the pool, mapped files and memory, processor features. Build it once with
 * -fsanitize=thread. */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"
#include <fenv.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#ifdef CPU_COUNT
#include <sys/mount.h>

static bool many_processors;
static unsigned few_processors;         /* a bit for each                                        */

/* Stands before the C library's: a machine with 1024 processors, or with a few, when asked. */
int sched_getaffinity(pid_t pid, size_t n, cpu_set_t *set) {
    memset(set, many_processors ? 0xFF : 0, n);
    for (size_t i = 0; i < 8; i++) if (few_processors >> i & 1) CPU_SET(i, set);
    bool asked = many_processors || few_processors;
    return asked || syscall(SYS_sched_getaffinity, pid, n, set) >= 0 ? 0 : -1;
}
#endif

enum { MOST = 1000 };

/* What a task saw: how often each item came, and whether ranges and thread numbers were right. */
typedef struct {
    atomic_int visits[MOST];
    size_t n, grain;
    int threads;
    atomic_int wrong, calls, inside[MAX_THREADS];
    int slow;                           /* microseconds a call takes                             */
    double sums[MAX_THREADS];           /* plain memory: TSan sees two threads with one number   */
    double result[MOST];
} seen;

static void see(void *context, size_t begin, size_t end, int thread) {
    seen *s = context;
    bool whole = begin == 0 && end == s->n;             /* a job too small to share              */
    if (begin >= end || end > s->n || (!whole && (begin % s->grain || end - begin > s->grain)))
        atomic_fetch_add(&s->wrong, 1);
    if (thread < 0 || thread >= s->threads) {
        atomic_fetch_add(&s->wrong, 1);
        return;
    }
    if (atomic_fetch_add(&s->inside[thread], 1)) atomic_fetch_add(&s->wrong, 1);
    for (size_t i = begin; i < end && i < MOST; i++) {
        atomic_fetch_add(&s->visits[i], 1);
        s->sums[thread] += (double)i;
        s->result[i] += 1;
    }
    if (s->slow) usleep((unsigned)s->slow);
    atomic_fetch_add(&s->calls, 1);
    atomic_fetch_sub(&s->inside[thread], 1);
}

/* Runs one job and counts what was wrong with it. */
static int wrong_job(thread_pool *p, seen *s, size_t n, size_t grain, int slow) {
    memset(s, 0, sizeof *s);
    s->n = n, s->grain = grain ? grain : 1, s->threads = p->threads, s->slow = slow;
    parallel_for(p, n, grain, see, s);
    int wrong = atomic_load(&s->wrong);
    double sum = 0;
    for (int t = 0; t < p->threads; t++) sum += s->sums[t];
    for (size_t i = 0; i < MOST; i++)
        wrong += atomic_load(&s->visits[i]) != (i < n) || s->result[i] != (i < n ? 1 : 0);
    wrong += sum != (double)n * ((double)n - 1) / 2 && n;
    wrong += !n && atomic_load(&s->calls);
    return wrong;
}

static void test_every_item_once(void) {
    static const size_t grains[] = {0, 1, 2, 3, 4, 7, 16, 64, 333, 999, 1000, 1001, SIZE_MAX / 2};
    static seen s;
    for (int threads = 1; threads <= 8; threads++) {
        thread_pool p;
        medrun_error e = {0};
        int wrong = 0;
        if (!CHECK_EQ(pool_start(&p, threads, &e), MEDRUN_OK)) continue;
        CHECK_EQ(p.threads, threads);
        CHECK_EQ(p.started, threads - 1);
        for (size_t n = 0; n <= MOST; n += n < 40 ? 1 : 37)
            for (size_t g = 0; g < sizeof grains / sizeof *grains; g++)
                wrong += wrong_job(&p, &s, n, grains[g], 0);
        for (size_t n = 0; n <= MOST; n++)
            wrong += wrong_job(&p, &s, n, 1 + test_random() % 100, 0);
        CHECK_EQ(wrong, 0);
        pool_stop(&p);
    }
}

typedef struct {
    thread_pool *pool;
    pthread_t ids[4];
    atomic_int arrived;
    bool together;
} meeting;

/* Waits until the task runs on every thread at once: only a pool that shares can finish it. */
static void meet(void *context, size_t begin, size_t end, int thread) {
    meeting *m = context;
    (void)begin, (void)end;
    m->ids[thread] = pthread_self();
    atomic_fetch_add(&m->arrived, 1);
    double start = seconds();
    while (atomic_load(&m->arrived) < 4 && seconds() - start < 10) sched_yield();
    if (atomic_load(&m->arrived) < 4) m->together = false;
}

static void test_all_threads_work(void) {
    thread_pool p;
    medrun_error e = {0};
    if (!CHECK_EQ(pool_start(&p, 4, &e), MEDRUN_OK)) return;
    meeting m = {.pool = &p, .together = true};
    parallel_for(&p, 4, 1, meet, &m);
    CHECK(m.together);
    CHECK(pthread_equal(m.ids[0], pthread_self()));     /* the caller is thread 0                */
    int same = 0;
    for (int i = 0; i < 4; i++) for (int k = 0; k < i; k++) same += pthread_equal(m.ids[i], m.ids[k]);
    CHECK_EQ(same, 0);
    pool_stop(&p);
}

/* Thousands of jobs at once one after the other, then with time for the workers to fall asleep,
 * then with workers that finish long after the caller. */
static void test_short_jobs(void) {
    static const int counts[] = {2, 3, 8};
    static seen s;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        thread_pool p;
        medrun_error e = {0};
        int wrong = 0;
        if (!CHECK_EQ(pool_start(&p, counts[i], &e), MEDRUN_OK)) continue;
        for (int job = 0; job < 3000; job++) wrong += wrong_job(&p, &s, 2 + (size_t)job % 9, 1, 0);
        CHECK_EQ(wrong, 0);
        for (int job = 0; job < 150; job++) {
            usleep((unsigned)(test_random() % 2000));
            wrong += wrong_job(&p, &s, (size_t)job, 1 + (size_t)job % 3, 0);
        }
        CHECK_EQ(wrong, 0);
        for (int job = 0; job < 60; job++) wrong += wrong_job(&p, &s, 11, 1, (int)(test_random() % 700));
        CHECK_EQ(wrong, 0);
        pool_stop(&p);
    }
}

static atomic_uint spun;

static void spin_some(void *context, size_t begin, size_t end, int thread) {
    (void)context, (void)thread;
    for (size_t i = begin; i < end; i++)
        for (unsigned k = (unsigned)(i * 2654435761u >> 20) % 3000; k; k--) spun += k;
}

/* Pieces of many lengths, so that caller and workers fall asleep just as they are wanted: who misses
 * the other sleeps for ever (an alarm ends this program). */
static void test_sleepers(void) {
    thread_pool p;
    medrun_error e = {0};
    if (!CHECK_EQ(pool_start(&p, 3, &e), MEDRUN_OK)) return;
    double start = seconds();
    size_t jobs = 0;
    alarm(120);
    for (; seconds() - start < (test_all() ? 10 : 2); jobs++) {
        parallel_for(&p, 2 + jobs % 7, 1, spin_some, NULL);
        if (jobs % 997 == 0) usleep(300);
    }
    alarm(0);
    CHECK(jobs > 100);
    pool_stop(&p);
}

/* Idle workers must sleep, not spin: an engine that waits for a person uses no processor. */
static void test_workers_sleep(void) {
    thread_pool p;
    medrun_error e = {0};
    static seen s;
    if (!CHECK_EQ(pool_start(&p, 4, &e), MEDRUN_OK)) return;
    CHECK_EQ(wrong_job(&p, &s, 100, 1, 0), 0);
    double start = seconds();
    while (!atomic_load(&p.idle.asleep) && seconds() - start < 10) usleep(1000);
    CHECK(atomic_load(&p.idle.asleep));
    usleep(50000);                                      /* the others, too                       */
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    usleep(300000);
    getrusage(RUSAGE_SELF, &after);
    double used = (double)(after.ru_utime.tv_sec - before.ru_utime.tv_sec) +
                  1e-6 * (double)(after.ru_utime.tv_usec - before.ru_utime.tv_usec);
    CHECK(used < 0.15);
    CHECK_EQ(wrong_job(&p, &s, 100, 1, 0), 0);          /* and wake up again                     */
    pool_stop(&p);
}

static void test_pool_start(void) {
    thread_pool p;
    medrun_error e = {0};
    CHECK_EQ(pool_start(&p, -1, &e), MEDRUN_USAGE);
    CHECK(!strcmp(e.text, "threads: found -1, wanted 1 to 256"));
    e = (medrun_error){0};
    CHECK_EQ(pool_start(&p, MAX_THREADS + 1, &e), MEDRUN_USAGE);
    CHECK(strstr(e.text, "257") != NULL);
    e = (medrun_error){0};
    CHECK_EQ(pool_start(&p, 0, &e), MEDRUN_USAGE);
    e = (medrun_error){0};
    CHECK_EQ(pool_start(&p, MAX_THREADS, &e), MEDRUN_OK);
    CHECK_EQ(p.started, MAX_THREADS - 1);
    pool_stop(&p);
    int wrong = 0;
    for (int i = 0; i < 300; i++) {                     /* started and stopped before they run   */
        wrong += pool_start(&p, 1 + i % 6, &e) != MEDRUN_OK;
        pool_stop(&p);
    }
    CHECK_EQ(wrong, 0);
}

/* Threads that the system refuses: an error, and those that did start are gone again. */
static void test_pool_refused(void) {
    struct rlimit old, little;
    getrlimit(RLIMIT_AS, &old);
    size_t stack;
    pthread_attr_t a;
    pthread_attr_init(&a);
    pthread_attr_getstacksize(&a, &stack);
    pthread_attr_destroy(&a);
    unsigned long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f && fscanf(f, "%llu", &pages) != 1) pages = 0;
    if (f) fclose(f);
    rlim_t room = pages * (rlim_t)sysconf(_SC_PAGESIZE) + 10 * (rlim_t)stack;
    little = old;
    little.rlim_cur = room;
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    pages = 0;                                          /* they need address space of their own  */
#elif defined __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
    pages = 0;
#endif
#endif
    bool limited = pages && stack >= 1 << 20 && !setrlimit(RLIMIT_AS, &little);
    void *more = limited ? malloc((size_t)room) : NULL;
    free(more);
    if (!limited || more) {                             /* an emulator may not care              */
        setrlimit(RLIMIT_AS, &old);
        SKIP("cannot make the system refuse threads here");
        return;
    }
    thread_pool p;
    medrun_error e = {0};
    int code = pool_start(&p, MAX_THREADS, &e);
    setrlimit(RLIMIT_AS, &old);
    CHECK_EQ(code, MEDRUN_NO_MEMORY);
    CHECK_EQ(e.code, MEDRUN_NO_MEMORY);
    CHECK(strstr(e.text, "of 256") != NULL);
    CHECK_EQ(p.started, 0);
    CHECK_EQ(p.threads, 0);                             /* else medrun_close stops it once more  */
    if (!code) pool_stop(&p);
}

static volatile sig_atomic_t too_slow;

static void on_alarm(int signal_number) { too_slow = signal_number; }

static void test_map_file(void) {
    char path[] = "/tmp/medrun_test_XXXXXX", fifo[64];
    file_map map = {(const uint8_t *)"", 9};
    medrun_error e = {0};
    CHECK_EQ(map_file("/nonexistent/x.mdr", &map, &e), MEDRUN_BAD_FILE);
    CHECK(map.data == NULL && map.n == 0);
    CHECK(!strcmp(e.text, "/nonexistent/x.mdr: cannot open: No such file or directory"));
    e = (medrun_error){0};
    CHECK_EQ(map_file("/tmp", &map, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "folder") != NULL);
    e = (medrun_error){0};
    CHECK_EQ(map_file("/dev/null", &map, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "not a regular file") != NULL);
    int fd = mkstemp(path);
    if (!CHECK(fd >= 0)) return;
    e = (medrun_error){0};
    CHECK_EQ(map_file(path, &map, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "is empty") != NULL);
    CHECK(write(fd, "twelve bytes", 12) == 12);
    close(fd);
    e = (medrun_error){0};
    CHECK_EQ(map_file(path, &map, &e), MEDRUN_OK);
    CHECK(map.n == 12 && !memcmp(map.data, "twelve bytes", 12));
    unmap_file(&map);
    CHECK(map.data == NULL && map.n == 0);
    unmap_file(&map);
    unlink(path);
    snprintf(fifo, sizeof fifo, "%s.fifo", path);       /* a pipe nobody writes must not hang us */
    if (mkfifo(fifo, 0600) == 0) {
        sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_alarm}, NULL);
        alarm(3);
        e = (medrun_error){0};
        CHECK_EQ(map_file(fifo, &map, &e), MEDRUN_BAD_FILE);
        alarm(0);
        CHECK(!too_slow && strstr(e.text, "but a pipe or a device"));
        unlink(fifo);
    }
}

#ifndef _WIN32
static void write_text(const char *folder, const char *name, const char *text) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "w");
    if (CHECK(f)) fputs(text, f), fclose(f);
}

/* Files as the two versions of control groups have them, and what is none. */
static void test_limits(void) {
    static const struct { int version; const char *name, *text; } files[] = {
        {2, "cpu.max", "150000 100000\n"}, {2, "memory.max", "67108864\n"},
        {2, "memory.high", "max\n"}, {2, "memory.current", "60000000\n"},
        {2, "memory.stat", "anon 1\ninactive_file 20000000\nactive_file 5000000\nslab 7\n"},
        {1, "cpu.cfs_quota_us", "-1\n"}, {1, "cpu.cfs_period_us", "100000\n"},
        {1, "memory.limit_in_bytes", "9223372036854771712\n"},
        {1, "memory.usage_in_bytes", "40000000\n"},
        {1, "memory.stat", "inactive_file 1\nactive_file 2\ntotal_inactive_file 14000000\n"
                           "total_active_file 1000000\n"}};
    enum { FILES = sizeof files / sizeof *files };
    char folders[3][32] = {"", "/tmp/medrun_test_XXXXXX", "/tmp/medrun_test_XXXXXX"}, path[256];
    if (!CHECK(mkdtemp(folders[1]) && mkdtemp(folders[2]))) return;
    const char *v1 = folders[1], *v2 = folders[2];
    machine_limits none = {MAX_THREADS, 0x1p62, 0x1p62, false}, l = none;
    lower_limits(v2, &l), lower_limits(v1, &l);
    CHECK(!memcmp(&l, &none, sizeof l));                /* no file is no limit                   */
    for (int i = 0; i < FILES; i++) write_text(folders[files[i].version], files[i].name, files[i].text);
    lower_limits(v1, &l);                               /* "none" in the words of version 1      */
    CHECK(l.processors == MAX_THREADS && l.memory >= 0x1p62 && l.available >= 0x1p62);
    lower_limits(v2, &l);
    CHECK(l.processors == 1.5 && l.memory == 67108864 && l.available == 67108864 - 35000000);
    write_text(v2, "cpu.max", "max 100000\n");
    write_text(v2, "memory.high", "40000000\n");
    write_text(v1, "cpu.cfs_quota_us", "50000\n");
    write_text(v1, "memory.limit_in_bytes", "30000000\n");
    lower_limits(v2, &l);                               /* the least counts                      */
    CHECK(l.processors == 1.5 && l.memory == 40000000 && l.available == 5000000);
    l.available = 0x1p62;
    lower_limits(v1, &l);
    CHECK(l.processors == 0.5 && l.memory == 30000000 && l.available == 5000000);
    write_text(v2, "memory.current", "900000000\n");
    lower_limits(v2, &l);                               /* more is used than there may be        */
    CHECK(l.available == 0);
    for (int i = 0; i < FILES; i++) {
        snprintf(path, sizeof path, "%s/%s", folders[files[i].version], files[i].name);
        remove(path);
    }
    rmdir(v1), rmdir(v2);
}
#endif

#ifdef CPU_COUNT
/* The cores of the processors MINE (bits) where four have these lists of hardware threads. */
static int cores_with(const char *folder, unsigned mine, const char *const lists[4]) {
    char name[64];
    for (int i = 0; i < 4; i++) {
        snprintf(name, sizeof name, "cpu%d/topology/thread_siblings_list", i);
        if (lists[i]) write_text(folder, name, lists[i]);
    }
    few_processors = mine;
    int n = cores_of(folder);
    few_processors = 0;
    return n;
}

/* A second thread clearly gains. */
static bool gains(void) {
    const kernel_set *k;
    return !choose_kernels(&k, NULL, NULL) && time_trial(k, 2, 0) < 0.9 * time_trial(k, 1, 0);
}

/* What default_threads says, in a process of its own, where two processors are said to be threads
 * of one core: 1 or 2. Both are one processor in truth where PINNED. 0: the limit was named wrong.
 * 3: it said 1, but a second thread gained before and after. 77: only root may try this. */
static int threads_of_one_core(const char *folder, bool pinned) {
    pid_t child = fork();
    if (!child) {
        const char *limit = NULL;
        cpu_set_t first;
        CPU_ZERO(&first);
        for (size_t i = 0; pinned && !CPU_COUNT(&first); i++) {
            CPU_SET(i, &first);
            if (sched_setaffinity(0, sizeof first, &first)) CPU_ZERO(&first);
        }
        few_processors = 3;
        if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
            mount(folder, "/sys/devices/system/cpu", NULL, MS_BIND, NULL)) _exit(77);
        bool gained = gains();
        int n = default_threads(&limit);
        if (n != default_threads(&limit) || (n < 2 && !(limit && strstr(limit, "the cores")))) n = 0;
        _exit(n == 1 && gained && gains() ? 3 : n);
    }
    int status = 0;
    return waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

static void test_cores(void) {
    static const char *const beside[4] = {"0-1\n", "0-1\n", "2-3\n", "2-3\n"};
    static const char *const apart[4] = {"0,2\n", "1,3\n", "0,2\n", "1,3\n"};
    static const char *const single[4] = {"0\n", "1\n", "2\n", "3\n"}, *const nothing[4] = {0};
    char folder[] = "/tmp/medrun_test_XXXXXX", path[128];
    const char *limit;
    if (!CHECK(mkdtemp(folder))) return;
    for (int i = 0; i < 8; i++) {
        snprintf(path, sizeof path, "%s/cpu%d%s", folder, i / 2, i % 2 ? "/topology" : "");
        CHECK(!mkdir(path, 0700));
    }
    CHECK_EQ(cores_with(folder, 15, nothing), 4);       /* nobody says: each is a core           */
    CHECK_EQ(cores_with(folder, 15, single), 4);
    CHECK_EQ(cores_with(folder, 15, beside), 2);
    CHECK_EQ(cores_with(folder, 3, beside), 1);
    CHECK_EQ(cores_with(folder, 10, beside), 2);        /* the first of a core is not ours       */
    CHECK_EQ(cores_with(folder, 11, beside), 2);
    CHECK_EQ(cores_with(folder, 8, beside), 1);
    CHECK_EQ(cores_with(folder, 15, apart), 2);
    CHECK_EQ(cores_with(folder, 5, apart), 1);
    CHECK_EQ(cores_with(folder, 3, apart), 2);
    CHECK_EQ(cores_with("/tmp/medrun_is_not_there", 15, nothing), 4);
    cores_with(folder, 15, beside);
    int n = threads_of_one_core(folder, true), tries = 1;
    while (n == 2 && tries++ < 9)               /* a trial that was disturbed may say so         */
        n = threads_of_one_core(folder, true);
    if (n != 77) CHECK_EQ(n, 1);
    /* Two true processors do more than one, if nobody else uses them: tried for some seconds. */
    bool may = n != 77 && processors() > 1;
    int wrong = 0;
    for (int i = 0; may && i < 400 && n != 2; i++) {
        if (i) usleep(20000);
        n = threads_of_one_core(folder, false);
        wrong += n != 1 && n != 2;
    }
    if (may && n != 2 && wrong < 40)
        SKIP("a second processor gained nothing: it shares a core, or others use it");
    else if (may)
        CHECK_EQ(n, 2);
    snprintf(path, sizeof path, "%s/smt", folder);
    CHECK(!mkdir(path, 0700));
    write_text(folder, "smt/active", "0\n");
    CHECK_EQ(cores_with(folder, 15, beside), MAX_THREADS);
    write_text(folder, "smt/active", "1\n");
    CHECK_EQ(cores_with(folder, 15, beside), 2);
    snprintf(path, sizeof path, "rm -r %s", folder);
    CHECK(!system(path));
    n = default_threads(&limit);
    CHECK(n >= 1 && n <= processors());
}
#endif

static void test_machine(void) {
    double t = seconds();
    usleep(20000);
    t = seconds() - t;
    CHECK(t >= 0.02 && t < 5);
    CHECK(processors() >= 1 && processors() <= MAX_THREADS);
#ifdef CPU_COUNT
    many_processors = true;
    CHECK_EQ(processors(), MAX_THREADS);
    many_processors = false;
#endif
    size_t cache = second_cache();                      /* 0: not known                          */
    CHECK(!cache || (cache >= 64 << 10 && cache <= 4 << 20 && cache % 1024 == 0));
    machine_limits l = limits_of_machine();
    CHECK(l.memory >= 16u << 20 && l.available > 0 && l.available <= l.memory);

    size_t n = (size_t)64 << 20;
    uint8_t *p = map_bytes(-1, n);
    CHECK(p && p[0] == 0 && p[n / 2] == 0 && p[n - 1] == 0);
    if (p) p[0] = p[n - 1] = 1;
    unmap_bytes(p, n);
    CHECK(map_bytes(-1, SIZE_MAX - 65535) == NULL);

    cpu_features f = detect_cpu();                      /* each stands on the one before it      */
    CHECK((!f.avx512 || f.avx2) && (!f.avx512_bf16 || f.avx512));
    CHECK((!f.neon_dot || f.neon) && (!f.neon_i8mm || f.neon_dot));
    CHECK(!f.neon_bf16 || f.neon_i8mm);
#ifdef MEDRUN_ARM64
    CHECK(f.neon);
#endif
#ifdef MEDRUN_X86
    CHECK_EQ(f.avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
    CHECK_EQ(f.avx512, f.avx2 && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"));
#if !defined __clang__
    CHECK_EQ(f.avx512_bf16, f.avx512 && __builtin_cpu_supports("avx512bf16"));
#endif
#endif
}

/* What a host may have asked its processor for, and in which tests leave it again. */
static void flush_tiny_numbers(bool on) {
#if defined __SSE__
    __builtin_ia32_ldmxcsr((__builtin_ia32_stmxcsr() & ~0x8040u) | (on ? 0x8040u : 0));
#elif defined __aarch64__
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    control = (control & ~(1ull << 24)) | (uint64_t)on << 24;
    __asm__ volatile("msr fpcr, %0" : : "r"(control));
#else
    (void)on;
#endif
}

/* A thread whose arithmetic gives other bits cannot open a model; one that changes it later cannot
 * compute with it. */
static void test_arithmetic(void) {
    static const int others[] = {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
    const char *path = "tools/demo/demo.mdr";
    medrun_options options = {.threads = 2};
    medrun_model *m = NULL, *none = NULL;
    medrun_session *s = NULL;
    medrun_error e = {0};
    CHECK(!check_machine(&e));
    if (!CHECK_EQ(medrun_open(&m, path, &options, &e), MEDRUN_OK)) return;
    if (!CHECK_EQ(medrun_start(&s, m, NULL, NULL, 0, &e), MEDRUN_OK)) return;
    CHECK_EQ(medrun_feed(s, (int32_t[]){1, 2, 3}, 3, &e), MEDRUN_OK);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        if (fesetround(others[i])) continue;
        medrun_error said = {0};
        check_machine(&said);
        fesetround(FE_TONEAREST);
        CHECK(said.code == MEDRUN_FAILED && strstr(said.text, "round"));
    }
    flush_tiny_numbers(true);
    medrun_error said = {0};
    check_machine(&said);
    int opened = medrun_open(&none, path, &options, &e);
    medrun_error why = {0};
    int stepped = medrun_step(&s, 1, &why);
    flush_tiny_numbers(false);
#if defined __SSE__ || defined __aarch64__
    CHECK(said.code && strstr(said.text, "tiny numbers for zero"));
    CHECK(opened == MEDRUN_FAILED && !none && strstr(e.text, "this program's arithmetic takes"));
    CHECK(stepped == MEDRUN_FAILED && !strcmp(why.text, e.text) && medrun_pending(s) == 3);
#else
    CHECK(!said.code && !opened && !stepped);
    medrun_close(none);
#endif
    e = (medrun_error){0};
    CHECK(medrun_step(&s, 1, &e) == MEDRUN_OK && medrun_pending(s) == 0);
    medrun_stop(s);
    medrun_close(m);
}

int main(void) {
    test_every_item_once();
    test_all_threads_work();
    test_short_jobs();
    test_sleepers();
    test_workers_sleep();
    test_pool_start();
    test_map_file();
    test_machine();
#ifndef _WIN32
    test_limits();
#endif
#ifdef CPU_COUNT
    test_cores();
#endif
    test_arithmetic();
    test_pool_refused();
    return report();
}
