/* Lesson 10, solved. */
#include "course.h"

double mean_surprise(const float *logits, size_t vocab, const int32_t *ids, size_t from, size_t n) {
    double all = 0;
    for (size_t t = from; t < n; t++) {
        const float *z = logits + (t - 1) * vocab;
        double largest = z[0], sum = 0;
        for (size_t i = 1; i < vocab; i++) if (z[i] > largest) largest = z[i];
        for (size_t i = 0; i < vocab; i++) sum += exp(z[i] - largest);
        all += (largest + log(sum) - z[ids[t]]) / log(2);
    }
    return all / (double)(n - from);
}
