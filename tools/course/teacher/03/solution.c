/* Lesson 3, solved. */
#include "course.h"

float to_int8(const float *x, int8_t *q) {
    float largest = 0;
    for (int i = 0; i < GROUP_SIZE; i++) largest = fmaxf(largest, fabsf(x[i]));
    float scale = largest / 127;
    for (int i = 0; i < GROUP_SIZE; i++) q[i] = scale > 0 ? (int8_t)lrintf(x[i] / scale) : 0;
    return scale;
}

void from_int8(const int8_t *q, float scale, float *x) {
    for (int i = 0; i < GROUP_SIZE; i++) x[i] = q[i] * scale;
}
