/* What an embedder counts on: a session lives in the caller's memory, to the byte; from
 * medrun_start on nothing asks for memory but what section 1 says; no call needs more stack than
 * section 1 says. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined SANITIZED
#elif defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

static atomic_bool refuse;                      /* there is no memory to be had                  */
static atomic_long asked;                       /* requests since then                           */

static bool refused(void) {
    if (!atomic_load(&refuse)) return false;
    return atomic_fetch_add(&asked, 1), true;
}

/* In place of libc's own, so that its requests count too, those of fopen for example: memory of one
 * piece, of which nothing comes back. Before each block its size. */
#if !SANITIZED
static _Alignas(16) uint8_t test_heap[256 << 20];
static atomic_size_t given;

void *malloc(size_t n) {
    if (refused() || n > sizeof test_heap) return NULL;
    size_t at = atomic_fetch_add(&given, (n + 31) / 16 * 16);
    if (at + n + 16 > sizeof test_heap) return NULL;
    memcpy(test_heap + at, &n, sizeof n);
    return test_heap + at + 16;
}

void *calloc(size_t n, size_t size) {
    return size && n > SIZE_MAX / size ? NULL : malloc(n * size);       /* fresh, and so zero    */
}

void *realloc(void *p, size_t n) {
    size_t old = 0;
    void *fresh = malloc(n);
    if (p) memcpy(&old, (uint8_t *)p - 16, sizeof old);
    return fresh && old ? memcpy(fresh, p, old < n ? old : n) : fresh;
}

void free(void *p) { (void)p; }
#else
static void *test_realloc(void *p, size_t n) { return refused() ? NULL : realloc(p, n); }
#define MEDRUN_ALLOC test_realloc
#endif

static void *test_mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) {
    return refused() ? MAP_FAILED : mmap(at, n, protection, flags, fd, offset);
}

#define mmap test_mmap
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "../tools/tool_calls.c"
#undef mmap
#include "test.h"

static char folder[1024];

/* A checkpoint of the build, or NULL. */
static medrun_model *open_model(const char *name, int threads, const char *kernels) {
    char path[1200];
    medrun_model *m = NULL;
    medrun_error e = {0};
    snprintf(path, sizeof path, "%s/%s.mdr", folder, name);
    medrun_options o = {.threads = threads, .kernels = kernels};
    if (medrun_open(&m, path, &o, &e)) printf("    %s\n", e.text);
    return m;
}

/* ---- memory -------------------------------------------------------------------------------- */

enum { FED = 50, ANSWER = 40 };

typedef struct {
    int32_t ids[FED + ANSWER];
    uint8_t logits[32];                         /* SHA-256 of the last                           */
    size_t n_text;
} outcome;

static void see_stage(void *user, const char *stage, int layer, size_t rows, size_t cols,
                      size_t stride, const float *data) {
    (void)stage, (void)layer, (void)rows, (void)cols, (void)stride, (void)data;
    ++*(long *)user;
}

/* A prompt, an answer, some of it again, step by step and watched. True if nothing failed. */
static bool use(medrun_session *s, outcome *o) {
    const medrun_model *m = s->model;
    int32_t fed[FED], id;
    const char *text;
    size_t n;
    long stages = 0;
    int code = 0;
    memset(o, 0, sizeof *o);
    for (int i = 0; i < FED; i++) fed[i] = (i * i + 7) % 200 % m->config.vocab_size;
    code |= medrun_feed(s, fed, FED, NULL);
    for (int i = 0; i < ANSWER; i++) code |= medrun_next(s, &id, &text, &n, NULL), o->n_text += n;
    code |= medrun_rewind(s, FED + ANSWER / 2, NULL);
    medrun_observe(s, see_stage, &stages);
    while (medrun_length(s) < FED + ANSWER) {
        while (medrun_pending(s)) code |= medrun_step(&s, 1, NULL);
        code |= medrun_sample(s, &id, NULL);
        code |= medrun_feed(s, &id, 1, NULL);
    }
    while (medrun_pending(s)) code |= medrun_step(&s, 1, NULL);
    medrun_observe(s, NULL, NULL);
    memcpy(o->ids, medrun_tokens(s), sizeof o->ids);
    sha256_of((const uint8_t *)medrun_logits(s, 0), (size_t)m->config.vocab_size * 4, o->logits);
    return !code && stages > 0;
}

static const medrun_session_options all_options[] = {
    {.context = 2 * (FED + ANSWER), .batch = 16},
    {.context = FED + ANSWER, .batch = 1, .kv = MEDRUN_KV_INT8},
    {.context = FED + ANSWER, .batch = 33, .kv = MEDRUN_KV_F32, .strict = true, .logit_rows = 5},
    {.context = FED + ANSWER + 1, .lookup = 12, .kv = MEDRUN_KV_INT8, .logit_rows = 3},
    {.context = FED + ANSWER + 7, .batch = 9, .lookup = 31, .custom_sampling = true,
     .sampling = {.temperature = 0.8f, .top_k = 20, .top_p = 0.9f, .min_p = 0.05f,
                  .repeat_penalty = 1.1f, .seed = 5}}};
enum { N_OPTIONS_TRIED = sizeof all_options / sizeof *all_options };

/* N bytes, zero, a multiple of 64, between two pages that nobody may touch: flush with the first or
 * with the second, as LATE says; what is left of their pages is 0xA5. */
typedef struct {
    uint8_t *map, *at;
    size_t whole, n;
} fenced;

static fenced new_fenced(size_t n, bool late) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = round_up(n, page);
    fenced f = {.n = n, .whole = room + 2 * page};
    f.map = mmap(NULL, f.whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f.map == MAP_FAILED || mprotect(f.map + page, room, PROT_READ | PROT_WRITE)) abort();
    f.at = f.map + page + (late ? room - n : 0);
    memset(f.map + page, 0xA5, room);
    memset(f.at, 0, n);
    return f;
}

static bool intact(const fenced *f) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (const uint8_t *p = f->map + page; p < f->map + f->whole - page; p++)
        if ((p < f->at || p >= f->at + f->n) && *p != 0xA5) return false;
    return true;
}

/* A session in memory of exactly medrun_session_bytes answers as one in its own, while there is no
 * other memory; with 64 bytes less, or one, there is no session. */
static void test_memory(const char *name, int threads) {
    medrun_model *m = open_model(name, threads, NULL);
    int wrong = 0;
    for (size_t i = 0; m && i < 2 * N_OPTIONS_TRIED; i++) {
        const medrun_session_options *o = &all_options[i / 2];
        medrun_session *own, *s;
        outcome wanted, found;
        size_t n = medrun_session_bytes(m, o);
        fenced f = new_fenced(n, i % 2);
        wrong += medrun_start(&own, m, o, NULL, 0, NULL) || !use(own, &wanted);
        wrong += medrun_start(&s, m, o, f.at, n - 1, NULL) != MEDRUN_USAGE || s;
        wrong += medrun_start(&s, m, o, f.at, n - 64, NULL) != MEDRUN_USAGE || s;
        wrong += f.at[0] || memcmp(f.at, f.at + 1, n - 1);     /* all zero, still                 */
        atomic_store(&asked, 0), atomic_store(&refuse, true);
        wrong += medrun_start(&s, m, o, f.at, n, NULL) != MEDRUN_OK || !use(s, &found);
        medrun_stop(s);
        atomic_store(&refuse, false);
        if (atomic_load(&asked)) wrong++, printf("    %ld requests\n", atomic_load(&asked));
        wrong += memcmp(&wanted, &found, sizeof wanted) || !intact(&f);
        medrun_stop(own);
        munmap(f.map, f.whole);
    }
    if (!CHECK(m && !wrong)) printf("    %s, %d threads: %d wrong\n", name, threads, wrong);
    medrun_close(m);
}

/* A turn is rendered outside of the session: without memory it is refused, and nothing was said. */
static void test_say(void) {
    medrun_model *m = open_model("llama-grouped-int8", 2, NULL);
    medrun_session *s = NULL;
    medrun_error e = {0};
    if (!CHECK(m && !medrun_start(&s, m, &all_options[0], NULL, 0, NULL))) return medrun_close(m);
    atomic_store(&asked, 0), atomic_store(&refuse, true);
    int code = medrun_say(s, "user", "pain", 4, &e);
    atomic_store(&refuse, false);
    CHECK_EQ(code, MEDRUN_NO_MEMORY);
    CHECK(e.text[0] && atomic_load(&asked) > 0);
    CHECK_EQ(medrun_length(s), 0);
    CHECK(!medrun_say(s, "user", "pain", 4, NULL));
    CHECK(medrun_length(s) > 0);
    medrun_stop(s), medrun_close(m);
}

/* ---- stack --------------------------------------------------------------------------------- */

enum { PAINTED = 1 << 20, STACK_BOUND = 32 << 10 };

typedef struct {
    const char *name, *kernels;
    bool good;
} stack_job;

/* N levels of OPEN, CORE, as many of CLOSE. */
static void nest(buffer *b, int n, const char *open, const char *core, const char *close) {
    for (int i = 0; i < n; i++) buffer_text(b, open);
    buffer_text(b, core);
    for (int i = 0; i < n; i++) buffer_text(b, close);
}

/* Functions and a call as deep as JSON may be, which tool_calls.c goes through level by level, and
 * the conversation by the API. */
static bool use_text(const medrun_model *m) {
    const char *name = m->config.qk_norm ? "apertus" : "llama3.1";
    buffer tools = {0}, asks = {0};
    int32_t ids[8];
    char text[64];
    size_t n;
    medrun_error e = {0};
    buffer_text(&tools, "[{\"name\":\"f\",\"description\":\"d\",\"parameters\":");
    nest(&tools, 28, "{\"type\":\"object\",\"properties\":{\"a\":", "{\"type\":\"string\"}", "}}");
    buffer_text(&tools, "}]");
    buffer_text(&asks, "[{\"role\":\"user\",\"content\":\"why?\"},{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":["
                "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"arguments\":");
    nest(&asks, 54, "{\"a\":", "1", "}");
    buffer_text(&asks, "}}]}]");
    json j = {0};
    buffer shown = {0};
    tool_list list = {0};
    int code = tools_text(chat_find(name), (const char *)tools.data, tools.n, &shown, &e);
    if (!code) code = json_parse(&j, (const char *)asks.data, asks.n, &e);
    if (!code) code = tools_messages(chat_find(name), &j, 0, "asks", true, &list, &e);
    medrun_chat_options o = {.tools = (const char *)shown.data, .n_tools = shown.n};
    if (!code) code = medrun_render(m, name, &o, list.m, list.n, false, ids, 8, &n, &e);
    tool_list_free(&list), json_free(&j), buffer_free(&shown);
    if (code) printf("    %s: %s\n", name, e.text);
    buffer_free(&tools), buffer_free(&asks);
    return !code && !medrun_detokenize(m, ids, 8, true, text, sizeof text, &n, NULL);
}

/* The longest message that an error makes, with numbers as long as they get. */
static bool use_error(const medrun_model *m) {
    medrun_session *s;
    medrun_session_options wrong = {.custom_sampling = true, .sampling = {.temperature = -1e30f}};
    medrun_error e = {0};
    return medrun_start(&s, m, &wrong, NULL, 0, &e) == MEDRUN_USAGE;
}

static void *use_all(void *context) {
    stack_job *j = context;
    char path[1200];
    static outcome o;
    medrun_model *m = open_model(j->name, 1, j->kernels);
    medrun_session *s;
    size_t n;
    snprintf(path, sizeof path, "%s/embedding.state", folder);
    j->good = m != NULL;
    for (size_t i = 0; m && i < N_OPTIONS_TRIED; i++) {
        int code = medrun_start(&s, m, &all_options[i], NULL, 0, NULL);
        if (code) { j->good = false; break; }
        j->good &= use(s, &o) && !medrun_save(s, path, NULL) && !medrun_restore(s, path, NULL);
        j->good &= !medrun_feed_saved(s, o.ids, FED, path, &n, NULL);
        j->good &= medrun_feed_saved(s, o.ids, FED, folder, &n, NULL) == MEDRUN_BAD_FILE;
        j->good &= !medrun_say(s, "user", "a headache, 12 days", 19, NULL);
        medrun_stop(s);
    }
    if (m) j->good &= use_text(m) && use_error(m);
    medrun_close(m);
    remove(path);
    return NULL;
}

/* Bytes of stack that the calls of an embedder's thread have written. */
static size_t stack_of(stack_job *j) {
    uint8_t *stack = map_bytes(-1, PAINTED);
    pthread_attr_t attributes;
    pthread_t thread;
    size_t clean = 0;
    memset(stack, 0xA5, PAINTED);
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, stack, PAINTED);
    if (pthread_create(&thread, &attributes, use_all, j)) abort();
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attributes);
    while (clean < PAINTED && stack[clean] == 0xA5) clean++;
    munmap(stack, PAINTED);
    return PAINTED - clean;
}

/* With what the system keeps at a stack's end. Other compilers' options take more. */
static void test_stack(void) {
#if defined __OPTIMIZE__ && !SANITIZED
    static const char *const names[] = {"llama-grouped-int8", "apertus-grouped-int4",
                                        "llama-plain-bf16"};
    const kernel_set *sets[N_KERNEL_SETS];
    for (size_t i = 0; i < 3; i++)
        for (int k = 0, n = usable_kernels(sets); k < n; k++) {
            stack_job j = {names[i], sets[k]->name, false};
            size_t bytes = stack_of(&j);
            if (!CHECK(j.good) || !CHECK(bytes > 2000 && bytes <= STACK_BOUND))
                printf("    %s, %s: %zu bytes of stack\n", j.name, j.kernels, bytes);
        }
#else
    SKIP("the bound of the stack is for optimized code without sanitizers");
    (void)stack_of;
#endif
}

int main(void) {
    const char *build = getenv("MEDRUN_TEST_BUILD");
    snprintf(folder, sizeof folder, "%s", build ? build : "build");
    if (SANITIZED) SKIP("requests for memory by libc itself are not seen here, medrun's own are");
    test_memory("llama-grouped-int8", 1);
    test_memory("llama-grouped-int8", 3);
    test_memory("mistral-window-int4", 2);
    test_memory("apertus-grouped-bf16", 2);
    test_memory("arcee-yarn-bf16", 1);
    test_say();
    test_stack();
    return report();
}
