/* Lesson 4: the residual stream and its norm.
 *
 * Before a block reads the stream, its row is brought to size 1 and each number gets its weight:
 *
 *     size   = sqrt(mean of the squares of x + eps)           (the root mean square, RMS)
 *     out[i] = x[i] / size * weight[i]
 *
 * Add the squares up as doubles. Read in medrun.c: section 13, norm_rows. Check: make 4 */
#include "course.h"

void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out) {
    /* TODO */
    (void)weight, (void)eps;
    for (size_t i = 0; i < n; i++) out[i] = x[i];
}
