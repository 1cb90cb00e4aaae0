/* Lesson 5, solved. */
#include "course.h"

void look_back(const float *q, const float *k, const float *v, size_t at, size_t n, size_t dim,
               float *found) {
    double score[512], largest = -1e30, total = 0;
    size_t seen = at + 1;
    (void)n;
    for (size_t s = 0; s < seen; s++) {
        double dot = 0;
        for (size_t i = 0; i < dim; i++) dot += (double)q[at * dim + i] * k[s * dim + i];
        score[s] = dot / sqrt((double)dim);
        if (score[s] > largest) largest = score[s];
    }
    for (size_t s = 0; s < seen; s++) total += score[s] = exp(score[s] - largest);
    for (size_t i = 0; i < dim; i++) {
        double sum = 0;
        for (size_t s = 0; s < seen; s++) sum += score[s] / total * v[s * dim + i];
        found[at * dim + i] = (float)sum;
    }
}
