/* Lesson 5: one head looks back.
 *
 * Token AT asks with its query; each token that it may see has a key and a value:
 *
 *     score[s]  = (query of AT) . (key of s) / sqrt(dim)      for s = 0 ... AT: never a later token
 *     weight[s] = exp(score[s]) / (sum of all exp(score))     take the largest score off first
 *     found     = sum of weight[s] * (value of s)
 *
 * Row s of a matrix begins at s * dim. n, the tokens in all, is at most 512.
 *
 * Read in medrun.c: section 13, attend_queries. Check: make 5 */
#include "course.h"

void look_back(const float *q, const float *k, const float *v, size_t at, size_t n, size_t dim,
               float *found) {
    /* TODO */
    (void)q, (void)k, (void)v, (void)n;
    for (size_t i = 0; i < dim; i++) found[at * dim + i] = 0;
}
