/* Sessions: memory to the byte, feeding, rewinding, saving and restoring, text as it streams, and
 * what a caller does wrong. */
#define MEDRUN_NO_MAIN
#include "../medrun.c"
#include "test.h"

static medrun_model *model;
static char path[256], other_path[256];

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
static void test_memory(int kv) {
    medrun_session_options o = {.context = 100, .batch = 20, .kv = kv};
    size_t n = medrun_session_bytes(model, &o);
    CHECK(n > 0 && n % 64 == 0);
    uint8_t *block = calloc(1, n + 192), *at = block + (64 - (uintptr_t)block % 64);
    memset(at + n, 0xA5, 64);
    medrun_session *s;
    medrun_error e = {0};
    CHECK_EQ(medrun_start(&s, model, &o, at, n - 1, &e), MEDRUN_USAGE);
    CHECK(s == NULL && e.text[0]);
    CHECK_EQ(medrun_start(&s, model, &o, at + 4, n, NULL), MEDRUN_USAGE);
    CHECK_EQ(medrun_start(&s, model, &o, at, n, NULL), MEDRUN_OK);
    int32_t ids[100];
    ids_of(ids, 100);
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

static void test_wrong_use(void) {
    medrun_error e = {0};
    medrun_session *s;
    medrun_session_options bad[] = {
        {.context = -1}, {.context = 1 << 30}, {.batch = -1}, {.logit_rows = -1}, {.kv = 7},
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
        FILE *f = fopen(file, "wb");
        size_t keep = i < n ? i : n;
        if (i >= n) copy[i - n] ^= 4;
        if (fwrite(copy, 1, keep, f) != keep) exit(1);
        fclose(f);
        if (i >= n) copy[i - n] ^= 4;
        medrun_error e = {0};
        int code = medrun_restore(s, file, &e);
        accepted += code != MEDRUN_BAD_FILE && code != MEDRUN_TOO_LONG;
        accepted += medrun_length(s) != 0 || !e.text[0];
    }
    CHECK_EQ(accepted, 0);
    /* another context that is too short, another checkpoint, another kv */
    FILE *f = fopen(file, "wb");
    if (fwrite(copy, 1, n, f) != n) exit(1);
    fclose(f);
    medrun_session *tiny = start((medrun_session_options){.context = 46});
    medrun_session *wide = start((medrun_session_options){.context = 64, .kv = MEDRUN_KV_F32});
    medrun_session *small = start((medrun_session_options){.context = 64, .kv = MEDRUN_KV_INT8});
    CHECK_EQ(medrun_restore(tiny, file, NULL), MEDRUN_TOO_LONG);
    CHECK_EQ(medrun_restore(wide, file, NULL), MEDRUN_BAD_FILE);
    CHECK_EQ(medrun_restore(small, file, NULL), MEDRUN_BAD_FILE);
    CHECK_EQ(medrun_restore(s, file, NULL), MEDRUN_OK);
    CHECK_EQ(medrun_save(s, "/no/such/folder/state", NULL), MEDRUN_FAILED);
    medrun_stop(tiny), medrun_stop(wide), medrun_stop(small), medrun_stop(s);
    medrun_model *other;
    CHECK(!medrun_open(&other, other_path, NULL, NULL));
    CHECK(!medrun_start(&s, other, NULL, NULL, 0, NULL));
    CHECK_EQ(medrun_restore(s, file, NULL), MEDRUN_BAD_FILE);
    medrun_stop(s), medrun_close(other);
    remove(file);
    free(copy);
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
            if (is_stop(model, id)) break;
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

int main(void) {
    const char *build = getenv("MEDRUN_TEST_BUILD");
    medrun_error e = {0};
    if (!build) setenv("MEDRUN_TEST_BUILD", build = "build", 1);
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
    for (int kv = 0; kv < 3; kv++) test_memory(kv);
    test_cache_size();
    test_wrong_use();
    for (int kv = 0; kv < 3; kv++) test_rewind(kv);
    test_save();
    test_next();
    test_first_space(build);
    test_say();
    medrun_close(model);
    return report();
}
