/* Lesson 8, solved. */
#include "course.h"

int32_t draw_token(const float *logits, size_t n, double temperature, double top_p, double ticket) {
    int32_t ids[4096];
    double weight[4096], all = 0, kept = 0;
    size_t n_kept = 0, i = 0;
    demo_order(logits, n, ids);
    for (size_t k = 0; k < n; k++)
        all += weight[k] = exp(((double)logits[ids[k]] - (double)logits[ids[0]]) / temperature);
    while (n_kept < n && (n_kept == 0 || kept < top_p * all)) kept += weight[n_kept++];
    ticket *= kept;
    for (; i + 1 < n_kept; i++) {
        ticket -= weight[i];
        if (ticket < 0) break;
    }
    return ids[i];
}
