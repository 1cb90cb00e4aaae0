/* Memory that runs out: every allocation of an operation, and every start of a thread, fails once,
 * the first, the second, and so on. Each failure must come back as an error and leave nothing
 * behind: no memory, no open file, no thread. The model is argv[1], MEDRUN_TEST_MODEL or one of
 * the build's. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

static long allocation_calls, fail_at;          /* fail_at 0: none fails                         */
static atomic_long blocks;                      /* given out and not yet freed                   */

static void *test_alloc(void *p, size_t n) {
    if (++allocation_calls == fail_at) return NULL;
    void *fresh = realloc(p, n);
    if (fresh && !p) atomic_fetch_add(&blocks, 1);
    return fresh;
}

static void test_free(void *p) {
    if (p) atomic_fetch_sub(&blocks, 1);
    free(p);
}

/* A thread is something that may not be had either. */
static int test_create(pthread_t *id, const pthread_attr_t *a, void *(*run)(void *), void *context) {
    return ++allocation_calls == fail_at ? EAGAIN : pthread_create(id, a, run, context);
}

#define MEDRUN_ALLOC test_alloc
#define free test_free
#define pthread_create test_create
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#undef free
#undef pthread_create
#include "../tools/write.c"
#include "test.h"

static medrun_model *model;                     /* opened while nothing fails                    */
static char model_path[1024], state_path[1100];

static int count_entries(const char *folder) {
#ifdef _WIN32
    return (void)folder, 0;                     /* under Wine this would be the emulator's       */
#endif
    DIR *dir = opendir(folder);
    int n = 0;
    while (dir && readdir(dir)) n++;
    if (dir) closedir(dir);
    return n;
}

/* A thread that was joined may stand in the list for a moment longer. */
static bool tasks_back_to(int wanted) {
    for (int i = 0; i < 500 && count_entries("/proc/self/task") != wanted; i++) usleep(1000);
    return count_entries("/proc/self/task") == wanted;
}

/* An operation gives its code and keeps nothing. */
typedef int operation(medrun_error *e);

static void fail_each(const char *name, operation *run, long at_least) {
    int wrong = run(&(medrun_error){0}), leaks = 0;     /* once as it should be: libraries settle        */
    int files = count_entries("/proc/self/fd"), tasks = count_entries("/proc/self/task");
    long before = atomic_load(&blocks), n = 1;
    for (;; n++) {
        medrun_error e = {0};
        allocation_calls = 0, fail_at = n;
        int code = run(&e);
        bool failed = allocation_calls >= n;
        fail_at = 0;
        leaks += atomic_load(&blocks) != before || count_entries("/proc/self/fd") != files ||
                 !tasks_back_to(tasks);
        wrong += code != e.code || (code != MEDRUN_OK) != failed || (code && !e.text[0]);
        if (wrong == 1 && code != e.code) printf("    code %d, recorded %d\n", code, e.code);
        if (!failed || n > 5000) break;
    }
    bool right = CHECK_EQ(wrong, 0), clean = CHECK_EQ(leaks, 0);
    if (!CHECK(n > at_least && n <= 5000) || !right || !clean)
        printf("    %s, %ld allocations\n", name, n - 1);
}

/* ---- without a model ----------------------------------------------------------------------- */

static int run_array(medrun_error *e) {
    void *p = new_array(10, 10), *empty = new_array(0, 8);
    int code = p && empty ? MEDRUN_OK : out_of_memory(e, 100);
    test_free(p), test_free(empty);
    return code;
}

static int run_buffer(medrun_error *e) {
    buffer b = {0};
    for (int i = 0; i < 3000; i++) {
        buffer_text(&b, "some text");
        buffer_printf(&b, "%*d", i % 400, i);
        write_le(&b, 7, 4);
    }
    int code = b.failed ? out_of_memory(e, b.n) : MEDRUN_OK;
    buffer_free(&b);
    return code;
}

/* A text of many nodes, so that their array grows a few times. */
static int run_json(medrun_error *e) {
    char text[4000] = "[";
    json j;
    while (strlen(text) < 3900) strcat(text, "{\"a\":[1,2]},");
    strcat(text, "0]");
    int code = json_parse(&j, text, strlen(text), e);
    CHECK(code == MEDRUN_OK || code == MEDRUN_NO_MEMORY);
    json_free(&j);
    return code;
}

/* Reading fields: what cannot be read for want of memory may count as missing, but never as read. */
static int run_fields(medrun_error *e) {
    static const char text[] = "{\"n\":3,\"k\\u0065y\":\"v\\u0061lue\"}";
    char value[16] = "";
    json j;
    int code = json_parse(&j, text, strlen(text), e);
    if (!code) json_text(&j, 0, "file", "key", value, sizeof value, e);
    if (!code) json_int(&j, 0, "file", "n", 0, 9, e);
    CHECK(code || e->code || !strcmp(value, "value"));
    json_free(&j);
    return e->code;
}

/* Want of memory is called by its name, and is not the file's fault. */
static int run_text(medrun_error *e) {
    static const char text[] = "{\"key\":\"v\\u0061lue\"}";
    char value[16];
    json j;
    int code = json_parse(&j, text, strlen(text), e);
    if (!code) code = json_text(&j, 0, "file", "key", value, sizeof value, e);
    CHECK(!code || code == MEDRUN_NO_MEMORY);
    json_free(&j);
    return code;
}

static int run_quote(medrun_error *e) {
    buffer b = {0};
    for (int i = 0; i < 50; i++) json_quote(&b, "\"quoted\"\n \xFF", 12);
    int code = b.failed ? out_of_memory(e, b.n) : MEDRUN_OK;
    buffer_free(&b);
    return code;
}

static int run_pool(medrun_error *e) {
    thread_pool p;
    int code = pool_start(&p, 7, e);
    if (code) CHECK(p.started == 0 && p.threads == 0);
    else pool_stop(&p);
    return code;
}

/* ---- with one ------------------------------------------------------------------------------ */

static int run_open(medrun_error *e) {
    medrun_model *m = (void *)&m;
    int code = medrun_open(&m, model_path, &(medrun_options){.threads = 3}, e);
    CHECK((code == MEDRUN_OK) == (m != NULL));
    medrun_close(m);
    return code;
}

static const char long_text[] = "antidisestablishmentarianism-pneumonoultramicroscopicsilicovolcanoco"
                                "niosis, " "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
                                "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

static int run_tokenize(medrun_error *e) {
    int32_t ids[1000];
    size_t n = 99;
    int code = medrun_tokenize(model, long_text, strlen(long_text), MEDRUN_ADD_BOS, ids, 1000, &n, e);
    CHECK((code == MEDRUN_OK) == (n > 0));
    return code;
}

static int run_detokenize(medrun_error *e) {
    int32_t ids[400];
    char bytes[4000];
    size_t n = 99;
    for (int i = 0; i < 400; i++) ids[i] = i % model->config.vocab_size;
    int code = medrun_detokenize(model, ids, 400, true, bytes, sizeof bytes, &n, e);
    CHECK((code == MEDRUN_OK) == (n > 0));
    return code;
}

static int run_render(medrun_error *e) {
    const medrun_message m[] = {{"system", "be brief", 8}, {"user", long_text, strlen(long_text)},
                                {"assistant", "yes", 3}, {"user", "why", 3}};
    size_t n = 99;
    int code = medrun_render(model, NULL, NULL, m, 4, true, NULL, 0, &n, e);
    CHECK((code == MEDRUN_OK) == (n > 0));
    return code;
}

/* A whole conversation. A session's own memory is mapped at once, and its steps allocate nothing:
 * what fails is turns, and saving and restoring. */
static int run_session(medrun_error *e) {
    medrun_session *s;
    const char *text;
    size_t n;
    int32_t id;
    int code = medrun_start(&s, model, &(medrun_session_options){.context = 400, .lookup = 8}, NULL,
                            0, e);
    if (code) return code;
    code = medrun_say(s, "user", long_text, strlen(long_text), e);
    size_t length = medrun_length(s);
    CHECK((code == MEDRUN_OK) == (length > 0));         /* all of the turn or nothing            */
    long calls = allocation_calls;
    for (int i = 0; !code && i < 9; i++) code = medrun_next(s, &id, &text, &n, e);
    CHECK_EQ(allocation_calls, calls);
    if (!code) code = medrun_save(s, state_path, e);
    if (!code) code = medrun_restore(s, state_path, e);
    CHECK(code || medrun_length(s) == length + 9);
    int32_t ids[20];
    memcpy(ids, medrun_tokens(s), sizeof ids);
    if (!code) code = medrun_feed_saved(s, ids, 20, state_path, &n, e);
    CHECK(code || n == 16);
    medrun_stop(s);
    remove(state_path);
    return code;
}

int main(int argc, char **argv) {
    const char *build = getenv("MEDRUN_TEST_BUILD"), *given = getenv("MEDRUN_TEST_MODEL");
    medrun_error e = {0};
    if (argc > 1) given = argv[1];
    if (given) snprintf(model_path, sizeof model_path, "%s", given);
    else snprintf(model_path, sizeof model_path, "%s/llama-grouped-int8.mdr", build ? build : "build");
    snprintf(state_path, sizeof state_path, "%s.%d.session", build ? model_path : "/tmp/medrun",
             (int)getpid());

    fail_each("new_array", run_array, 2);
    fail_each("buffer", run_buffer, 8);
    fail_each("json_parse", run_json, 3);
    fail_each("json fields", run_fields, 2);
    fail_each("json text", run_text, 1);
    fail_each("json_quote", run_quote, 3);
    fail_each("pool_start", run_pool, 6);
    if (access(model_path, R_OK)) {
        SKIP("no checkpoint to open: build/llama-grouped-int8.mdr is made by `make test`");
        return report();
    }
    fail_each("medrun_open", run_open, 10);
    if (CHECK_EQ(medrun_open(&model, model_path, &(medrun_options){.threads = 2}, &e), MEDRUN_OK)) {
        while (!atomic_load(&model->pool->idle.asleep)) sched_yield();    /* the worker is settled */
        fail_each("medrun_tokenize", run_tokenize, 1);
        fail_each("medrun_detokenize", run_detokenize, 2);
        fail_each("medrun_render", run_render, 3);
        fail_each("session", run_session, 5);
    } else {
        printf("    %s\n", e.text);
    }
    medrun_close(model);
    CHECK_EQ(atomic_load(&blocks), 0);
    return report();
}
