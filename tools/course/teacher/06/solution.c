/* Lesson 6, solved. */
#include "course.h"

double cache_bytes(const medrun_info *m, double tokens, double bytes) {
    return 2 * tokens * m->n_layers * m->n_kv_heads * m->head_dim * bytes;
}

static int32_t likeliest(const float *logits) {
    int32_t best = 0;
    for (int32_t i = 1; i < facts.vocab_size; i++) if (logits[i] > logits[best]) best = i;
    return best;
}

void answer_with_cache(medrun_session *s, const int32_t *prompt, size_t n_prompt,
                       int32_t *answer, size_t n_answer) {
    if (medrun_feed(s, prompt, n_prompt, NULL)) exit(1);
    for (size_t i = 0; i < n_answer; i++) {
        if (medrun_step(&s, 1, NULL)) exit(1);
        answer[i] = likeliest(medrun_logits(s, 0));
        if (i + 1 < n_answer && medrun_feed(s, &answer[i], 1, NULL)) exit(1);
    }
}
