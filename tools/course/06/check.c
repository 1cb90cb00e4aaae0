/* Checks lesson 6: the size of the cache; the same logits as without one, in fewer rows. */
#include "course.h"

static size_t rows_seen;

static void count_rows(void *user, const char *stage, int layer, size_t rows, size_t cols,
                       size_t stride, const float *data) {
    (void)user, (void)layer, (void)cols, (void)stride, (void)data;
    if (!strcmp(stage, "embed")) rows_seen += rows;
}

static void check_bytes(void) {
    for (int i = 1; i <= 8; i++) {
        int tokens = 256 * i * (1 + (int)draw_below(4));
        double wanted = engine_cache_bytes(tokens, MEDRUN_KV_F16);
        double ratio = cache_bytes(&facts, tokens, 2) / wanted, groups = facts.n_heads;
        groups /= facts.n_kv_heads;
        if (fabs(ratio - 1) < 1e-9) continue;
        if (fabs(ratio - 0.5) < 1e-9)
            hint("%d tokens: half of what medrun takes. There are keys and values.", tokens);
        if (fabs(ratio - groups) < 1e-9)
            hint("%d tokens: %g times what medrun takes. %g query heads share one key-value head.",
                 tokens, ratio, groups);
        if (fabs(ratio * facts.n_layers - 1) < 1e-9)
            hint("%d tokens: this is one layer's cache. There are %d.", tokens, facts.n_layers);
        hint("%d tokens: you say %.0f bytes, medrun takes %.0f.", tokens, ratio * wanted, wanted);
    }
}

static void start(medrun_session **s) {
    medrun_session_options o = {.context = MOST_IDS};
    if (medrun_start(s, demo, &o, NULL, 0, NULL)) exit(2);
}

/* The answer as without a cache: everything from the start, for each token. */
static void answer_anew(const int32_t *prompt, size_t n, int32_t *answer, size_t n_answer,
                        float *last) {
    medrun_session *s;
    start(&s);
    for (size_t i = 0; i < n_answer; i++) {
        medrun_rewind(s, 0, NULL);
        medrun_feed(s, prompt, n, NULL), medrun_feed(s, answer, i, NULL);
        if (medrun_step(&s, 1, NULL)) exit(2);
        memcpy(last, medrun_logits(s, 0), (size_t)facts.vocab_size * sizeof *last);
        answer[i] = 0;
        for (int32_t id = 1; id < facts.vocab_size; id++)
            if (last[id] > last[answer[i]]) answer[i] = id;
    }
    medrun_stop(s);
}

void lesson(void) {
    static float last[1 << 16];
    int32_t prompt[MOST_IDS], wanted[12], yours[12] = {0};
    size_t n = demo_ask(draw_question(), prompt), n_answer = 12;
    medrun_session *s;
    check_bytes();
    answer_anew(prompt, n, wanted, n_answer, last);
    start(&s);
    medrun_observe(s, count_rows, NULL);
    answer_with_cache(s, prompt, n, yours, n_answer);
    if (memcmp(yours, wanted, sizeof wanted))
        for (size_t i = 0; i < n_answer; i++)
            if (yours[i] != wanted[i])
                hint("token %zu of the answer is \"%s\", without a cache it is \"%s\".", i + 1,
                     demo_piece(yours[i]), demo_piece(wanted[i]));
    if (rows_seen > n + n_answer)
        hint("the answer is right, but %zu rows went through the model where %zu are enough: "
             "feed only what is new.", rows_seen, n + n_answer - 1);
    const float *logits = medrun_logits(s, 0);
    if (logits && medrun_length(s) == n + n_answer - 1 &&
        memcmp(logits, last, (size_t)facts.vocab_size * sizeof *last))
        hint("the last logits differ from those without a cache.");
    right("%zu rows instead of %zu, the same bits. 8192 tokens would take %.1f MB.", rows_seen,
          n * n_answer + n_answer * (n_answer - 1) / 2, cache_bytes(&facts, 8192, 2) / 1e6);
    medrun_stop(s);
}
