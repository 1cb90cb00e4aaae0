/* Checks lesson 9: the parts up to each row against what the engine would say there. */
#include "course.h"

enum { MOST_ROWS = 129 };

static double rms(const float *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum / (double)n + (double)weights_eps());
}

static void call(const float *stream, size_t rows, int32_t a, int32_t b, bool flat, double *parts) {
    static float one[4096], row_a[4096], row_b[4096];
    for (size_t i = 0; i < 4096; i++) one[i] = 1;
    weights_output(a, row_a);
    if (b < 0) memset(row_b, 0, sizeof row_b);
    else weights_output(b, row_b);
    for (size_t r = 0; r < rows; r++) parts[r] = (double)NAN;
    split_difference(stream, rows, (size_t)facts.hidden_size,
                     flat ? one : weights_norm(NORM_FINAL, 0), weights_eps(), row_a, row_b, parts);
    for (size_t r = 0; r < rows; r++)
        if (!isfinite(parts[r]))
            hint("part %zu of 0 to %zu is no number. Do you write it, and set it to 0 before you add "
                 "to it?", r, rows - 1);
}

/* The same numbers, so an argument was not used. */
static bool equal(const double *a, const double *b, size_t n) {
    for (size_t i = 0; i < n; i++) if (fabs(a[i] - b[i]) > 1e-9) return false;
    return true;
}

/* All parts may be right but for one factor, which tells what is wrong with the size. */
static void check_factor(const double *sums, const double *wanted, size_t rows, size_t dim,
                         double size) {
    double above = 0, below = 0;
    for (size_t r = 0; r < rows; r++) above += sums[r] * wanted[r], below += wanted[r] * wanted[r];
    double factor = above / below, most = fabs(factor);
    for (size_t r = 0; r < rows; r++)
        if (fabs(sums[r] - factor * wanted[r]) > most * (0.06 + 0.02 * fabs(wanted[r]))) return;
    if (most > 0.95 && most < 1.05 && factor > 0) return;
    if (most > 0.95 && most < 1.05)
        hint("your parts have the wrong sign: a row less the row before it, and the logit of a less "
             "that of b.");
    if (factor / size > 0.95 && factor / size < 1.05)
        hint("all parts are %.2f times too large, and that is the size: divide by it.", factor);
    if (factor * sqrt((double)dim) > 0.95 && factor * sqrt((double)dim) < 1.05)
        hint("all parts are %.4f times what they should be: the size is the root of the mean of "
             "the squares, not of their sum.", factor);
    hint("all parts are %.4g times what they should be. The size is the root of the mean of the "
         "squares of the last row, which begins at (rows - 1) * dim.", factor);
}

/* The engine's word at row r, turned to the size of the last row, is the sum of parts 0 to r. The
 * engine rounds its last product, by some hundredths. */
static double check_split(const float *stream, size_t rows, int32_t a, int32_t b) {
    double parts[MOST_ROWS], other[MOST_ROWS], sums[MOST_ROWS], wanted[MOST_ROWS], sum = 0;
    size_t dim = (size_t)facts.hidden_size;
    double size = rms(stream + (rows - 1) * dim, dim);
    call(stream, rows, a, b, false, parts);
    for (size_t r = 0; r < rows; r++) sum += fabs(parts[r]);
    if (sum == 0) hint("all parts are 0.");
    call(stream, rows, a, -1, false, other);
    if (equal(parts, other, rows))
        hint("your parts do not change with row_b: explain a difference of two logits, not one "
             "logit.");
    call(stream, rows, a, b, true, other);
    if (equal(parts, other, rows)) hint("the norm's weight is not in your parts.");
    sum = 0;
    for (size_t r = 0; r < rows; r++) {
        const float *row = stream + r * dim;
        wanted[r] = engine_difference(row, a, b) * rms(row, dim) / size;
        sums[r] = sum += parts[r];
    }
    check_factor(sums, wanted, rows, dim, size);
    for (size_t r = 0; r < rows; r++) {
        double bar = 0.06 + 0.02 * fabs(wanted[r]), own = rms(stream + r * dim, dim);
        if (fabs(sums[r] - wanted[r]) <= bar) continue;
        if (r == 0 && fabs(parts[0] * own / size - wanted[0]) <= bar)
            hint("part 0 is %.2f times too large: use one size for all parts, that of the last "
                 "row.", parts[0] / wanted[0]);
        hint("parts 0 to %zu add up to %.3f, where the engine says %.3f. A part is what a row "
             "added to the row before.", r, sums[r], wanted[r]);
    }
    return sum;
}

/* The rows x_0, m_0, x_1, ... of the last token. */
static size_t gather(const recording *r, float *stream) {
    size_t rows, cols, n = 0;
    const float *x = demo_stage(r, "embed", -1, &rows, &cols);
    memcpy(stream, x + (rows - 1) * cols, cols * sizeof *stream);
    for (int layer = 0; layer < facts.n_layers; layer++)
        for (int half = 0; half < 2; half++) {
            x = demo_stage(r, half ? "layer_out" : "attn_resid", layer, &rows, &cols);
            memcpy(stream + ++n * cols, x + (rows - 1) * cols, cols * sizeof *stream);
        }
    return n + 1;
}

void lesson(void) {
    static float stream[MOST_ROWS * 4096];
    static int32_t order[1 << 16];
    int32_t ids[MOST_IDS];
    for (int round = 0; round < 4; round++) {
        size_t n = demo_ask(draw_question(), ids), rows, cols;
        recording *r = demo_run(ids, n, MEDRUN_KV_F16);
        const float *z = demo_stage(r, "logits", -1, &rows, &cols);
        z += (rows - 1) * cols;
        demo_order(z, cols, order);
        rows = gather(r, stream);
        for (int k = 1; k < 4; k++) {
            double sum = check_split(stream, rows, order[0], order[k]);
            double real = (double)(z[order[0]] - z[order[k]]);
            if (round == 3 && k == 1)
                right("\"%s\" leads \"%s\" by %.2f nats; your %zu parts add up to %.2f, and the "
                      "rest is "
                      "rounding.", demo_piece(order[0]), demo_piece(order[1]), real, rows, sum);
        }
        demo_forget(r);
    }
}
