/* Lesson 7: the feed-forward part stores associations.
 *
 * Each of its neurons asks the stream twice: gate says whether it takes part, up says how much:
 *
 *     act[i] = silu(gate[i]) * up[i],      silu(x) = x / (1 + exp(-x))
 *
 * Then each neuron adds its own column, act[i] times as long, to the stream. Which neuron pushes
 * furthest towards a word? The one with the largest act[i] * (its column . direction).
 *
 * Read in medrun.c: section 13, widen_rows. Check: make 7 */
#include "course.h"

void activate(const float *gate, const float *up, size_t n, float *act) {
    /* TODO */
    for (size_t i = 0; i < n; i++) act[i] = gate[i] + up[i];
}

size_t find_neuron(const float *act, const float *columns, size_t n, const float *direction,
                   size_t dim) {
    /* TODO */
    (void)act, (void)columns, (void)n, (void)direction, (void)dim;
    return 0;
}
