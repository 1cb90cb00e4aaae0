/* Lesson 8: from vector to word, and dice.
 *
 * The model ends with one number for each piece, its logit. One of them is drawn:
 *
 *     weight = exp((logit - largest logit) / temperature)         the likeliest has weight 1
 *     keep the likeliest until their weights hold top_p of the sum of all weights; the one that
 *     crosses that line is kept, too
 *     the ticket, a number from 0 to 1, falls on the kept ones, laid end to end, likeliest first:
 *     take its share of the sum of the KEPT weights
 *
 * demo_order puts the ids in order. n is at most 4096 here.
 *
 * Read in medrun.c: section 14, select_candidates and sample_token. Check: make 8 */
#include "course.h"

int32_t draw_token(const float *logits, size_t n, double temperature, double top_p, double ticket) {
    int32_t ids[4096];
    demo_order(logits, n, ids);
    /* TODO: so far it always takes the likeliest. */
    (void)temperature, (void)top_p, (void)ticket;
    return ids[0];
}
