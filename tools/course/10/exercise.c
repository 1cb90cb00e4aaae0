/* Lesson 10: how sure, how good, how fast.
 *
 * A model is surprised by a token as much as it held it for unlikely:
 *
 *     surprise = -log2(probability of the token that came)                           in bits
 *     probability of id = exp(logit of id) / (sum of exp of all logits)
 *
 * exp of a large number is infinite: take the largest logit off first. The logits that expect token
 * t stand behind token t - 1, at logits + (t - 1) * vocab. Return the mean over t = from ... n - 1.
 *
 * Read in medrun.c: section 14, log_sum. Check: make 10 */
#include "course.h"

double mean_surprise(const float *logits, size_t vocab, const int32_t *ids, size_t from, size_t n) {
    /* TODO */
    (void)logits, (void)vocab, (void)ids, (void)from, (void)n;
    return 0;
}
