/* Lesson 9: why this word, and how far to believe it.
 *
 * The last row of the stream is a sum: the embedding and what each block added. The logit of a
 * piece is a sum over that row. So the difference of two logits splits, part by part:
 *
 *     w[i]    = weight[i] * (row_a[i] - row_b[i]) / size    size: the RMS of the LAST row
 *     part 0  = (row 0 of the stream) . w                     what the embedding says
 *     part r  = (row r - row r - 1) . w                       what was added there
 *
 * One size for all of them: else the parts would not add up.
 *
 * Read in tools/explain_facts.c: find_directions. Check: make 9 */
#include "course.h"

void split_difference(const float *stream, size_t rows, size_t dim, const float *weight, float eps,
                      const float *row_a, const float *row_b, double *parts) {
    /* TODO */
    (void)stream, (void)dim, (void)weight, (void)eps, (void)row_a, (void)row_b;
    for (size_t r = 0; r < rows; r++) parts[r] = 0;
}
