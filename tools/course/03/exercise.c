/* Lesson 3: numbers are rounded.
 *
 * medrun keeps 64 numbers as 64 whole numbers from -127 to 127 and one scale for all of them:
 *
 *     scale = (largest magnitude of the 64) / 127
 *     q[i]  = x[i] / scale, rounded to the nearest whole number          (magnitude: without sign)
 *     back:   q[i] * scale, which is at most half a scale away from x[i]
 *
 * If all 64 are 0, so are the scale and the whole numbers. lrintf rounds to the nearest.
 *
 * Read in medrun.c: section 5, quantise_group. Check: make 3 */
#include "course.h"

float to_int8(const float *x, int8_t *q) {
    /* TODO */
    for (int i = 0; i < GROUP_SIZE; i++) q[i] = x[i] > 0 ? 1 : -1;
    return 1;
}

void from_int8(const int8_t *q, float scale, float *x) {
    for (int i = 0; i < GROUP_SIZE; i++) x[i] = q[i] * scale;
}
