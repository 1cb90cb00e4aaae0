/* Sessions: memory to the byte, feeding, rewinding, saving and restoring, text as it streams,
 * guessing ahead, and what a caller does wrong. */
#define _GNU_SOURCE
#include <stdint.h>
#ifndef _WIN32
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif
#include <time.h>

/* How far medrun guesses depends on how long its passes take. Here that is 1 to LONGEST_TICK ms,
 * by chance: with 1 a wide pass costs nothing, so that it guesses as far as it may. */
static uint64_t longest_tick = 1, test_time, tick_state = 1;

static int test_clock(clockid_t id, struct timespec *t) {
    (void)id;
    tick_state = tick_state * 6364136223846793005u + 1442695040888963407u;
    if (longest_tick) test_time += 1 + (tick_state >> 33) % longest_tick;
    *t = (struct timespec){(time_t)(test_time / 1000), (long)(test_time % 1000 * 1000000)};
    return 0;
}

#define clock_gettime test_clock
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"

static medrun_model *model;
static char path[256], other_path[256];

enum { N_KINDS = 4 };

static const medrun_sampling kinds[N_KINDS] = {
    {0, 0, 1, 0, 1, 0}, {0, 0, 1, 0, 1.02f, 0}, {0.3f, 0, 0.9f, 0, 1, 3}, {0.2f, 20, 1, 0, 1.01f, 4}};

static medrun_session *start(medrun_session_options o) {
    medrun_session *s = NULL;
    medrun_error e = {0};
    if (medrun_start(&s, model, &o, NULL, 0, &e)) { printf("%s\n", e.text); exit(1); }
    return s;
}

static void step_all(medrun_session *s) {
    while (medrun_pending(s)) CHECK(!medrun_step(&s, 1, NULL));
}

static bool same_logits(const medrun_session *a, const medrun_session *b) {
    const float *x = medrun_logits(a, 0), *y = medrun_logits(b, 0);
    return x && y && !memcmp(x, y, (size_t)model->config.vocab_size * sizeof(float));
}

static void ids_of(int32_t *ids, size_t n) {
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(test_random() % 250);
}

/* A session entirely in the caller's memory, which is exactly as long as was said. */
static void test_memory(int kv, int guesses) {
    medrun_session_options o = {.context = 100, .batch = 20, .kv = kv, .lookup = guesses};
    size_t n = medrun_session_bytes(model, &o);
    CHECK(n > 0 && n % 64 == 0);
    if (guesses) {                              /* a row of logits for each guess                */
        medrun_session_options none = {.context = 100, .batch = 20, .kv = kv};
        size_t rows = (size_t)(guesses < 19 ? guesses : 19);
        CHECK_EQ(n - medrun_session_bytes(model, &none), rows * 272 * 4);
    }
    uint8_t *block = calloc(1, n + 192), *at = block + (64 - (uintptr_t)block % 64);
    memset(at + n, 0xA5, 64);
    medrun_session *s;
    medrun_error e = {0};
    CHECK_EQ(medrun_start(&s, model, &o, at, n - 1, &e), MEDRUN_USAGE);
    CHECK(s == NULL && e.text[0]);
    CHECK_EQ(medrun_start(&s, model, &o, at + 4, n, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_start(&s, model, &o, at, n, NULL), MEDRUN_OK);
    int32_t ids[100], id;
    const char *text;
    size_t bytes;
    ids_of(ids, 100);
    CHECK(!medrun_feed(s, ids, 60, NULL));
    while (medrun_length(s) < 100) CHECK(!medrun_next(s, &id, &text, &bytes, NULL));
    CHECK(!medrun_rewind(s, 0, NULL));
    CHECK(!medrun_feed(s, ids, 100, NULL));
    step_all(s);
    medrun_session *mapped = start(o);
    CHECK(!medrun_feed(mapped, ids, 100, NULL));
    step_all(mapped);
    CHECK(same_logits(s, mapped));
    for (int i = 0; i < 64; i++) CHECK(at[n + (size_t)i] == 0xA5);
    medrun_stop(s), medrun_stop(mapped);
    free(block);
}

/* An int8 cache takes 1 byte a number and 2 a group of 64, f16 and f32 take 2 and 4. */
static void test_cache_size(void) {
    const model_config *c = &model->config;
    size_t bytes[3], dim = (size_t)c->head_dim, heads = (size_t)(c->n_layers * c->n_kv_heads);
    for (int kv = 0; kv < 3; kv++) {
        medrun_session_options o = {.context = 128, .kv = kv};
        bytes[kv] = medrun_session_bytes(model, &o);
    }
    CHECK_EQ(bytes[MEDRUN_KV_F32] - bytes[MEDRUN_KV_F16], 2 * 128 * heads * dim * 2);
    CHECK_EQ(bytes[MEDRUN_KV_F16] - bytes[MEDRUN_KV_INT8],
             2 * 128 * heads * (dim - (dim + 63) / 64 * 2));
}

/* Sizes past 4 GiB come out right, and are refused, where a program has 32 bits, too. */
static void test_large_size(void) {
    medrun_model large = *model;
    model_config *c = &large.config;
    c->n_layers = 80, c->n_heads = 64, c->n_kv_heads = 8, c->head_dim = 128;
    c->hidden_size = 8192, c->ffn_size = 28672, c->max_positions = 1 << 17;
    const medrun_session_options o = {.batch = 1 << 17};
    uint64_t cache = 2ull * 80 * 8 * 128 * 2 << 17;
    uint64_t rows = 4ull * (2 * 8192 + 2 * 28672) << 17;
    uint64_t need = session_needs(&large, &o);
    CHECK(need > cache + rows && need < (cache + rows) * 2);
    CHECK_EQ(medrun_session_bytes(&large, &o), need > SIZE_MAX ? SIZE_MAX : need);
    medrun_session *s;
    if (need > SIZE_MAX) CHECK_EQ(medrun_start(&s, &large, &o, NULL, 0, NULL), MEDRUN_NO_MEMORY);
}

static void test_wrong_use(void) {
    medrun_error e = {0};
    medrun_session *s;
    medrun_session_options bad[] = {
        {.context = -1}, {.context = 1 << 30}, {.batch = -1}, {.logit_rows = -1}, {.kv = 7},
        {.lookup = -1}, {.lookup = 32}, {.lookup = 10000},
        {.custom_sampling = true},                                          /* top_p is fine at 0 */
        {.custom_sampling = true, .sampling = {.temperature = NAN, .repeat_penalty = 1}},
        {.custom_sampling = true, .sampling = {.top_p = 2, .repeat_penalty = 1}},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_EQ(medrun_start(&s, model, &bad[i], NULL, 0, NULL), MEDRUN_USAGE);
        CHECK_EQ(medrun_session_bytes(model, &bad[i]), 0);
    }
    s = start((medrun_session_options){.context = 8});
    int32_t ids[9] = {0}, id;
    CHECK_EQ(medrun_feed(s, ids, 9, &e), MEDRUN_TOO_LONG);
    CHECK_EQ(medrun_length(s), 0);
    CHECK(strstr(e.text, "9") && strstr(e.text, "8"));
    ids[1] = model->config.vocab_size;
    CHECK_EQ(medrun_feed(s, ids, 2, NULL), MEDRUN_USAGE);
    ids[1] = -1;
    CHECK_EQ(medrun_feed(s, ids, 2, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_length(s), 0);
    CHECK(medrun_logits(s, 0) == NULL);
    CHECK_EQ(medrun_sample(s, &id, NULL), MEDRUN_USAGE);        /* nothing was ever processed    */
    CHECK_EQ(medrun_rewind(s, 1, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_say(s, "wizard", "hello", 5, NULL), MEDRUN_USAGE);
    medrun_error why = {0};
    CHECK_EQ(medrun_say(s, NULL, "hello", 5, &why), MEDRUN_USAGE);
    CHECK(strstr(why.text, "role") && medrun_length(s) == 0);
    CHECK_EQ(medrun_say(s, "assistant/thoughts", "hello", 5, NULL), MEDRUN_USAGE);
    size_t n_ids;
    CHECK_EQ(medrun_render(model, NULL, NULL, &(medrun_message){NULL, "hello", 5}, 1, true, NULL, 0,
                           &n_ids, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_render(model, NULL, NULL, NULL, 0, true, NULL, 0, &n_ids, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_length(s), 0);
    medrun_session *twice[2] = {s, s};
    CHECK_EQ(medrun_step(twice, 2, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_step(twice, 0, NULL), MEDRUN_OK);
    CHECK_EQ(medrun_step(twice, 1, NULL), MEDRUN_OK);           /* nothing pending               */
    medrun_stop(s);
    medrun_stop(NULL);
    medrun_close(NULL);
    medrun_model *none;
    CHECK_EQ(medrun_open(&none, "tests/no-such-file", NULL, &e), MEDRUN_BAD_FILE);
    CHECK(none == NULL);
    CHECK_EQ(medrun_open(&none, path, &(medrun_options){.threads = -1}, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_open(&none, path, &(medrun_options){.kernels = "abacus"}, NULL), MEDRUN_USAGE);
}

/* Each call begins with no error, keeps its own first one, and needs no place for it. */
static void test_errors(void) {
    medrun_session *s = start((medrun_session_options){.context = 40});
    int32_t ids[50] = {1, 2, 3}, id = 0;
    size_t n;
    medrun_error e = {MEDRUN_FAILED, "an old failure"};
    CHECK_EQ(medrun_feed(s, ids, 3, &e), MEDRUN_OK);
    CHECK(!e.code && !e.text[0]);
    CHECK_EQ(medrun_sample(s, &id, &e), MEDRUN_USAGE);
    CHECK(e.code == MEDRUN_USAGE && strstr(e.text, "pending"));
    CHECK_EQ(medrun_feed(s, ids, 50, &e), MEDRUN_TOO_LONG);     /* not the error before it       */
    CHECK(e.code == MEDRUN_TOO_LONG && strstr(e.text, "do not fit"));
    CHECK_EQ(medrun_step(&s, 1, &e), MEDRUN_OK);
    CHECK(!e.code && !e.text[0]);
    CHECK_EQ(medrun_rewind(s, 9, &e), MEDRUN_USAGE);
    CHECK(e.code == MEDRUN_USAGE && strstr(e.text, "rewind to 9"));
    CHECK_EQ(medrun_tokenize(model, "hello", 5, 0, ids, 50, &n, &e), MEDRUN_OK);
    CHECK(!e.code && n > 0);
    static const int unknown[] = {4, 1 << 8, -1, 1 << 30 | 1};
    for (size_t i = 0; i < 4; i++) {                    /* some are those of the inner functions */
        n = 77;
        CHECK_EQ(medrun_tokenize(model, "hello", 5, unknown[i], ids, 50, &n, &e), MEDRUN_USAGE);
        CHECK(n == 0 && strstr(e.text, "flags"));
        CHECK_EQ(medrun_tokenize(model, "hello", 5, unknown[i], ids, 50, &n, NULL), MEDRUN_USAGE);
    }
    CHECK_EQ(medrun_rewind(s, 0, NULL), MEDRUN_OK);
    CHECK_EQ(medrun_say(s, NULL, "hello", 5, &e), MEDRUN_USAGE);
    CHECK(strstr(e.text, "role") && medrun_length(s) == 0);
    CHECK_EQ(medrun_say(s, NULL, "hello", 5, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_detokenize(model, (int32_t[]){-1}, 1, false, NULL, 0, &n, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_sample(s, &id, NULL), MEDRUN_USAGE);
    medrun_stop(s);
    /* the environment is the commands' */
    medrun_model *m;
    medrun_info here, there;
    setenv("MEDRUN_KERNELS", "abacus", 1);
    if (CHECK_EQ(medrun_open(&m, path, NULL, &e), MEDRUN_OK)) {
        medrun_describe(model, &here), medrun_describe(m, &there);
        CHECK(!strcmp(here.kernels, there.kernels));
        medrun_close(m);
    }
    unsetenv("MEDRUN_KERNELS");
}

/* A turn that cannot be said leaves the timeline and its logits as they were. */
static void test_say_nothing(void) {
    static char text[400];
    memset(text, 'x', sizeof text);
    medrun_session *s = start((medrun_session_options){.context = 200, .lookup = 4});
    medrun_error e;
    int32_t id = 0, stop = model->stops[0];
    const char *piece;
    size_t n;
    CHECK(!medrun_say(s, "user", "hello", 5, &e));
    for (int i = 0; i < 3; i++) CHECK(!medrun_next(s, &id, &piece, &n, &e));
    CHECK(!medrun_feed(s, &stop, 1, &e));
    step_all(s);
    size_t length = medrun_length(s);
    const float *logits = medrun_logits(s, 0);
    CHECK(logits != NULL);
    CHECK_EQ(medrun_say(s, "user", text, sizeof text, &e), MEDRUN_TOO_LONG);
    CHECK_EQ(medrun_say(s, "wizard", "hello", 5, &e), MEDRUN_USAGE);
    CHECK_EQ(medrun_say(s, NULL, "hello", 5, &e), MEDRUN_USAGE);
    CHECK(medrun_length(s) == length && medrun_tokens(s)[length - 1] == stop);
    CHECK(medrun_logits(s, 0) == logits && s->answer_open);
    medrun_stop(s);
}

/* Going back and feeding again is the same as never having gone there. */
static void test_rewind(int kv) {
    int32_t ids[60];
    ids_of(ids, 60);
    medrun_session *a = start((medrun_session_options){.context = 64, .batch = 16, .kv = kv});
    medrun_session *b = start((medrun_session_options){.context = 64, .kv = kv});
    CHECK(!medrun_feed(a, ids + 10, 50, NULL));
    step_all(a);
    for (size_t keep = 0; keep < 60; keep += 7) {
        CHECK(!medrun_rewind(a, 0, NULL) && !medrun_feed(a, ids, 60, NULL));
        step_all(a);
        CHECK(!medrun_rewind(a, keep, NULL));
        CHECK_EQ(medrun_length(a), keep);
        CHECK(medrun_logits(a, 0) == NULL);
        if (keep) {
            step_all(a);
            CHECK(!medrun_rewind(b, 0, NULL) && !medrun_feed(b, ids, keep, NULL));
            step_all(b);
            CHECK(same_logits(a, b));
        }
        CHECK(!medrun_feed(a, ids + keep, 60 - keep, NULL));
        CHECK(!medrun_rewind(b, 0, NULL) && !medrun_feed(b, ids, 60, NULL));
        step_all(a), step_all(b);
        CHECK(same_logits(a, b));
    }
    medrun_stop(a), medrun_stop(b);
}

static void write_file(const char *file, const uint8_t *bytes, size_t n) {
    FILE *f = fopen(file, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f)) exit(1);
}

static void test_save(void) {
    char file[300];
    snprintf(file, sizeof file, "%s/session.state", getenv("MEDRUN_TEST_BUILD"));
    int32_t ids[50], x, y;
    ids_of(ids, 50);
    medrun_sampling hot = {1.0f, 0, 1, 0, 1, 7};
    for (int run = 0; run < 6; run++) {
        int kv = (run / 2 + 1) % 3, pending = run % 2;          /* f16 is the last               */
        medrun_session *a = start((medrun_session_options){.context = 64, .custom_sampling = true,
                                                           .sampling = hot, .kv = kv});
        medrun_session *b = start((medrun_session_options){.context = 200, .batch = 5, .kv = kv,
                                                           .custom_sampling = true,
                                                           .sampling = hot});
        CHECK(!medrun_feed(a, ids, 40, NULL));
        step_all(a);
        CHECK(!medrun_sample(a, &x, NULL));                     /* moves the random state        */
        CHECK(!medrun_feed(a, ids + 40, 7, NULL));
        if (!pending) step_all(a);
        CHECK_EQ(medrun_save(a, file, NULL), MEDRUN_OK);
        CHECK(!medrun_feed(b, ids, 50, NULL));                  /* what it forgets               */
        step_all(b);
        CHECK_EQ(medrun_restore(b, file, NULL), MEDRUN_OK);
        CHECK_EQ(medrun_length(b), 47);
        CHECK(!memcmp(medrun_tokens(b), ids, 47 * sizeof *ids));
        for (int i = 0; i < 10; i++) {
            step_all(a), step_all(b);
            CHECK(same_logits(a, b));
            CHECK(!medrun_sample(a, &x, NULL) && !medrun_sample(b, &y, NULL));
            CHECK_EQ(x, y);
            CHECK(!medrun_feed(a, &x, 1, NULL) && !medrun_feed(b, &y, 1, NULL));
        }
        medrun_stop(a), medrun_stop(b);
    }
    /* every cut and a flip in every 97th byte are refused and leave the session empty */
    file_map map;
    CHECK(!map_file(file, &map, NULL));
    uint8_t *copy = malloc(map.n);
    memcpy(copy, map.data, map.n);
    size_t n = map.n;
    unmap_file(&map);
    medrun_session *s = start((medrun_session_options){.context = 64});
    int accepted = 0;
    for (size_t i = 0; i < 2 * n; i += i < 120 || (i >= n && i < n + 120) ? 1 : 977) {
        size_t keep = i < n ? i : n;
        if (i >= n) copy[i - n] ^= 4;
        write_file(file, copy, keep);
        if (i >= n) copy[i - n] ^= 4;
        medrun_error e = {0};
        int code = medrun_restore(s, file, &e);
        accepted += code != MEDRUN_BAD_FILE && code != MEDRUN_TOO_LONG;
        accepted += medrun_length(s) != 0 || !e.text[0];
    }
    CHECK_EQ(accepted, 0);
    /* another context that is too short, another checkpoint, another kv */
    write_file(file, copy, n);
    medrun_session *tiny = start((medrun_session_options){.context = 46});
    medrun_session *wide = start((medrun_session_options){.context = 64, .kv = MEDRUN_KV_F32});
    medrun_session *small = start((medrun_session_options){.context = 64, .kv = MEDRUN_KV_INT8});
    CHECK_EQ(medrun_restore(tiny, file, NULL), MEDRUN_TOO_LONG);
    CHECK_EQ(medrun_restore(wide, file, NULL), MEDRUN_BAD_FILE);
    CHECK_EQ(medrun_restore(small, file, NULL), MEDRUN_BAD_FILE);
    CHECK_EQ(medrun_restore(s, file, NULL), MEDRUN_OK);
    CHECK_EQ(medrun_save(s, "/no/such/folder/state", NULL), MEDRUN_FAILED);
    /* a file of the format before is refused in one line, and may be written over; a letter not */
    copy[7] = '3';
    write_file(file, copy, n);
    medrun_error e = {0};
    CHECK_EQ(medrun_restore(s, file, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "not a session or prefix that this medrun can read; save it again"));
    CHECK(!medrun_feed(s, ids, 40, NULL) && !medrun_save(s, file, &e));
    CHECK(!medrun_restore(s, file, &e) && medrun_length(s) == 40);
    copy[0] = 'D';
    write_file(file, copy, n);
    CHECK_EQ(medrun_save(s, file, &e), MEDRUN_USAGE);
    CHECK(strstr(e.text, "exists and is not a saved session"));
    CHECK(!map_file(file, &map, &e) && map.n == n && !memcmp(map.data, copy, n));
    unmap_file(&map);
    medrun_stop(tiny), medrun_stop(wide), medrun_stop(small), medrun_stop(s);
    medrun_model *other;
    CHECK(!medrun_open(&other, other_path, NULL, NULL));
    CHECK(!medrun_start(&s, other, NULL, NULL, 0, NULL));
    CHECK_EQ(medrun_restore(s, file, NULL), MEDRUN_BAD_FILE);
    medrun_stop(s), medrun_close(other);
    remove(file);
    free(copy);
}

/* ---- what a file of a session gives to another ---------------------------------------------- */

enum { SAVED = 300 };

static uint8_t *read_all_of(const char *file, size_t *n) {
    file_map map;
    if (map_file(file, &map, NULL)) exit(1);
    uint8_t *copy = malloc(map.n);
    memcpy(copy, map.data, *n = map.n);
    unmap_file(&map);
    return copy;
}

/* A session of SAVED tokens, the last PENDING of them not processed, in a file. */
static void save_some(const char *file, medrun_session_options o, const int32_t *ids, size_t pending) {
    o.context = SAVED;
    medrun_session *s = start(o);
    CHECK(!medrun_feed(s, ids, SAVED - pending, NULL));
    step_all(s);
    CHECK(!medrun_feed(s, ids + SAVED - pending, pending, NULL));
    medrun_error e = {0};
    if (!CHECK_EQ(medrun_save(s, file, &e), MEDRUN_OK)) printf("    %s\n", e.text);
    medrun_stop(s);
}

/* Of every length of common beginning, in contexts that end within a block and behind it: what was
 * taken and processed further gives the logits of a session that never saw the file. */
static void test_shared(const char *file, medrun_session_options o, size_t pending) {
    static const size_t lengths[] = {0, 1, 2, 15, 16, 17, 100, 127, 128, 129, 200, 255, 256, 257, 292, 300};
    int32_t ids[SAVED + 45], other[SAVED + 40];
    int wrong = 0;
    ids_of(ids, SAVED + 45);
    save_some(file, o, ids, pending);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (size_t more = 0; more < 40; more += 13) {
            size_t shared = lengths[i], n = shared + more, taken = 77;
            if (!n) continue;
            memcpy(other, ids, shared * sizeof *ids);
            for (size_t k = shared; k < n; k++) other[k] = (ids[k] + 1 + (int32_t)k) % 250;
            if (more == 39 && shared == SAVED) other[shared] = ids[shared];     /* past its end  */
            o.context = (int)n + (i % 2 ? 50 : 0), o.batch = i % 3 ? 0 : 7;
            medrun_session *a = start(o), *b = start(o);
            CHECK(!medrun_feed(a, ids + 5, n, NULL));           /* what it forgets               */
            step_all(a);
            uint64_t random = a->random;
            wrong += medrun_feed_saved(a, other, n, file, &taken, NULL);
            size_t done = (shared < SAVED - pending ? shared : SAVED - pending) / 16 * 16;
            wrong += taken != (done < n ? done : n - 1) || medrun_pending(a) != n - taken;
            wrong += medrun_length(a) != n || memcmp(medrun_tokens(a), other, n * sizeof *ids);
            wrong += a->random != random || medrun_logits(a, 0) != NULL;
            CHECK(!medrun_feed(b, other, n, NULL));
            step_all(a), step_all(b);
            wrong += !same_logits(a, b);
            medrun_stop(a), medrun_stop(b);
        }
    CHECK_EQ(wrong, 0);
}

/* Damage where nothing is taken from does not matter; anywhere else the file is refused, with a
 * line that says so, and the session is empty. */
static void test_damage(const char *file) {
    int32_t ids[SAVED];
    size_t n, taken, wrong = 0, refused = 0, head = sizeof(state_head) + 8;
    ids_of(ids, SAVED);
    medrun_session_options o = {.context = SAVED};
    save_some(file, o, ids, 0);
    uint8_t *copy = read_all_of(file, &n);
    medrun_session *s = start(o);
    size_t row = 2 * 2 * 64 * 2 * 2;            /* layers, heads, head_dim, f16, keys and values */
    size_t first = STATE_BLOCK * (4 + row) + 16;        /* with ids and two sums                */
    CHECK_EQ(n, head + SAVED / STATE_BLOCK * first + STATE_BLOCK * 4 + 8);
    size_t step;
    for (size_t i = 0; i < n; i += step) {
        bool ids_here = i >= head && (i - head) % first < 72;   /* with their sum               */
        step = i < head + 40 || n - i < 40 || ids_here ? 1 : i < head + 6 * first ? 61 : 1009;
        medrun_error e = {0};
        copy[i] ^= (uint8_t)(1 << i % 8);
        write_file(file, copy, n);
        copy[i] ^= (uint8_t)(1 << i % 8);
        int code = medrun_feed_saved(s, ids, 100, file, &taken, &e);    /* 6 blocks of 16       */
        bool used = i < head + 6 * first;
        wrong += used ? code != MEDRUN_BAD_FILE || !e.text[0] || medrun_length(s) || taken
                      : code != MEDRUN_OK || taken != 96;
        refused += used;
        wrong += medrun_feed_saved(s, ids, SAVED, file, &taken, NULL) != MEDRUN_BAD_FILE;
        write_file(file, copy, i);                                     /* cut short             */
        wrong += medrun_feed_saved(s, ids, 100, file, &taken, NULL) != MEDRUN_BAD_FILE;
        wrong += medrun_restore(s, file, NULL) != MEDRUN_BAD_FILE || medrun_length(s);
    }
    CHECK_EQ(wrong, 0);
    CHECK(refused > 1500);
    /* too long by a byte; two blocks that changed places */
    uint8_t *longer = malloc(n + 1);
    memcpy(longer, copy, n), longer[n] = 0;
    write_file(file, longer, n + 1);
    CHECK_EQ(medrun_restore(s, file, NULL), MEDRUN_BAD_FILE);
    memcpy(longer + head, copy + head + first, first);
    memcpy(longer + head + first, copy + head, first);
    write_file(file, longer, n);
    CHECK_EQ(medrun_feed_saved(s, ids, 100, file, &taken, NULL), MEDRUN_BAD_FILE);
    write_file(file, copy, n);
    CHECK_EQ(medrun_feed_saved(s, ids, 100, file, &taken, NULL), MEDRUN_OK);
    CHECK_EQ(medrun_feed_saved(s, ids, 0, file, &taken, NULL), MEDRUN_OK);
    CHECK_EQ(taken, 0);
    CHECK_EQ(medrun_feed_saved(s, (int32_t[]){-1}, 1, file, &taken, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_feed_saved(s, (int32_t[SAVED + 1]){0}, SAVED + 1, file, &taken, NULL),
             MEDRUN_TOO_LONG);
    CHECK_EQ(medrun_length(s), 0);
    medrun_stop(s);
    free(copy), free(longer);
}

/* Makes the sums of a file without panels right, whatever else is in it. */
static void make_sums(uint8_t *file, size_t n) {
    uint64_t sum = 0;
    for (size_t at = 0, part = sizeof(state_head); at + part + 8 <= n; at += part + 8, part = 64) {
        sum = add_to_sum(sum, file + at, part);
        memcpy(file + at + part, &sum, 8);
    }
}

/* Files with sums that are right and numbers that are not. */
static void test_forged(const char *file) {
    static const struct { size_t at, n; uint64_t value; } lies[] = {
        {104, 8, 1ull << 62}, {104, 8, UINT64_MAX}, {104, 8, 0}, {112, 8, 301},
        {112, 8, UINT64_MAX}, {112, 8, 1ull << 40}, {112, 8, 16}, {112, 8, 8}, {96, 4, 2}, {96, 4, 77}, {100, 4, 1},
        {100, 4, 1u << 31}, {64, 4, 'x'}, {95, 1, 1},
        {sizeof(state_head) + 8, 4, 269}, {sizeof(state_head) + 12, 4, UINT32_MAX}};
    int32_t ids[SAVED];
    size_t n, head = sizeof(state_head), blocks = (SAVED + 15) / 16;
    int wrong = 0;
    ids_of(ids, SAVED);
    medrun_session_options o = {.context = SAVED};
    save_some(file, o, ids, SAVED);                     /* no cache, so only ids and their sums  */
    uint8_t *copy = read_all_of(file, &n);
    CHECK_EQ(n, head + 8 + blocks * 72);
    uint8_t *before = malloc(n);
    memcpy(before, copy, n);
    make_sums(copy, n);
    CHECK(!memcmp(copy, before, n));
    medrun_session *s = start(o);
    CHECK_EQ(medrun_restore(s, file, NULL), MEDRUN_OK);
    CHECK_EQ(medrun_length(s), SAVED);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        medrun_error e = {0};
        memcpy(copy + lies[i].at, &lies[i].value, lies[i].n);
        make_sums(copy, n);
        write_file(file, copy, n);
        wrong += medrun_restore(s, file, &e) != MEDRUN_BAD_FILE;
        wrong += !e.text[0] || medrun_length(s);
        memcpy(copy, before, n);
    }
    CHECK_EQ(wrong, 0);
    CHECK(!medrun_feed(s, ids, SAVED, NULL));           /* more processed than there is          */
    step_all(s);
    s->n_tokens -= 16;
    CHECK_EQ(medrun_save(s, file, NULL), MEDRUN_OK);
    CHECK_EQ(medrun_restore(s, file, NULL), MEDRUN_BAD_FILE);
    CHECK_EQ(medrun_pending(s), 0);
    medrun_stop(s);
    free(copy), free(before);
}

/* A file holds what the timeline holds and nothing of what was forgotten or only guessed, and no one
 * but its owner can read it, whatever the umask. */
static void test_private(const char *file, int kv) {
    int32_t ids[SAVED], id;
    const char *text;
    size_t n, again, bytes, taken;
    __attribute__((unused)) struct stat st;
    for (int i = 0; i < SAVED; i++) ids[i] = 20 + i % 9;
    medrun_session_options o = {.context = SAVED, .kv = kv, .custom_sampling = true,
                                .sampling = kinds[0]};
    medrun_session *b = start(o), *a = (o.lookup = 8, start(o));
    CHECK(!medrun_feed(a, ids, SAVED, NULL));
    step_all(a);
    CHECK(!medrun_rewind(a, 0, NULL) && !medrun_feed(a, ids + 3, 49, NULL));
    CHECK(!medrun_feed(b, ids + 3, 49, NULL));
    mode_t mask = (mode_t)umask(0);
    uint8_t *x, *y;
    int unlike = 0;
    for (int i = 0; i < 80; i++) {
        CHECK(!medrun_next(a, &id, &text, &bytes, NULL) && !medrun_next(b, &id, &text, &bytes, NULL));
        if (i % 3) continue;
        CHECK(!medrun_save(a, file, NULL));
        x = read_all_of(file, &n);
#ifndef _WIN32
        CHECK(!stat(file, &st) && (st.st_mode & 0777) == 0600);
#endif
        CHECK(!medrun_save(b, file, NULL));
        y = read_all_of(file, &again);
        unlike += n != again || memcmp(x, y, n);
        free(x), free(y);
    }
    umask(mask);
    CHECK_EQ(unlike, 0);
    CHECK(a->lookup.guessed > 0);
#ifndef _WIN32
    /* a failed save leaves what was there before, and nothing else */
    struct rlimit limit, tight;
    char partial[320];
    medrun_error e = {0};
    snprintf(partial, sizeof partial, "%s.partial", file);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &limit);
    tight = limit, tight.rlim_cur = 2000;
    setrlimit(RLIMIT_FSIZE, &tight);
    CHECK_EQ(medrun_save(a, file, &e), MEDRUN_FAILED);
    setrlimit(RLIMIT_FSIZE, &limit);
    CHECK(strstr(e.text, "too large") && access(partial, F_OK));
    CHECK_EQ(medrun_feed_saved(a, ids + 3, 49, file, &taken, NULL), MEDRUN_OK);
    CHECK_EQ(taken, 48);
    for (size_t i = 0; i < 3; i++) {
        static const char *const places[] = {"/dev/full", "/dev/null", "."};
        e = (medrun_error){0};
        CHECK_EQ(medrun_save(a, places[i], &e), MEDRUN_FAILED);
        CHECK(strstr(e.text, i < 2 ? "not a regular file" : "found a folder"));
        CHECK_EQ(medrun_feed_saved(a, ids, 3, places[i], &taken, NULL), MEDRUN_BAD_FILE);
    }
#else
    (void)taken;
#endif
    medrun_stop(a), medrun_stop(b);
}

/* Who may take from a file: int8 and fp32 arithmetic on any kernels, the processor's own bf16 dot
 * product nobody but the same kernels. */
static void test_kernels(const char *build, const char *file) {
    static const char *const names[] = {"scalar", "avx2", "avx512", "avx512bf16", "neon", "neon-dot",
                                        "neon-i8mm", "neon-bf16"};
    enum { NAMES = sizeof names / sizeof *names };
    medrun_model *kept = model, *m[NAMES];
    int32_t ids[SAVED];
    char checkpoint[300];
    ids_of(ids, SAVED);
    for (int kind = 0; kind < 3; kind++) {              /* int8, bf16, bf16 --strict             */
        medrun_session_options o = {.context = SAVED, .strict = kind == 2};
        int wrong = 0, refused = 0, usable = 0, own = 0;
        snprintf(checkpoint, sizeof checkpoint, "%s/mistral-window-%s.mdr", build,
                 kind ? "bf16" : "int8");
        for (int i = 0; i < NAMES; i++) {
            const medrun_options one = {.threads = 1, .kernels = names[i]};
            if (!medrun_open(&m[usable], checkpoint, &one, NULL))
                own += m[usable++]->kernels->bf16_dot;
        }
        for (int from = 0; from < usable; from++) {
            model = m[from];
            save_some(file, o, ids, 0);
            for (int to = 0; to < usable; to++) {
                bool apart = kind == 1 && from != to &&
                             (m[from]->kernels->bf16_dot || m[to]->kernels->bf16_dot);
                medrun_error e = {0};
                size_t taken;
                model = m[to];
                medrun_session *a = start(o), *b = start(o);
                int code = medrun_feed_saved(a, ids, SAVED, file, &taken, &e);
                wrong += code != (apart ? MEDRUN_BAD_FILE : MEDRUN_OK);
                wrong += apart && !strstr(e.text, "numbers");
                refused += apart;
                CHECK(!medrun_feed(b, ids, SAVED, NULL));
                step_all(a), step_all(b);
                wrong += !apart && !same_logits(a, b);
                medrun_stop(a), medrun_stop(b);
            }
        }
        CHECK_EQ(wrong, 0);
        CHECK_EQ(refused, kind == 1 ? 2 * own * (usable - own) : 0);
        while (usable) medrun_close(m[--usable]);
    }
    model = kept;
}

/* A saved cache is good only for a medrun that would compute the same one. Whoever changes its bits
 * must raise NUMBERS_VERSION, and then put the digest of the new ones here. */
static void test_numbers_version(void) {
    static const char wanted[] = "2 7a92c292386a30b10256203fe62c133daa4754bf77d8938b8feefa187055a433";
    medrun_model *kept = model;
    char hex[65], found[80];
    uint8_t digest[32];
    int32_t ids[48];
    sha256 sum;
    if (!CHECK(!medrun_open(&model, "tools/demo/demo.mdr", NULL, NULL))) { model = kept; return; }
    medrun_session *s = start((medrun_session_options){.context = 48, .kv = MEDRUN_KV_F32});
    size_t dim = (size_t)model->config.head_dim;
    for (int i = 0; i < 48; i++) ids[i] = 300 + 17 * i;
    CHECK(!medrun_feed(s, ids, 48, NULL));
    step_all(s);
    sum = sha256_start;
    size_t heads = (size_t)model->config.n_kv_heads, panel = cache_panel(MEDRUN_KV_F32, dim);
    for (size_t i = 0; i < (size_t)model->config.n_layers * heads; i++)
        sha256_add(&sum, s->cache.keys + cache_place(&s->cache, (int)(i / heads), i % heads),
                   3 * panel);
    for (size_t i = 0; i < (size_t)model->config.n_layers * heads; i++)
        sha256_add(&sum, s->cache.values + cache_place(&s->cache, (int)(i / heads), i % heads),
                   3 * panel);
    sha256_done(&sum, digest);
    hex_of(digest, hex);
    snprintf(found, sizeof found, "%d %s", NUMBERS_VERSION, hex);
    if (!CHECK(!strcmp(found, wanted)))
        printf("    the bits of a cache are not those of version %.2s: raise NUMBERS_VERSION; found "
               "%s\n", wanted, found);
    medrun_stop(s), medrun_close(model);
    model = kept;
}

static void test_feed_saved(const char *build) {
    char file[300];
    medrun_error e = {0};
    int32_t ids[SAVED];
    size_t taken;
    snprintf(file, sizeof file, "%s/prefix.state", build);
    test_shared(file, (medrun_session_options){0}, 0);
    test_shared(file, (medrun_session_options){.kv = MEDRUN_KV_F32, .lookup = 5}, 10);
    test_shared(file, (medrun_session_options){.kv = MEDRUN_KV_INT8, .lookup = 3}, 20);
    test_numbers_version();
    test_damage(file);
    test_forged(file);
    for (int kv = 0; kv < 3; kv++) test_private(file, kv);
    test_kernels(build, file);
    ids_of(ids, SAVED);
    save_some(file, (medrun_session_options){0}, ids, 0);
    medrun_session *s = start((medrun_session_options){.context = 40, .kv = MEDRUN_KV_F32});
    CHECK_EQ(medrun_feed_saved(s, ids, 30, file, &taken, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "--kv f16") && strstr(e.text, "--kv f32"));
    medrun_stop(s);
    s = start((medrun_session_options){.context = 40, .strict = true});
    e = (medrun_error){0};
    CHECK_EQ(medrun_feed_saved(s, ids, 30, file, &taken, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "--strict"));
    medrun_stop(s);
    medrun_model *kept = model;
    CHECK(!medrun_open(&model, other_path, NULL, NULL));
    s = start((medrun_session_options){.context = 40});
    e = (medrun_error){0};
    CHECK_EQ(medrun_feed_saved(s, ids, 30, file, &taken, &e), MEDRUN_BAD_FILE);
    CHECK(strstr(e.text, "another checkpoint"));
    medrun_stop(s), medrun_close(model);
    model = kept;
    remove(file);
}

/* Marks in INSIDE the offsets that lie within a valid character of TEXT. */
static void mark_inside(const char *text, size_t n, bool *inside) {
    uint32_t code;
    for (size_t i = 0, len; i < n; i += len ? len : 1) {
        len = utf8_decode((const uint8_t *)text + i, n - i, &code);
        inside[i] = false;
        for (size_t k = 1; k < len; k++) inside[i + k] = true;
    }
}

/* medrun_next: the pieces of text join to what detokenizing gives, never half a character, and the
 * same seed gives the same text. */
static void test_next(void) {
    medrun_sampling hot = {1.5f, 0, 1, 0, 1, 42};
    char text[2][4096];
    size_t n[2] = {0}, whole;
    for (int run = 0; run < 2; run++) {
        medrun_session *s = start((medrun_session_options){.context = 256, .custom_sampling = true,
                                                           .sampling = hot, .batch = run ? 3 : 0});
        CHECK(!medrun_say(s, "user", "What is a fever?", 16, NULL));
        size_t before = medrun_length(s), bytes;
        const char *piece;
        int32_t id = -1;
        static bool cut[4096], inside[4096];
        memset(cut, 0, sizeof cut);
        while (medrun_length(s) < 255 && !medrun_next(s, &id, &piece, &bytes, NULL)) {
            memcpy(text[run] + n[run], piece, bytes);
            n[run] += bytes;
            cut[n[run]] = true;
            if (medrun_is_stop(model, id)) break;
        }
        size_t count = medrun_length(s) - before;
        char all[4096];
        CHECK(!medrun_detokenize(model, medrun_tokens(s) + before, count, false, all, sizeof all,
                                 &whole, NULL));
        CHECK(n[run] <= whole && whole - n[run] < 4 && !memcmp(all, text[run], n[run]));
        mark_inside(all, whole, inside);
        for (size_t i = 0; i < n[run]; i++) CHECK(!(cut[i] && inside[i]));
        /* the next turn follows, the stop id replaced by what the template writes */
        CHECK(!medrun_say(s, "user", "And a cold?", 11, NULL) || medrun_length(s) > 230);
        medrun_stop(s);
    }
    CHECK(n[0] == n[1] && !memcmp(text[0], text[1], n[0]));
    medrun_session *s = start((medrun_session_options){.context = 20});
    int32_t id, ids[20] = {0};
    const char *piece;
    size_t bytes;
    CHECK(!medrun_feed(s, ids, 20, NULL));
    CHECK_EQ(medrun_next(s, &id, &piece, &bytes, NULL), MEDRUN_TOO_LONG);
    medrun_stop(s);
}

/* SentencePiece's words begin with a space: the first of an answer loses it, as in what its ids
 * alone decode to, and so does the first of the next answer. */
static void test_first_space(const char *build) {
    char spaced[512];
    int spaces = 0, wrong = 0;
    medrun_model *llama = model;
    snprintf(spaced, sizeof spaced, "%s/mistral-spm-int8.mdr", build);
    if (!CHECK(!medrun_open(&model, spaced, NULL, NULL))) { model = llama; return; }
    medrun_sampling hot = {1.5f, 0, 1, 0, 1, 7};
    medrun_session *s = start((medrun_session_options){.context = 400, .custom_sampling = true,
                                                       .sampling = hot});
    while (medrun_length(s) < 390) {
        int32_t id = 1;
        char text[200], all[200];
        size_t n = 0, whole, len, bytes;
        const char *piece;
        CHECK(!medrun_feed(s, &id, 1, NULL));
        size_t before = medrun_length(s);
        for (int i = 0; i < 5; i++, n += bytes) {
            wrong += medrun_next(s, &id, &piece, &bytes, NULL);
            memcpy(text + n, piece, bytes);
        }
        const int32_t *answer = medrun_tokens(s) + before;
        wrong += medrun_detokenize(model, answer, 5, false, all, sizeof all, &whole, NULL);
        wrong += n > whole || whole - n > 3 || memcmp(text, all, n);
        spaces += *tokenizer_piece(&model->tokenizer, answer[0], &len) == ' ';
    }
    CHECK_EQ(wrong, 0);
    CHECK(spaces > 5);
    medrun_stop(s);
    medrun_close(model);
    model = llama;
}

/* Turn by turn is the same timeline as the whole conversation rendered. */
static void test_say(void) {
    medrun_message m[] = {{"system", "Be brief.", 9}, {"user", " What is pain? ", 15},
                          {"assistant", "A signal.", 9}, {"user", "Why?", 4}};
    int32_t ids[256];
    size_t n;
    CHECK(!medrun_render(model, NULL, NULL, m, 4, true, ids, 256, &n, NULL));
    medrun_session *s = start((medrun_session_options){.context = 256});
    CHECK(!medrun_say(s, "system", "Be brief.", 9, NULL));
    CHECK(!medrun_say(s, "user", " What is pain? ", 15, NULL));
    int32_t reply[32];
    size_t k;
    CHECK(!medrun_tokenize(model, "A signal.", 9, 0, reply, 32, &k, NULL));
    CHECK(!medrun_feed(s, reply, k, NULL));
    CHECK(!medrun_feed(s, &model->stops[0], 1, NULL));
    CHECK(!medrun_say(s, "user", "Why?", 4, NULL));
    CHECK_EQ(medrun_length(s), n);
    CHECK(!memcmp(medrun_tokens(s), ids, n * sizeof *ids));
    CHECK_EQ(medrun_render(model, "unknown", NULL, m, 4, true, ids, 256, &n, NULL), MEDRUN_USAGE);
    medrun_stop(s);
}

/* ---- guessing ahead ------------------------------------------------------------------------ */

static const char *const fixtures[] = {
    "llama-plain-int8", "llama-tied-int8", "llama-grouped-int8", "mistral-window-int8",
    "mistral-spm-int8", "arcee-yarn-int8", "apertus-plain-int8", "apertus-grouped-int8",
    "llama-plain-bf16", "mistral-window-bf16", "arcee-yarn-bf16", "apertus-grouped-bf16"};

enum { ROOM = 200 };

/* What an answer came to. */
typedef struct {
    int32_t ids[ROOM];
    char text[64 * ROOM];
    size_t n, n_text;
    uint64_t random, guessed, right;
    float *logits;
    int code;
} outcome;

/* A text that repeats itself, then as many ids as there is room for, then the logits after them.
 * STEP: before every so many ids the caller makes a step of his own, which changes nothing. */
static void generate(outcome *r, medrun_session_options o, size_t step) {
    medrun_session *s = start(o);
    int32_t ids[60], id;
    const char *piece;
    size_t bytes, vocab = (size_t)model->config.vocab_size;
    for (int i = 0; i < 60; i++) ids[i] = (int32_t)(11 + 7 * (i % 20));
    r->n_text = 0;
    CHECK(!medrun_feed(s, ids, 60, NULL));
    while (!(r->code = medrun_next(s, &id, &piece, &bytes, NULL))) {
        if (step && medrun_length(s) % step == 0 && medrun_step(&s, 1, NULL)) exit(1);
        if (r->n_text + bytes > sizeof r->text) exit(1);
        memcpy(r->text + r->n_text, piece, bytes);
        r->n_text += bytes;
    }
    r->n = medrun_length(s), r->random = s->random;
    memcpy(r->ids, medrun_tokens(s), r->n * sizeof id);
    CHECK(!medrun_rewind(s, r->n - 3, NULL));
    step_all(s);
    r->logits = malloc(vocab * sizeof(float));
    memcpy(r->logits, medrun_logits(s, 0), vocab * sizeof(float));
    medrun_guesses(s, &r->guessed, &r->right);
    medrun_stop(s);
}

static bool same_outcome(const outcome *a, const outcome *b) {
    return a->n == b->n && a->n_text == b->n_text && a->random == b->random && a->code == b->code &&
           !memcmp(a->ids, b->ids, a->n * sizeof *a->ids) && !memcmp(a->text, b->text, a->n_text) &&
           !memcmp(a->logits, b->logits, (size_t)model->config.vocab_size * sizeof(float));
}

/* With guesses the same ids, text, random numbers and logits as without: greedy and sampled, with
 * and without a repeat penalty, for any number of guesses, threads and chunk of the prompt. */
static void test_lookup_same(int kind, uint64_t *guessed, uint64_t *right, int *wrong) {
    static const struct { int lookup, batch, context; uint64_t tick; size_t step; } cases[] = {
        {0, 0, ROOM, 1, 0}, {3, 7, ROOM, 1, 0}, {8, 0, ROOM, 1, 0}, {31, 0, ROOM, 20, 0},
        {31, 5, ROOM, 1000, 0}, {4, 0, ROOM, 1, 7}, {0, 0, 101, 1, 0}, {1, 0, 101, 1, 0},
        {8, 0, 101, 1, 0}, {8, 1, 101, 1, 0}};
    static outcome plain, ahead;
    medrun_session_options o = {.custom_sampling = true, .sampling = kinds[kind]};
    plain.logits = NULL;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        outcome *r = cases[i].lookup ? &ahead : &plain;
        o.lookup = cases[i].lookup, o.batch = cases[i].batch, o.context = cases[i].context;
        longest_tick = cases[i].tick;
        if (r == &plain) free(plain.logits);
        generate(r, o, cases[i].step);
        *wrong += r->n != (size_t)o.context || r->code != MEDRUN_TOO_LONG;
        *wrong += o.batch == 1 && ahead.guessed;
        *guessed += r->guessed, *right += r->right;
        if (r == &plain) continue;
        *wrong += !same_outcome(&plain, &ahead) || ahead.right > ahead.guessed;
        free(ahead.logits);
    }
    free(plain.logits);
    longest_tick = 1;
}

/* As many tokens as the match is long stand before its place and at the end of the timeline. */
static bool match_is_right(const medrun_session *s) {
    const struct lookup *g = &s->lookup;
    if (!g->length) return true;
    return g->length <= MAX_MATCH && g->length <= g->at && g->at < s->n_tokens &&
           !memcmp(s->tokens + g->at - g->length, s->tokens + s->n_tokens - g->length,
                   g->length * sizeof *s->tokens);
}

static void count_rows(void *user, const char *stage, int layer, size_t rows, size_t cols,
                       size_t stride, const float *data) {
    (void)layer, (void)cols, (void)stride, (void)data;
    if (!strcmp(stage, "embed")) *(size_t *)user += rows;
}

/* Everything a caller may do between two calls of medrun_next, done by chance to a session that
 * guesses and to one that does not: no difference can be seen. */
static void test_lookup_mixed(medrun_sampling sampling, const char *file, int *wrong,
                              uint64_t *right) {
    medrun_session_options o = {.context = 150, .batch = 40, .custom_sampling = true,
                                .logit_rows = 3, .sampling = sampling};
    medrun_session *s[2], *company = start(o);
    uint64_t guessed, came;
    size_t seen[2] = {0};
    for (int k = 0; k < 2; k++) o.lookup = 9 * k, s[k] = start(o);
    longest_tick = 3;
    for (int i = 0; i < 250; i++) {
        uint64_t chance = test_random(), what = chance % 16;
        int32_t ids[4], id[2] = {0};
        const char *text[2] = {"", ""};
        size_t n = 1 + (chance >> 8) % 4, length = medrun_length(s[0]), bytes[2] = {0};
        int code[2] = {0};
        for (size_t k = 0; k < n; k++)
            ids[k] = length > 12 ? s[0]->tokens[length - 12 + k] : (int32_t)(chance >> 40) % 250;
        if (length == 150) what = 11;
        for (int k = 0; k < 2; k++) {
            medrun_session *both[2] = {company, s[k]};
            if (what < 8 && length)
                for (size_t x = 0; x < n * 2 && !code[k]; x++)
                    code[k] = medrun_next(s[k], &id[k], &text[k], &bytes[k], NULL);
            else if (what < 9 || !length) code[k] = medrun_feed(s[k], ids, n, NULL);
            else if (what == 9 && length > 9) code[k] = medrun_rewind(s[k], length - n * 2, NULL);
            else if (what == 10) code[k] = medrun_step(&s[k], 1, NULL);
            else if (what == 11) code[k] = medrun_rewind(s[k], length * (chance >> 20 & 1) / 2, NULL);
            else if (what == 12) {
                while (medrun_pending(s[k])) medrun_step(&s[k], 1, NULL);
                code[k] = medrun_sample(s[k], &id[k], NULL);
                if (!code[k]) code[k] = medrun_feed(s[k], &id[k], 1, NULL);
            } else if (what == 13)
                code[k] = medrun_save(s[k], file, NULL) || medrun_restore(s[k], file, NULL);
            else if (what == 14) medrun_observe(s[k], n > 1 ? count_rows : NULL, &seen[k]);
            else if (what == 15) {
                medrun_rewind(company, 0, NULL), medrun_feed(company, ids, n, NULL);
                code[k] = medrun_step(both, 2, NULL);
            }
        }
        const float *x = medrun_logits(s[0], 0), *y = medrun_logits(s[1], 0);
        length = medrun_length(s[0]);
        *wrong += code[0] != code[1] || id[0] != id[1] || bytes[0] != bytes[1] ||
                  memcmp(text[0], text[1], bytes[0]);
        *wrong += length != medrun_length(s[1]) || medrun_pending(s[0]) != medrun_pending(s[1]) ||
                  memcmp(s[0]->tokens, s[1]->tokens, length * sizeof *ids);
        *wrong += s[0]->random != s[1]->random || !x != !y || (x && !same_logits(s[0], s[1]));
        *wrong += seen[0] != seen[1] || !match_is_right(s[1]);
    }
    longest_tick = 1;
    medrun_guesses(s[1], &guessed, &came);
    *right += came;
    medrun_stop(s[0]), medrun_stop(s[1]), medrun_stop(company);
}

/* All of that with one model; its greedy answers run in circles, so guesses must come true. */
static void test_lookup(const char *build, size_t fixture, uint64_t *mixed) {
    char file[300], state[300];
    uint64_t guessed = 0, right = 0;
    int wrong = 0, different = 0, threads = fixture < 3 ? (int)fixture + 1 : 1;
    snprintf(file, sizeof file, "%s/%s.mdr", build, fixtures[fixture]);
    snprintf(state, sizeof state, "%s/lookup.state", build);
    if (!CHECK(!medrun_open(&model, file, &(medrun_options){.threads = threads}, NULL))) return;
    test_lookup_same(0, &guessed, &right, &wrong);
    test_lookup_same(1 + (int)fixture % 3, &guessed, &right, &wrong);
    test_lookup_mixed(kinds[fixture % N_KINDS], state, &different, mixed);
    bool same = CHECK_EQ(wrong, 0);
    same = CHECK_EQ(different, 0) && same;
    same = CHECK(right > 80 && guessed > right) && same;
    if (!same)
        printf("    %s: guessed %llu, right %llu\n", fixtures[fixture],
               (unsigned long long)guessed, (unsigned long long)right);
    remove(state);
    medrun_close(model);
}

#ifndef _WIN32
/* A child that opens its own model after fork works, though the parent's threads are not there. */
static void test_fork(void) {
    int32_t ids[20];
    int status = -1;
    ids_of(ids, 20);
    pid_t child = fork();
    if (!child) {
        medrun_model *own;
        medrun_session *s = NULL;
        alarm(20);
        if (medrun_open(&own, path, &(medrun_options){.threads = 2}, NULL) ||
            medrun_start(&s, own, &(medrun_session_options){.context = 40}, NULL, 0, NULL) ||
            medrun_feed(s, ids, 20, NULL) || medrun_step(&s, 1, NULL)) _exit(1);
        _exit(medrun_logits(s, 0) ? 0 : 2);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_EQ(status, 0);
}
#endif

/* ---- a draft ------------------------------------------------------------------------------- */

/* Time as rows take it, not the clock: each norm of a row of the model takes 10, one of the draft's
 * DRAFT_NORM_TIME; only of the first row where a pass of many rows is to cost what one does. */
static const kernel_set *plain_kernels;
static const float *first_row, *first_draft_row;
static size_t draft_norm_time;

static void model_norm(float *out, const float *x, const float *weight, size_t n, float eps) {
    plain_kernels->norm(out, x, weight, n, eps);
    if (!first_row || out == first_row) test_time += 10;
}

static void draft_norm(float *out, const float *x, const float *weight, size_t n, float eps) {
    plain_kernels->norm(out, x, weight, n, eps);
    if (!first_row || out == first_draft_row) test_time += draft_norm_time;
}

/* What an answer behind a prompt takes, and which: with DRAFT or without, with so many guesses. */
static uint64_t time_of_answer(outcome *r, const medrun_model *draft, int guesses, int kind,
                               bool wide_is_free, size_t prompt) {
    medrun_session_options o = {.context = ROOM, .draft = draft, .lookup = guesses,
                                .custom_sampling = true, .sampling = kinds[kind]};
    medrun_session *s = start(o);
    int32_t ids[ROOM], id;
    const char *piece;
    size_t bytes;
    for (int i = 0; i < ROOM; i++) ids[i] = (int32_t)(11 + 7 * i % 239);
    first_row = wide_is_free ? s->pass.h : NULL;
    first_draft_row = draft ? s->draft->pass.h : NULL;
    uint64_t before = test_time;
    CHECK(!medrun_feed(s, ids, prompt, NULL));
    while (!(r->code = medrun_next(s, &id, &piece, &bytes, NULL))) {}
    r->n = medrun_length(s), r->random = s->random;
    memcpy(r->ids, medrun_tokens(s), r->n * sizeof id);
    medrun_guesses(s, &r->guessed, &r->right);
    medrun_stop(s);
    return test_time - before;
}

/* A draft that is the model itself guesses nearly all and saves most of the time; one that is no
 * good, where guesses are dear, costs at most 3 %; the text is the same, greedy or sampled. Behind a
 * longer prompt a draft begins with its end, from which random weights guess nothing. */
static void test_draft_time(const char *build) {
    static outcome plain, ahead;
    char file[300];
    medrun_model *own, *other;
    snprintf(file, sizeof file, "%s/llama-grouped-int8.mdr", build);
    CHECK(!medrun_open(&model, file, &(medrun_options){.threads = 1}, NULL));
    CHECK(!medrun_open(&own, file, &(medrun_options){.threads = 1}, NULL));
    CHECK(!medrun_open(&other, file, &(medrun_options){.threads = 1}, NULL));
    static float turned[256];                   /* which guesses the last that would come        */
    if (!CHECK(model->config.hidden_size <= 256)) return;
    for (int i = 0; i < model->config.hidden_size; i++) turned[i] = -other->final_norm[i];
    other->final_norm = turned;
    own->weight_bytes = model->weight_bytes / 10;       /* what it is told to expect             */
    kernel_set models = *model->kernels, drafts = models;
    plain_kernels = own->kernels;
    models.norm = model_norm, drafts.norm = draft_norm;
    model->kernels = &models, own->kernels = other->kernels = &drafts;
    longest_tick = 0;
    for (int kind = 0; kind < N_KINDS; kind += 3)
        for (size_t prompt = 1; prompt < 90; prompt += 49) {
            draft_norm_time = 1;
            uint64_t alone = time_of_answer(&plain, NULL, 0, kind, true, prompt);
            uint64_t together = time_of_answer(&ahead, own, 0, kind, true, prompt);
            bool same = ahead.n == plain.n && ahead.random == plain.random &&
                        !memcmp(ahead.ids, plain.ids, plain.n * sizeof *plain.ids);
            same = same && (kind || prompt > 1 ||
                             (ahead.right * 10 > ahead.guessed * 9 && together * 2 < alone));
            if (!CHECK(same && together * 100 <= alone * 103))
                printf("    sampling %d, prompt %zu: %llu and with draft %llu, guessed %llu, right "
                       "%llu\n", kind, prompt, (unsigned long long)alone,
                       (unsigned long long)together, (unsigned long long)ahead.guessed,
                       (unsigned long long)ahead.right);
            for (draft_norm_time = 1; draft_norm_time < 8; draft_norm_time += 6) {
                alone = time_of_answer(&plain, NULL, 0, kind, draft_norm_time == 7, prompt);
                together = time_of_answer(&ahead, other, 0, kind, draft_norm_time == 7, prompt);
                same = ahead.n == plain.n && ahead.random == plain.random &&
                       !memcmp(ahead.ids, plain.ids, plain.n * sizeof *plain.ids);
                if (!CHECK(same && together * 100 <= alone * 103))
                    printf("    a bad draft: sampling %d, prompt %zu: %llu and with draft %llu\n",
                           kind, prompt, (unsigned long long)alone, (unsigned long long)together);
            }
            /* where each row takes as long as a pass, the guesses of a match must soon end */
            alone = time_of_answer(&plain, NULL, 0, kind, false, prompt);
            for (int guesses = 8; guesses < 32; guesses += 23) {
                together = time_of_answer(&ahead, NULL, guesses, kind, false, prompt);
                if (!CHECK(ahead.n == plain.n && together * 100 <= alone * 103))
                    printf("    lookup %d, sampling %d, prompt %zu: %llu, alone %llu\n", guesses,
                           kind, prompt, (unsigned long long)together, (unsigned long long)alone);
            }
        }
    longest_tick = 1;
    medrun_close(other), medrun_close(own), medrun_close(model);
}

/* With a draft of another type, whatever the passes seem to take: the same ids, text, random
 * numbers and logits as without. A draft of another vocabulary is refused. */
static void test_draft_same(const char *build) {
    static const struct { int draft, lookup, batch, context; uint64_t tick; size_t step; } cases[] = {
        {-1, 0, 0, ROOM, 1, 0}, {0, 0, 0, ROOM, 1, 0}, {1, 0, 7, ROOM, 40, 0}, {2, 4, 0, ROOM, 9, 7},
        {1, 9, 3, ROOM, 1, 0}, {0, 0, 1, ROOM, 1, 0}, {-1, 0, 0, 77, 1, 0}, {0, 0, 0, 77, 1, 0}};
    static const char *const names[] = {"llama-plain-bf16", "llama-plain-int4", "llama-plain-int8"};
    static outcome plain, ahead;
    char file[300];
    medrun_model *drafts[3], *spaced;
    uint64_t guessed = 0;
    int wrong = 0;
    for (int i = 0; i < 3; i++) {
        snprintf(file, sizeof file, "%s/%s.mdr", build, names[i]);
        if (!CHECK(!medrun_open(&drafts[i], file, &(medrun_options){.threads = 1}, NULL))) return;
    }
    snprintf(file, sizeof file, "%s/mistral-spm-int8.mdr", build);
    CHECK(!medrun_open(&spaced, file, NULL, NULL));
    snprintf(file, sizeof file, "%s/llama-plain-bf16.mdr", build);
    CHECK(!medrun_open(&model, file, &(medrun_options){.threads = 2}, NULL));
    for (int kind = 0; kind < N_KINDS; kind++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            outcome *r = cases[i].draft < 0 ? &plain : &ahead;
            medrun_session_options o = {
                .lookup = cases[i].lookup, .batch = cases[i].batch, .context = cases[i].context,
                .draft = cases[i].draft < 0 ? NULL : drafts[cases[i].draft],
                .custom_sampling = true, .sampling = kinds[kind]};
            longest_tick = cases[i].tick;
            if (r == &plain) free(plain.logits);
            generate(r, o, cases[i].step);
            if (r == &plain) continue;
            wrong += !same_outcome(&plain, &ahead) || (o.batch == 1 && ahead.guessed);
            guessed += ahead.guessed;
            free(ahead.logits);
        }
    free(plain.logits), plain.logits = NULL;
    longest_tick = 1;
    CHECK_EQ(wrong, 0);
    CHECK(guessed > 300);
    medrun_error e = {0};
    medrun_session *s;
    medrun_session_options o = {.context = 50, .draft = spaced};
    CHECK_EQ(medrun_start(&s, model, &o, NULL, 0, &e), MEDRUN_USAGE);
    CHECK(s == NULL && strstr(e.text, "mistral-spm-int8.mdr has another vocabulary than"));
    CHECK_EQ(medrun_session_bytes(model, &o), 0);
    medrun_close(model), medrun_close(spaced);
    for (int i = 0; i < 3; i++) medrun_close(drafts[i]);
}

int main(void) {
    char build[200];                            /* what getenv gives moves with the next setenv  */
    medrun_error e = {0};
    if (!getenv("MEDRUN_TEST_BUILD")) setenv("MEDRUN_TEST_BUILD", "build", 1);
    snprintf(build, sizeof build, "%s", getenv("MEDRUN_TEST_BUILD"));
    snprintf(path, sizeof path, "%s/llama-grouped-int8.mdr", build);
    snprintf(other_path, sizeof other_path, "%s/llama-plain-int8.mdr", build);
    if (medrun_open(&model, path, &(medrun_options){.threads = 2}, &e)) {
        printf("%s\n", e.text);
        return 1;
    }
    medrun_info info;
    medrun_describe(model, &info);
    CHECK_EQ(info.vocab_size, 269);
    CHECK(!strcmp(info.type, "int8") && info.n_stops >= 1);
    for (int kv = 0; kv < 3; kv++) test_memory(kv, 0), test_memory(kv, 7), test_memory(kv, 31);
    test_cache_size();
    test_large_size();
    test_wrong_use();
    test_errors();
    test_say_nothing();
    for (int kv = 0; kv < 3; kv++) test_rewind(kv);
    test_save();
    test_feed_saved(build);
    test_next();
    test_first_space(build);
    test_say();
#ifndef _WIN32
    test_fork();
#endif
    medrun_close(model);
    snprintf(path, sizeof path, "%s/llama-grouped-int4.mdr", build);
    if (medrun_open(&model, path, &(medrun_options){.threads = 2}, &e)) {
        printf("%s\n", e.text);
        return 1;
    }
    test_memory(0, 0), test_memory(2, 7);       /* int4 has scratch of its own                   */
    test_rewind(0);
    test_save();
    medrun_close(model);
    uint64_t mixed = 0;
    for (size_t i = 0; i < sizeof fixtures / sizeof *fixtures; i++) test_lookup(build, i, &mixed);
    test_draft_same(build);
    test_draft_time(build);
    CHECK(mixed > 100);                         /* guesses that came true between other calls    */
    return report();
}
