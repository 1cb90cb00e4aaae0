/* Checks lesson 10: the surprise of right and wrong answers, by the engine's own sum. */
#include "course.h"

static double engine_bits(const float *logits, size_t vocab, const int32_t *ids, size_t from,
                          size_t n,
                          size_t behind) {
    double sum = 0;
    for (size_t t = from; t < n; t++) {
        const float *z = logits + (t - behind) * vocab;
        sum += (engine_log_sum(z) - (double)z[ids[t]]) / 0.69314718055994531;
    }
    return sum / (double)(n - from);
}

static double check_answer(const char *question, const char *answer) {
    int32_t ids[MOST_IDS];
    size_t from = demo_ask(question, ids), n = from + demo_tokens(answer, false, ids + from),
        rows, cols;
    recording *r = demo_run(ids, n, MEDRUN_KV_F16);
    const float *z = demo_stage(r, "logits", -1, &rows, &cols);
    double wanted = engine_bits(z, cols, ids, from, n, 1), yours;
    float *high = calloc(rows * cols, sizeof *high);
    if (!high) exit(2);
    yours = mean_surprise(z, cols, ids, from, n);
    if (!(fabs(yours - wanted) <= 1e-6 * (1 + wanted))) {
        if (fabs(yours / wanted - 0.69314718) < 1e-5)
            hint("%.3f is the surprise in nats. A bit is ln 2 nats.", yours);
        if (fabs(yours - engine_bits(z, cols, ids, from, n, 0)) < 1e-5)
            hint("you looked behind the token itself. What was expected stands behind the token "
                 "before.");
        hint("\"%s\": %.4f bits a token, wanted %.4f.", answer, yours, wanted);
    }
    /* Logits that are all 1000 larger mean the same. */
    for (size_t i = 0; i < rows * cols; i++) high[i] = z[i] + 1000;
    yours = mean_surprise(high, cols, ids, from, n);
    if (!(fabs(yours - wanted) <= 1e-3 * (1 + wanted)))
        hint("with all logits 1000 larger you say %g, and nothing should change: take the "
             "largest logit off before exp.", yours);
    free(high);
    demo_forget(r);
    return wanted;
}

void lesson(void) {
    for (int i = 0; i < 3; i++) check_answer(draw_question(), "It is not known.");
    const char *question = "What are the symptoms of diabetes?";
    double good = check_answer(question, "The symptoms of diabetes are increased thirst.");
    double wrong = check_answer(question, "The symptoms of diabetes are red spots.");
    right("\"... increased thirst.\" surprises by %.2f bits a token, \"... red spots.\" by "
          "%.2f.", good,
          wrong);
}
