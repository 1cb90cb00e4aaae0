/* Checks lesson 5: attn_out of real passes, head by head, from the observed q, k and v. */
#include "course.h"

/* Head HEAD of each row of a stage, as rows of DIM. */
static void cut_head(const recording *r, const char *stage, int layer, size_t head, size_t dim,
                     float *to) {
    size_t rows, cols;
    const float *from = demo_stage(r, stage, layer, &rows, &cols);
    for (size_t t = 0; t < rows; t++)
        memcpy(to + t * dim, from + t * cols + head * dim, dim * sizeof *to);
}

/* How far row AT is off, and by which factor. */
static double distance(const float *yours, const float *wanted, size_t dim, double *factor) {
    double off = 0, a = 0, b = 0;
    for (size_t i = 0; i < dim; i++) {
        double d = fabs((double)(yours[i] - wanted[i]));
        off = d <= off ? off : d;       /* a NaN is the worst                                   */
        a += (double)yours[i] * (double)wanted[i], b += (double)wanted[i] * (double)wanted[i];
    }
    *factor = a / b;
    for (size_t i = 0; i < dim; i++)
        if (fabs((double)yours[i] - *factor * (double)wanted[i]) > 1e-4 * sqrt(b)) *factor = 0;
    return off;
}

/* Two tokens. The query of the second is its own row; scores are 0 and ln 3, so that it weighs
 * 3/4. What comes instead tells the mistake. */
static void check_two(void) {
    const float q[8] = {0, 0, 0, 0, 2 * 1.0986123f}, k[8] = {0, 0, 0, 0, 1};
    const float v[8] = {0, 0, 0, 0, 1};
    static const struct { double weight; const char *mistake; } known[] = {
        {0.9, "Is each score divided by the root of the head's size?"},
        {0.634, "Divide by the root of dim, not by dim itself."},
        {1, "Is exp taken of each score?"},
        {0.5, "Do the rows begin at at * dim for the query, and at s * dim for a key?"}};
    const char *mistake = "";
    float found[8] = {0};
    look_back(q, k, v, 1, 2, 4, found);
    double yours = (double)found[4];
    if (fabs(yours - 0.75) < 1e-4) return;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (fabs(yours - known[i].weight) < 1e-3) mistake = known[i].mistake;
    hint("with dim = 4, query (2.197, 0, 0, 0) and the keys (0, 0, 0, 0) and (1, 0, 0, 0), the "
         "second token must weigh 0.75. Yours weighs %.3f. %s", yours, mistake);
}

/* What stood in found before is not looked at, and other rows stay. */
static void check_rows(const float *q, const float *k, const float *v, size_t n, size_t dim,
                       float *yours) {
    const float before = 1000;
    for (size_t i = 0; i < n * dim; i++) yours[i] = before;
    look_back(q, k, v, n - 1, n, dim, yours);
    for (size_t i = 0; i < (n - 1) * dim; i++)
        if (yours[i] < before || yours[i] > before)
            hint("asked for token %zu, you wrote to row %zu of found. Row %zu begins at "
                 "found[%zu * dim].", n - 1, i / dim, n - 1, n - 1);
    if (yours[(n - 1) * dim] > before / 2)
        hint("you add to what stood in found before. Set it to 0 first.");
}

static void check_head(const float *q, const float *k, const float *v, const float *wanted,
                       size_t n, size_t dim) {
    float yours[MOST_IDS * 64];
    double factor[MOST_IDS], off[MOST_IDS];
    size_t wrong = 0;
    check_rows(q, k, v, n, dim, yours);
    for (size_t at = 0; at < n; at++) look_back(q, k, v, at, n, dim, yours);
    for (size_t at = 0; at < n; at++) {
        off[at] = distance(yours + at * dim, wanted + at * dim, dim, &factor[at]);
        wrong += !(off[at] <= 1e-5);
    }
    if (!wrong) return;
    if (factor[n - 1] > 1.001 || (factor[n - 1] > 0 && factor[n - 1] < 0.999))
        hint("the last token finds %.2f times what it should: the weights of the tokens must add "
             "up to 1.", factor[n - 1]);
    if (off[n - 1] <= 1e-5 && !(off[0] <= 1e-5))
        hint("the last token is right, the first is not. It may see itself alone: yours looks at "
             "later tokens.");
    if (!(off[0] <= 1e-5))
        hint("token 0 sees only itself, so it must find its own value. Yours is %.2g off. Do you "
             "mix values, and does AT see itself?", off[0]);
    check_two();
    hint("the first token, which sees only itself, is right; the others are not. Does each key and "
         "each value come from row s?");
}

/* Your function tells the weights when it is given values of one 1 each: dim tokens at a time. */
static double previous_weight(const float *q, const float *k, size_t n, size_t dim) {
    static float v[MOST_IDS * 64], found[MOST_IDS * 64];
    double sum = 0;
    for (size_t at = 1; at < n; at++) {
        memset(v, 0, sizeof v);
        v[(at - 1) * dim] = 1;
        look_back(q, k, v, at, n, dim, found);
        sum += (double)found[at * dim];
    }
    return sum / (double)(n - 1);
}

void lesson(void) {
    static float q[MOST_IDS * 64], k[MOST_IDS * 64], v[MOST_IDS * 64], wanted[MOST_IDS * 64];
    int32_t ids[MOST_IDS];
    size_t n = demo_ask(draw_question(), ids), dim = (size_t)facts.head_dim;
    size_t group = (size_t)(facts.n_heads / facts.n_kv_heads), best_head = 0;
    recording *r = demo_run(ids, n, MEDRUN_KV_F32);
    double best = 0;
    int best_layer = 0;
    for (int layer = 0; layer < facts.n_layers; layer++)
        for (size_t head = 0; head < (size_t)facts.n_heads; head++) {
            cut_head(r, "q", layer, head, dim, q);
            cut_head(r, "k", layer, head / group, dim, k);
            cut_head(r, "v", layer, head / group, dim, v);
            cut_head(r, "attn_out", layer, head, dim, wanted);
            check_head(q, k, v, wanted, n, dim);
            double share = previous_weight(q, k, n, dim);
            if (share > best) best = share, best_layer = layer, best_head = head;
        }
    demo_forget(r);
    right("all %d heads. Head %zu of layer %d reads the token before with %.0f %% of its weight.",
          facts.n_layers * facts.n_heads, best_head + 1, best_layer + 1, 100 * best);
}
