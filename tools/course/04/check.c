/* Checks lesson 4: the stage attn_norm of real passes, layer by layer. */
#include "course.h"

static void check_row(const float *x, const float *wanted, int layer, size_t n) {
    const float *weight = weights_norm(NORM_ATTENTION, layer);
    float yours[4096], ratio = 0;
    double off = 0, largest = 0, sum = 0, sum_wanted = 0, plain = 0;
    rms_norm(x, weight, n, weights_eps(), yours);
    for (size_t i = 0; i < n; i++) {
        off = fmax(off, fabs((double)(yours[i] - wanted[i])));
        largest = fmax(largest, fabs((double)wanted[i]));
        sum += (double)(yours[i] / weight[i]), sum_wanted += (double)(wanted[i] / weight[i]);
        plain = fmax(plain, fabs((double)(yours[i] * weight[i] - wanted[i])));
        if (fabs((double)wanted[i]) == largest) ratio = yours[i] / wanted[i];
    }
    if (off <= 1e-6 * largest) return;
    if (!(off < 1e30)) hint("not all of your numbers are numbers.");
    if (plain <= 1e-5 * largest)
        hint("right but for the weight: each number is multiplied by its own.");
    if (fabs((double)ratio * sqrt((double)n) - 1) < 0.01)
        hint("your numbers are %.1f times too small, which is the root of %zu: take the mean of "
             "the squares, not their sum.", 1 / (double)ratio, n);
    if (fabs(sum) < 0.01 * fabs(sum_wanted))
        hint("your row adds up to 0 before the weights: that is LayerNorm, which takes the mean "
             "away. RMSNorm does not.");
    hint("layer %d: %.2g away from medrun's numbers, whose largest is %.3g.", layer + 1, off,
         largest);
}

void lesson(void) {
    int32_t ids[MOST_IDS];
    double first = 0, last = 0;
    for (int round = 0; round < 3; round++) {
        size_t n = demo_ask(draw_question(), ids), rows, cols;
        recording *r = demo_run(ids, n, MEDRUN_KV_F16);
        for (int layer = 0; layer < facts.n_layers; layer++) {
            const float *x = layer ? demo_stage(r, "layer_out", layer - 1, &rows, &cols)
                                   : demo_stage(r, "embed", -1, &rows, &cols);
            const float *wanted = demo_stage(r, "attn_norm", layer, NULL, NULL);
            for (size_t t = 0; t < rows; t++)
                check_row(x + t * cols, wanted + t * cols, layer, cols);
            const float *end = x + (rows - 1) * cols;
            double sum = 0;
            for (size_t i = 0; i < cols; i++) sum += (double)end[i] * (double)end[i];
            if (!layer) first = sqrt(sum / (double)cols);
            last = sqrt(sum / (double)cols);
        }
        demo_forget(r);
    }
    right("all layers of 3 questions. At the last token the stream's size grew from %.2f to %.2f.",
          first, last);
}
