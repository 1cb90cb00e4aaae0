/* Checks lesson 7: the stage ffn_act of real passes, and the search for a neuron. */
#include "course.h"

static double worst(const float *a, const float *b, size_t n) {
    double off = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)(a[i] - b[i]));
        off = d <= off ? off : d;
    }
    return off;
}

static void check_row(const float *h, const float *wanted, int layer, size_t n) {
    static float gate[1 << 14], up[1 << 14], yours[1 << 14], other[1 << 14];
    engine_gate_up(layer, h, gate, up);
    activate(gate, up, n, yours);
    if (worst(yours, wanted, n) <= 1e-5) return;
    activate(up, gate, n, other);
    if (worst(other, wanted, n) <= 1e-5)
        hint("gate and up have changed places: the silu belongs to gate.");
    for (size_t i = 0; i < n; i++) other[i] = yours[i] * gate[i];
    if (worst(other, wanted, n) <= 1e-5)
        hint("that is the sigmoid, 1 / (1 + exp(-x)). silu(x) is x / (1 + exp(-x)).");
    hint("layer %d: %.2g away from medrun's ffn_act.", layer + 1, worst(yours, wanted, n));
}

/* With all neurons but one at rest, that one must be found: random cases, no real weights. */
static void check_search(void) {
    float act[64], columns[64 * 8], direction[8];
    for (int round = 0; round < 100; round++) {
        size_t mine = draw_below(64), loud = (mine + 1 + draw_below(63)) % 64, found;
        for (int i = 0; i < 8; i++) direction[i] = (float)draw_normal();
        for (size_t i = 0; i < 64 * 8; i++) columns[i] = 0.1f * (float)draw_normal();
        for (size_t i = 0; i < 64; i++) act[i] = 0.1f * (float)draw_number();
        for (size_t i = 0; i < 8; i++) {
            columns[mine * 8 + i] = direction[i];
            columns[loud * 8 + i] = 9 * direction[i];
        }
        act[mine] = 2, act[loud] = 0;
        found = find_neuron(act, columns, 64, direction, 8);
        if (found == loud)
            hint("neuron %zu has the strongest column, but its act is 0: count only what takes "
                 "part, act times the column.", loud);
        if (found != mine) hint("neuron %zu adds most along the direction, you say %zu.", mine,
                                found);
        act[mine] = -2, act[loud] = -1;
        for (size_t i = 0; i < 8; i++) columns[mine * 8 + i] *= -1;
        if (find_neuron(act, columns, 64, direction, 8) != mine)
            hint("an act may be negative, and so may the product: the largest sum counts, with its "
                 "sign.");
    }
}

void lesson(void) {
    int32_t ids[MOST_IDS], top;
    size_t n = demo_ask(draw_question(), ids), rows, cols, wide, dim = (size_t)facts.hidden_size;
    recording *r = demo_run(ids, n, MEDRUN_KV_F16);
    for (int layer = 0; layer < facts.n_layers; layer++) {
        const float *h = demo_stage(r, "ffn_norm", layer, &rows, &cols);
        const float *act = demo_stage(r, "ffn_act", layer, &rows, &wide);
        for (size_t t = 0; t < rows; t++) check_row(h + t * cols, act + t * wide, layer, wide);
    }
    check_search();
    const float *logits = demo_stage(r, "logits", -1, &rows, &cols), *act;
    float *columns = calloc(dim * (size_t)facts.ffn_size, sizeof *columns), row[4096];
    int32_t *order = calloc(cols, sizeof *order);
    if (!columns || !order) exit(2);
    demo_order(logits + (rows - 1) * cols, cols, order);
    top = order[0];
    weights_output(top, row);
    for (size_t i = 0; i < dim; i++) row[i] *= weights_norm(NORM_FINAL, 0)[i];
    weights_columns(facts.n_layers - 1, columns);
    act = demo_stage(r, "ffn_act", facts.n_layers - 1, &rows, &wide);
    right("all layers. In the last one neuron %zu of %zu pushes most towards \"%s\".",
          find_neuron(act + (rows - 1) * wide, columns, wide, row, dim) + 1, wide, demo_piece(top));
    free(columns), free(order);
    demo_forget(r);
}
